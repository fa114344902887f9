"""Heads of region-based pre-training: pooler, word prediction, feature regression, region classification, matching.

Two heads are tied: words are predicted with the word table, features are regressed with the transposed image
projection (UNITER 3.2). A tied head holds the layer that owns the weight without registering it, so the weight stands
once in ``parameters()`` and in the state dict, and the head reads it in its own forward, which is where partitioned
training (ZeRO-3) has to gather it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlscale.models.layers import ACTIVATIONS, Activation, Embedding, Initializer, Linear


class Pooler(nn.Module):
    """``tanh(W h + b)`` of the first position of each example, [CLS]; UNIMO has relu for tanh."""

    def __init__(self, hidden: int, initializer: Initializer, activation: Literal["tanh", "relu"] = "tanh") -> None:
        super().__init__()
        self.activation = torch.tanh if activation == "tanh" else torch.relu
        self.dense = Linear(hidden, hidden, initializer)

    def forward(self, first_BH: Tensor) -> Tensor:
        """Return [B, H]."""
        return self.activation(self.dense(first_BH))


class Transform(nn.Module):
    """``LN(gelu(W h + b))``, the common first half of the heads that look at single positions."""

    def __init__(self, hidden: int, eps: float, initializer: Initializer, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.dense = Linear(hidden, hidden, initializer)
        self.norm = nn.LayerNorm(hidden, eps)

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """Return [K, H]."""
        return self.norm(self.activation(self.dense(hidden_KH)))


class WordHead(nn.Module):
    """Scores over the vocabulary, decoded with the word table."""

    def __init__(self, words: Embedding, eps: float, initializer: Initializer, activation: Activation = "gelu") -> None:
        super().__init__()
        self.transform = Transform(words.embedding_dim, eps, initializer, activation)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))
        self._words = (words,)  # in a tuple: not registered a second time

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """Return logits [K, V]."""
        return F.linear(self.transform(hidden_KH), self._words[0].weight, self.bias)


class FeatureHead(nn.Module):
    """Regresses region features with the transposed image projection."""

    def __init__(self, projection: Linear, eps: float, initializer: Initializer) -> None:
        super().__init__()
        self.transform = Transform(projection.out_features, eps, initializer)
        self.bias = nn.Parameter(torch.zeros(projection.in_features))
        self._projection = (projection,)

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """Return features [K, D]."""
        return F.linear(self.transform(hidden_KH), self._projection[0].weight.t(), self.bias)


class RegionClassifier(nn.Module):
    """Scores of a region over the detector's classes."""

    def __init__(self, hidden: int, classes: int, eps: float, initializer: Initializer) -> None:
        super().__init__()
        self.transform = Transform(hidden, eps, initializer)
        self.out = Linear(hidden, classes, initializer)

    def forward(self, hidden_KH: Tensor) -> Tensor:
        """Return logits [K, C]."""
        return self.out(self.transform(hidden_KH))


class MatchHead(Linear):
    """``w x + b``, one score, of a pooled text and a pooled image fused into x: their product, or their sum."""

    def __init__(self, hidden: int, initializer: Initializer) -> None:
        super().__init__(hidden, 1, initializer)

    def forward(
        self,
        fused_KH: Tensor,
        texts_TH: Tensor | None = None,
        fusion: Literal["mul", "sum"] = "mul",
        learn: bool = True,
    ) -> Tensor:
        """Return [K, 1]; or, with texts, [K, T], the scores of K images with each of T texts. In float32 at least.

        The head is linear, so that all fusions need not be held at once: one matrix product gives their scores.

        Args:
            fused_KH: what is fused; images, if texts are given.
            texts_TH: texts.
            fusion: read only with texts.
            learn: false: the head gets no gradient.
        """
        weight_1H, bias = (self.weight, self.bias) if learn else (self.weight.detach(), self.bias.detach())
        if weight_1H.dtype.itemsize < 4:
            weight_1H, bias = weight_1H.float(), bias.float()
        if texts_TH is None:
            return F.linear(fused_KH.to(weight_1H.dtype), weight_1H, bias)
        images_KH, texts_TH = fused_KH.to(weight_1H.dtype), texts_TH.to(weight_1H.dtype)
        if fusion == "mul":
            return F.linear(images_KH * weight_1H, texts_TH) + bias
        return F.linear(images_KH, weight_1H) + F.linear(texts_TH, weight_1H).t() + bias
