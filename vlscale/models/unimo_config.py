"""UNIMO's configuration: the published English models, and the text-only ones of PaddleNLP."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from pydantic import Field, model_validator

from vlscale.models.encoder import EncoderConfig
from vlscale.models.layers import Activation, InitializerKind

UnimoHead = Literal["words", "features", "classes", "matching", "text_pooler", "image_pooler"]
UNIMO_HEADS: tuple[UnimoHead, ...] = get_args(UnimoHead)
"""Masked or generated words, regressed features, region classes, image-text matching, and the two poolers."""
_OF_IMAGES = ("features", "classes", "matching", "image_pooler")
_OF_MATCHING = ("text_pooler", "image_pooler")


class UnimoConfig(EncoderConfig):
    """Everything that decides the shape and the arithmetic of a UNIMO. The defaults are the published base model."""

    model_type: ClassVar[str] = "vlscale-unimo"

    vocab_size: int = Field(50265, ge=1, le=1 << 24)
    max_position_embeddings: int = Field(514, ge=1, le=1 << 20)
    first_position: int = Field(2, ge=0, description="row of the position table for a text's first token (RoBERTa: 2)")
    type_vocab_size: int = Field(0, ge=0, le=1 << 16, description="0: texts have no types; the batch's are not read")
    role_vocab_size: int = Field(0, ge=0, le=1 << 16, description="who speaks, for dialogue; 0: none")
    turn_vocab_size: int = Field(0, ge=0, le=1 << 16, description="turns ago, for dialogue; 0: none")
    images: bool = Field(True, description="false: a text-only model")
    feature_dim: int = Field(2048, ge=1, le=1 << 20, description="width of a region feature")
    num_classes: int = Field(1601, ge=1, le=1 << 20, description="classes of the detector, background included")
    activation: Activation = Field("gelu", description="of the feed-forward layers and the word head")
    match_fusion: Literal["mul", "sum"] = Field("mul", description="of the pooled text and image, before `matching`")
    match_dropout: float = Field(0.1, ge=0, lt=1)
    heads: tuple[UnimoHead, ...] = Field(UNIMO_HEADS, description="a fine-tuned or text-only checkpoint may lack some")
    vocab_fingerprint: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of the texts' vocabulary that the word table was trained with"
    )
    layer_norm_eps: float = Field(1e-5, gt=0)
    initializer: InitializerKind = "truncated_normal"

    @model_validator(mode="after")
    def _fits(self) -> UnimoConfig:
        if self.first_position >= self.max_position_embeddings:
            raise ValueError(
                f"first_position {self.first_position} leaves no row of max_position_embeddings "
                f"{self.max_position_embeddings}"
            )
        pictorial = [head for head in _OF_IMAGES if head in self.heads]
        if not self.images and pictorial:
            raise ValueError(f"heads has {', '.join(pictorial)}, which a model with images: false cannot have")
        lacking = [head for head in _OF_MATCHING if head not in self.heads]
        if "matching" in self.heads and lacking:
            raise ValueError(f"heads has matching, which needs {', '.join(lacking)} too")
        return self

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text, with [CLS] and [SEP]."""
        return self.max_position_embeddings - self.first_position
