"""The recipe's section of UNIMO's objectives: contrast, visual learning, language learning (UNIMO, sections 2.2 - 2.4).

The defaults are the published values where there are any. What was never published has a default that says so.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlscale.config_values import Positive, Probability, Section


class ContrastSection(Section):
    """Cross-modal contrastive learning (CMCL): views of a pair, drawn anew in each pass.

    How many views are drawn per step, the similarity and the temperature were never published.
    """

    weight: float = Field(1.0, ge=0, description="0: pairs have no views")
    similarity: Literal["mul_fc", "dot", "cosine"] = Field(
        "mul_fc", description="of the pooled [IMG] and [CLS]; mul_fc: the match head on their product"
    )
    temperature: Positive = Field(
        1.0, description="of cosine, whose scores lie in 0..1 (ReLU pools): a small one, such as 0.07"
    )
    positives: int = Field(1, ge=0, le=64, description="captions that say the same, of ROOT/rewrites")
    negatives: int = Field(4, ge=0, le=256, description="captions that are not true, of ROOT/rewrites")
    images: int = Field(1, ge=0, le=256, description="retrieved images, of ROOT/retrieved")
    texts: int = Field(1, ge=0, le=256, description="retrieved texts, of ROOT/retrieved")
    window: bool = Field(
        False, description="the images and captions of all other pairs of the step are negatives too (a second forward)"
    )
    window_loss: Literal["shared", "own"] = Field(
        "shared",
        description="shared: they stand in the one sum of the formula, which a pair encoded together can answer for; "
        "own: in a sum of their own, with the pair's image and caption encoded apart",
    )

    @model_validator(mode="after")
    def _window_loss_matters(self) -> ContrastSection:
        if self.window_loss != "shared" and not self.window:
            raise ValueError("window_loss has an effect with window: true only: set that, or drop it")
        return self

    @property
    def alone(self) -> bool:
        """Whether a pair's image and caption are also encoded by themselves."""
        return self.window or self.images > 0 or self.texts > 0


class VisualSection(Section):
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

    @model_validator(mode="after")
    def _background_matters(self) -> VisualSection:
        if self.background_class is not None and self.labels != "hard":
            raise ValueError("background_class has an effect with labels: hard only: set that, or drop it")
        return self


class LanguageSection(Section):
    """Masked spans, and generated fragments; each text is one or the other."""

    units: bool = Field(True, description="mask whole units of ROOT/units (data_tools.find_units); false: whole words")
    seq2seq_share: Probability = Field(0.5, description="of texts, and of captions, that are generated")
    probability: Probability = Field(0.15, description="of word pieces to be masked")
    geometric: Probability = Field(0.2, description="lengths of spans are geometric with this p (SpanBERT)")
    longest_span: int = Field(
        10, ge=1, description="word pieces of the longest span, rounded up to whole units; UNIMO's was not published"
    )
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


class UnifiedSection(Section):
    """Unified-modal learning: task ``unified``, which UNIMO trains."""

    contrast: ContrastSection = ContrastSection()
    visual: VisualSection = VisualSection()
    language: LanguageSection = LanguageSection()
    pair_visual_share: Probability = Field(0.5, description="of pairs whose regions are masked, not words")

    def check_learnable(self) -> None:
        """Look whether there is anything to learn.

        Raises:
            ValueError: every weight is 0; or all candidates of the contrast are true, so its loss would be constant.
        """
        visual, language, contrast = self.visual, self.language, self.contrast
        masked = (visual.feature_weight, visual.class_weight, language.bidirectional_weight, language.seq2seq_weight)
        if not any((contrast.weight, *masked)):
            raise ValueError("objectives.unified: every weight is 0, so nothing would be trained: raise one")
        if contrast.weight and not contrast.negatives and not contrast.window:
            raise ValueError(
                "objectives.unified.contrast has positives alone, so its loss would be constant: set negatives or "
                "window: true, or weight: 0"
            )
