"""The recipe's sections of UNITER's objectives (Chen et al., ECCV 2020, section 3.2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlscale.config_values import Probability, Section


class MlmSection(Section):
    """Masked language modelling: 80 % [MASK], 10 % random, 10 % kept among the chosen word pieces (UNITER 3.2).

    Every segment of a text (of most texts: the text) has at least one chosen word piece.
    """

    probability: Probability = 0.15
    content_probability: Probability | None = Field(
        None, description="for words not in function_words; default: as above"
    )
    function_words: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _function_words_matter(self) -> MlmSection:
        if self.function_words and self.content_probability is None:
            raise ValueError("function_words have no effect without content_probability: set it, or drop them")
        return self


class MrmSection(Section):
    """Masked region modelling (mrfr, mrc, mrckl)."""

    probability: Probability = 0.15
    background_class: int | None = Field(None, ge=0, description="class that is never a target of mrc (UNITER: 0)")


class ItmSection(Section):
    """Image-text matching."""

    negative_probability: Probability = 0.5
    replace: Literal["image", "text", "both"] = Field(
        "image", description="what a negative swaps; both: a coin decides"
    )


class WraSection(Section):
    """Word-region alignment by optimal transport (IPOT), inside itm."""

    loss: Literal["off", "reference", "hinge"] = Field(
        "reference", description="reference: (positives - negatives) / examples; hinge: over pairs of a group"
    )
    weight: float = Field(0.1, ge=0)
    tokens: Literal["all", "words"] = Field("all", description="all, or words: without [CLS] and [SEP]")
    margin: float = Field(0.2, ge=0, description="hinge only")
    group: int = Field(16, ge=2, description="hinge only: positives meet the negatives of their group")
    beta: float = Field(0.5, gt=0)
    iterations: int = Field(50, ge=1)
    backend: str = "auto"
