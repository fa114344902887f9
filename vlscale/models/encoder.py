"""The Transformer encoder on packed sequences, post-norm as in BERT or pre-norm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from vlscale.errors import VlscaleError
from vlscale.kernels.attention import Backend
from vlscale.models.layers import (
    Activation,
    Continuation,
    FeedForward,
    Initializer,
    InitializerKind,
    SelfAttention,
    Visibility,
)

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class EncoderConfig(BaseModel):
    """Shape of an encoder; models add what surrounds it. The defaults are BERT-base's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(768, ge=1, le=1 << 17)
    num_hidden_layers: int = Field(12, ge=1, le=1024)
    num_attention_heads: int = Field(12, ge=1)
    intermediate_size: int = Field(3072, ge=1, le=1 << 20)
    hidden_dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    layer_norm_eps: float = Field(1e-12, gt=0)
    initializer: InitializerKind = Field("normal", description="fan_in: standard deviation 1/sqrt(width)")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation, but of `fan_in`")
    norm: Literal["post", "pre"] = Field("post", description="pre: norms inside the branches and one at the end")
    attention_backend: Backend = "auto"

    @model_validator(mode="after")
    def _heads_divide(self) -> EncoderConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def weights(self) -> Initializer:
        """How weights are drawn."""
        return Initializer(self.initializer, self.initializer_range)


class EncoderLayer(nn.Module):
    """One layer. Post-norm: ``x = LN(x + drop(f(x)))``; pre-norm: ``x = x + drop(f(LN(x)))``, f attention, then FFN."""

    def __init__(self, config: EncoderConfig, activation: Activation = "gelu") -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.pre_norm = config.norm == "pre"
        self.attention = SelfAttention(
            width, config.num_attention_heads, config.attention_dropout, config.attention_backend, config.weights
        )
        self.attention_norm = nn.LayerNorm(width, eps)
        self.ffn = FeedForward(width, config.intermediate_size, config.weights, activation)
        self.ffn_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_NH: Tensor, cu: Tensor, longest: int, visibility: Visibility | None = None) -> Tensor:
        """Return [N, H]; see :class:`Encoder` for the arguments."""
        if self.pre_norm:
            seen_NH = self.attention(self.attention_norm(hidden_NH), cu, longest, visibility)
            hidden_NH = hidden_NH + self.dropout(seen_NH)
            return hidden_NH + self.dropout(self.ffn(self.ffn_norm(hidden_NH)))
        hidden_NH = self.attention_norm(hidden_NH + self.dropout(self.attention(hidden_NH, cu, longest, visibility)))
        return self.ffn_norm(hidden_NH + self.dropout(self.ffn(hidden_NH)))

    def extend(self, hidden_NH: Tensor, cache_C2AD: Tensor, step: Continuation) -> Tensor:
        """Return [N, H] of new rows, as in evaluation; see :meth:`SelfAttention.extend`."""
        if self.pre_norm:
            hidden_NH = hidden_NH + self.attention.extend(self.attention_norm(hidden_NH), cache_C2AD, step)
            return hidden_NH + self.ffn(self.ffn_norm(hidden_NH))
        hidden_NH = self.attention_norm(hidden_NH + self.attention.extend(hidden_NH, cache_C2AD, step))
        return self.ffn_norm(hidden_NH + self.ffn(hidden_NH))


class Encoder(nn.Module):
    """A stack of layers on packed rows; pre-norm stacks end in a LayerNorm."""

    def __init__(self, config: EncoderConfig, activation: Activation = "gelu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config, activation) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.norm == "pre" else None
        self.checkpoint_stride = 0

    def set_activation_checkpointing(self, policy: str) -> None:
        """Choose the layers that keep only their input and are computed again in the backward pass.

        Args:
            policy: ``none``; ``full``, every layer; ``every N``, layers 0, N, 2N, ... (``every 1`` is ``full``).

        Raises:
            VlscaleError: any other policy.
        """
        match = re.fullmatch(r"none|full|every ([1-9][0-9]*)", policy)
        if match is None:
            raise VlscaleError(f"activation_checkpointing {policy!r}: expected none, full or 'every N' (N >= 1)")
        self.checkpoint_stride = int(match[1]) if match[1] else int(policy == "full")

    def forward(
        self,
        hidden_NH: Tensor,
        cu: Tensor,
        longest: int,
        collected: list[Tensor] | None = None,
        visibility: Visibility | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            hidden_NH: float [N, H], the embeddings of all examples, one example after the other.
            cu: int32 [B+1], cumulative lengths.
            longest: largest length, as a Python number.
            collected: takes the output [N, H] of each layer (before the final LayerNorm of pre-norm) if given.
            visibility: which rows see which; None: all rows of an example see each other.

        Returns:
            float [N, H], the last layer's output, after the final LayerNorm where there is one.
        """
        for index, layer in enumerate(self.layers):
            if is_grad_enabled() and self.checkpoint_stride and index % self.checkpoint_stride == 0:
                hidden_NH = checkpoint(layer, hidden_NH, cu, longest, visibility, use_reentrant=False)
            else:
                hidden_NH = layer(hidden_NH, cu, longest, visibility)
            if collected is not None:
                collected.append(hidden_NH)
        return hidden_NH if self.final_norm is None else self.final_norm(hidden_NH)

    def extend(self, hidden_NH: Tensor, caches: Sequence[Tensor], step: Continuation) -> Tensor:
        """Run all layers on rows that continue examples of which keys and values are kept; no gradients, no dropout.

        Args:
            hidden_NH: float [N, H], the embeddings of the new rows.
            caches: of each layer float [C, 2, heads, d], keys and values, changed in place.
            step: where the new rows go, and what they see.

        Returns:
            float [N, H], as :meth:`forward`.
        """
        for layer, cache_C2AD in zip(self.layers, caches, strict=True):
            assert isinstance(layer, EncoderLayer)
            hidden_NH = layer.extend(hidden_NH, cache_C2AD, step)
        return hidden_NH if self.final_norm is None else self.final_norm(hidden_NH)
