"""The recipe's section of UNIMO's objectives: contrast, visual learning, language learning (UNIMO, sections 2.2 - 2.4).

The defaults are the published values where there are any. What was never published has a default that says so.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlscale.config_values import Positive, Probability


class UnifiedPart(BaseModel):
    """Base of these sections: frozen, numbers finite, and without tolerance for unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ContrastSection(UnifiedPart):
    """Cross-modal contrastive learning (CMCL): views of a pair, drawn anew in each pass.

    How many views are drawn per step, the similarity and the temperature were never published.
    """

    weight: float = Field(1.0, ge=0, description="0: pairs have no views")
    similarity: Literal["mul_fc", "dot", "cosine"] = Field(
        "mul_fc", description="of the pooled [IMG] and [CLS]; mul_fc: the match head on their product"
    )
    temperature: Positive = 1.0
    positives: int = Field(1, ge=0, le=64, description="captions that say the same, of ROOT/rewrites")
    negatives: int = Field(4, ge=0, le=256, description="captions that are not true, of ROOT/rewrites")
    images: int = Field(1, ge=0, le=256, description="retrieved images, of ROOT/retrieved")
    texts: int = Field(1, ge=0, le=256, description="retrieved texts, of ROOT/retrieved")
    window: bool = Field(
        False, description="the images and captions of all other pairs of the step are negatives too (a second forward)"
    )

    @property
    def alone(self) -> bool:
        """Whether a pair's image and caption are also encoded by themselves."""
        return self.window or self.images > 0 or self.texts > 0


class VisualSection(UnifiedPart):
    """Masked regions: their features and their classes are predicted."""

    probability: Probability = Field(0.15, description="of a region to be an anchor")
    overlap: Probability = Field(0.3, description="IoU above which a region is masked with an anchor (base: 0.4)")
    labels: Literal["soft", "kl", "hard"] = Field(
        "soft",
        description="soft: cross-entropy with the detector's probabilities; kl: divergence; hard: its top class",
    )
    background_class: int | None = Field(None, ge=0, description="hard only: class that is never a target")
    feature_weight: float = Field(1.0, ge=0)
    class_weight: float = Field(1.0, ge=0, description="0: no class probabilities are read")


class LanguageSection(UnifiedPart):
    """Masked spans, and generated fragments; each text is one or the other."""

    units: bool = Field(True, description="mask whole units of ROOT/units (data_tools.find_units)")
    seq2seq_share: Probability = Field(0.5, description="of texts, and of captions, that are generated")
    probability: Probability = Field(0.15, description="of word pieces to be masked")
    geometric: Probability = Field(0.2, description="lengths of spans are geometric with this p (SpanBERT)")
    longest_span: int = Field(10, ge=1, description="words of the longest span; UNIMO's was not published")
    seq2seq_probability: Probability = Field(0.25, description="of word pieces to be generated")
    shortest_fragment: int = Field(4, ge=1, description="fragments' lengths are uniform between these, in word pieces")
    longest_fragment: int = Field(32, ge=1)
    bidirectional_weight: float = Field(1.0, ge=0)
    seq2seq_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _fragments_fit(self) -> LanguageSection:
        if self.shortest_fragment > self.longest_fragment:
            raise ValueError(
                f"shortest_fragment {self.shortest_fragment} exceeds longest_fragment {self.longest_fragment}"
            )
        return self


class UnifiedSection(UnifiedPart):
    """Unified-modal learning: task ``unified``, which UNIMO trains."""

    contrast: ContrastSection = ContrastSection()
    visual: VisualSection = VisualSection()
    language: LanguageSection = LanguageSection()
    pair_visual_share: Probability = Field(0.5, description="of pairs whose regions are masked, not words")
