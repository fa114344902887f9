"""Layers that initialise themselves inside their constructors, and the feed-forward and attention blocks.

Weights are drawn in ``reset_parameters``, which PyTorch calls while the layer is constructed. A model is therefore
complete as soon as it exists, which is what partitioned construction (ZeRO-3) and ``torch.manual_seed`` need.

LayerNorm: PyTorch keeps mean and variance in float32 whatever the dtype of its input and of its gain and bias, on the
CPU and on CUDA; nothing has to be converted around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vlscale.kernels.attention import attention


@dataclass(frozen=True)
class Initializer:
    """Standard deviation of the normal distribution that weights are drawn from.

    Attributes:
        kind: ``normal``, the same ``std`` everywhere (BERT); ``fan_in``, 1/sqrt(width of the input) for projections and
            1/sqrt(width of the vectors) for tables, which small models need.
        std: the standard deviation for ``normal``.
    """

    kind: Literal["normal", "fan_in"]
    std: float

    def of(self, width: int) -> float:
        """Standard deviation for a weight that is multiplied with vectors of ``width``."""
        return self.std if self.kind == "normal" else width**-0.5


class Linear(nn.Linear):
    """Projection [.., in] -> [.., out] with a normal weight and a bias of zero."""

    def __init__(self, in_features: int, out_features: int, initializer: Initializer) -> None:
        self.initializer = initializer  # reset_parameters reads it, and runs inside the next line
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        """Draw the weight; called by the constructor."""
        nn.init.normal_(self.weight, std=self.initializer.of(self.in_features))
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Table of normal vectors, int64 [..] -> [.., dim]."""

    def __init__(self, num_embeddings: int, dim: int, initializer: Initializer) -> None:
        self.initializer = initializer
        super().__init__(num_embeddings, dim)

    def reset_parameters(self) -> None:
        """Draw the table; called by the constructor."""
        nn.init.normal_(self.weight, std=self.initializer.of(self.embedding_dim))


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

    def forward(self, hidden_NH: Tensor, cu: Tensor, longest: int) -> Tensor:
        """Return [N, H]; ``cu`` int32 [B+1] bounds the examples, ``longest`` is the largest length."""
        rows, width = hidden_NH.shape
        q, k, v = self.qkv(hidden_NH).view(rows, 3, self.heads, width // self.heads).unbind(1)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(q, k, v, cu, cu, longest, longest, dropout_p=dropout, backend=self.backend)
        return self.out(mixed.reshape(rows, width))


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with the exact (erf) gelu."""

    def __init__(self, hidden: int, intermediate: int, initializer: Initializer) -> None:
        super().__init__()
        self.up = Linear(hidden, intermediate, initializer)
        self.down = Linear(intermediate, hidden, initializer)

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Return [N, H]."""
        return self.down(F.gelu(self.up(hidden_NH)))
