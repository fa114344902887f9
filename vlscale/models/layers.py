"""Layers that initialise themselves inside their constructors, and the feed-forward and attention blocks.

Weights are drawn in ``reset_parameters``, which PyTorch calls while the layer is constructed. A model is therefore
complete as soon as it exists, which is what partitioned construction (ZeRO-3) and ``torch.manual_seed`` need.

LayerNorm: PyTorch keeps mean and variance in float32 whatever the dtype of its input and of its gain and bias, on the
CPU and on CUDA; nothing has to be converted around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlscale.kernels.attention import attention

Activation = Literal["gelu", "relu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
"""``gelu`` is the exact (erf) one."""
InitializerKind = Literal["normal", "fan_in", "truncated_normal"]


@dataclass(frozen=True)
class Initializer:
    """The normal distribution that weights are drawn from.

    Attributes:
        kind: ``normal``, the same ``std`` everywhere (BERT); ``truncated_normal``, the same without what lies more than
            two standard deviations from zero (UNIMO); ``fan_in``, 1/sqrt(width of the input) for projections and
            1/sqrt(width of the vectors) for tables, which small models need.
        std: the standard deviation for ``normal`` and ``truncated_normal``.
    """

    kind: InitializerKind
    std: float

    def of(self, width: int) -> float:
        """Standard deviation for a weight that is multiplied with vectors of ``width``."""
        return width**-0.5 if self.kind == "fan_in" else self.std

    def draw(self, weight: Tensor, width: int) -> None:
        """Fill a weight that is multiplied with vectors of ``width``."""
        std = self.of(width)
        if self.kind == "truncated_normal":
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.normal_(weight, std=std)


@dataclass(frozen=True)
class Visibility:
    """Examples of which the first rows, the source, see each other, and the others, the target, see what precedes them.

    That is sequence-to-sequence attention: the source never sees the target, a target row sees the whole source, the
    target before it and itself.

    Attributes:
        source: int64 [Ns], the packed rows of all sources.
        cu_source: int32 [B+1], cumulative source lengths; a source may be empty.
        longest_source: the largest one.
        target: int64 [Nt], the packed rows of all targets.
        cu_target: int32 [B+1], cumulative target lengths; a target may be empty.
        longest_target: the largest one.
    """

    source: Tensor
    cu_source: Tensor
    longest_source: int
    target: Tensor
    cu_target: Tensor
    longest_target: int


@dataclass(frozen=True)
class Continuation:
    """New rows, and the rows of a cache of keys and values that they see: what decoding one token after another needs.

    Attributes:
        slots: int64 [N], where in the cache the new rows' keys and values go; no slot twice.
        seen: int64 [M], rows of the cache, those of the first example, of the second, ...: each example's new rows see
            these, which include themselves. None: the new rows of an example see each other, and nothing else.
        cu_new: int32 [B+1], cumulative counts of new rows; longest_new: the largest count.
        cu_seen: int32 [B+1], cumulative counts of rows seen; longest_seen: the largest count.
        causal: the last new row of an example sees all of them, the row before it one fewer, and so on.
    """

    slots: Tensor
    seen: Tensor | None
    cu_new: Tensor
    longest_new: int
    cu_seen: Tensor
    longest_seen: int
    causal: bool = False


class Linear(nn.Linear):
    """Projection [.., in] -> [.., out] with a normal weight and a bias of zero."""

    def __init__(self, in_features: int, out_features: int, initializer: Initializer) -> None:
        self.initializer = initializer  # reset_parameters reads it, and runs inside the next line
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw the weight; called by the constructor."""
        self.initializer.draw(self.weight, self.in_features)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Table of normal vectors, int64 [..] -> [.., dim]."""

    def __init__(self, num_embeddings: int, dim: int, initializer: Initializer) -> None:
        self.initializer = initializer
        super().__init__(num_embeddings, dim)

    def reset_parameters(self) -> None:
        """Draw the table; called by the constructor."""
        self.initializer.draw(self.weight, self.embedding_dim)


class SelfAttention(nn.Module):
    """Multi-head self-attention on packed rows, with one projection for queries, keys and values.

    ``qkv.weight`` [3H, H] holds the rows of query, key and value, in this order.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, backend: str, initializer: Initializer) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.backend = backend
        self.qkv = Linear(hidden, 3 * hidden, initializer)
        self.out = Linear(hidden, hidden, initializer)

    def forward(self, hidden_NH: Tensor, cu: Tensor, longest: int, visibility: Visibility | None = None) -> Tensor:
        """Return [N, H]; ``cu`` int32 [B+1] bounds the examples, ``longest`` is the largest length.

        Without ``visibility`` every row sees its whole example.
        """
        rows, width = hidden_NH.shape
        q, k, v = self.qkv(hidden_NH).view(rows, 3, self.heads, width // self.heads).unbind(1)
        if visibility is None:
            dropout = self.dropout if self.training else 0.0
            mixed = attention(q, k, v, cu, cu, longest, longest, dropout_p=dropout, backend=self.backend)
        else:
            mixed = self._see(q, k, v, cu, longest, visibility)
        return self.out(mixed.reshape(rows, width))

    def extend(self, hidden_NH: Tensor, cache_C2AD: Tensor, step: Continuation) -> Tensor:
        """Return [N, H] of new rows; their keys and values are written into the cache. Without dropout and gradients.

        Args:
            hidden_NH: float [N, H], the new rows.
            cache_C2AD: float [C, 2, heads, d], keys and values of C rows, changed in place.
            step: where they go and what they see.
        """
        rows, width = hidden_NH.shape
        qkv = self.qkv(hidden_NH).view(rows, 3, self.heads, width // self.heads)
        cache_C2AD.index_copy_(0, step.slots, qkv[:, 1:])
        seen_M2AD = qkv[:, 1:] if step.seen is None else cache_C2AD.index_select(0, step.seen)
        k, v = seen_M2AD.unbind(1)
        mixed = attention(
            qkv[:, 0], k, v, step.cu_new, step.cu_seen, step.longest_new, step.longest_seen, step.causal,
            backend=self.backend,
        )  # fmt: skip
        return self.out(mixed.reshape(rows, width))

    def _see(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, seen: Visibility) -> Tensor:
        """Two calls: source to source, then target to source and target, causal from the end of both."""
        dropout = self.dropout if self.training else 0.0
        q_S, k_S, v_S = (x.index_select(0, seen.source) for x in (q, k, v))
        cu_S, longest_S = seen.cu_source, seen.longest_source
        source_SAD = attention(q_S, k_S, v_S, cu_S, cu_S, longest_S, longest_S, dropout_p=dropout, backend=self.backend)
        q_T, cu_T, longest_T = q.index_select(0, seen.target), seen.cu_target, seen.longest_target
        target_TAD = attention(
            q_T, k, v, cu_T, cu, longest_T, longest, causal=True, dropout_p=dropout, backend=self.backend
        )
        return torch.empty_like(q).index_copy(0, seen.source, source_SAD).index_copy(0, seen.target, target_TAD)


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with the exact (erf) gelu, or another activation."""

    def __init__(
        self, hidden: int, intermediate: int, initializer: Initializer, activation: Activation = "gelu"
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = Linear(hidden, intermediate, initializer)
        self.down = Linear(intermediate, hidden, initializer)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return [N, H]."""
        return self.down(self.activation(self.up(hidden_NH)))
