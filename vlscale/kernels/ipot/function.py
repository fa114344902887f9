"""IPOT as one differentiable function over a compiled kernel: what every backend but the reference shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Settings:
    """What a call asks for, beside its tensors.

    Attributes:
        beta, iterations, inner_iterations: of IPOT.
        max_words, max_regions: sides of the padded plan; no example is longer.
    """

    beta: float
    iterations: int
    inner_iterations: int
    max_words: int
    max_regions: int


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward pass, all of the computing dtype.

    Attributes:
        inverse_word, inverse_region: [Nw], [Nr], one over the (clamped) norm.
        share_word, share_region: [Nw], [Nr], sum of plan times cosine over the other side; 0 where the norm was
            clamped.
    """

    inverse_word: Tensor
    inverse_region: Tensor
    share_word: Tensor
    share_region: Tensor

    @classmethod
    def empty(cls, words: Tensor, regions: Tensor, dtype: torch.dtype) -> Kept:
        """Allocate for packed ``words`` [Nw, H] and ``regions`` [Nr, H]."""
        by_word = torch.empty(2, words.shape[0], dtype=dtype, device=words.device)
        by_region = torch.empty(2, regions.shape[0], dtype=dtype, device=regions.device)
        return cls(by_word[0], by_region[0], by_word[1], by_region[1])


class Kernel(Protocol):
    """The two passes of a compiled backend, on packed and contiguous tensors.

    With g the gradient of an example's distance, T its plan, and x, y rows with norms |x|, |y|:

        dx_i = g (share_i / |x_i|^2 x_i - sum_j T_ij / (|x_i| |y_j|) y_j)

    and the same for y: the gradient of ``sum(cost * T)`` with T held fast.
    """

    def forward(
        self, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Kept]:
        """Return distances [B], plans [B, R, T] and what :meth:`backward` needs."""
        ...

    def backward(
        self,
        words: Tensor,
        regions: Tensor,
        cu_words: Tensor,
        cu_regions: Tensor,
        plan: Tensor,
        kept: Kept,
        gradient: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of words and regions, of their dtypes, from the distances' [B]."""
        ...


def run(
    kernel: Kernel, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return distances [B], differentiable, and plans [B, R, T], which are not."""
    distance, plan = _Ipot.apply(words.contiguous(), regions.contiguous(), cu_words, cu_regions, kernel, settings)
    return distance, plan


class _Ipot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        words: Tensor,
        regions: Tensor,
        cu_words: Tensor,
        cu_regions: Tensor,
        kernel: Kernel,
        settings: Settings,
    ) -> tuple[Tensor, Tensor]:
        distance, plan, kept = kernel.forward(words, regions, cu_words, cu_regions, settings)
        ctx.kernel = kernel
        ctx.mark_non_differentiable(plan)
        ctx.save_for_backward(
            words, regions, cu_words, cu_regions, plan,
            kept.inverse_word, kept.inverse_region, kept.share_word, kept.share_region,
        )  # fmt: skip
        return distance, plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        words, regions, cu_words, cu_regions, plan, *kept = ctx.saved_tensors
        found = ctx.kernel.backward(
            words, regions, cu_words, cu_regions, plan, Kept(*kept), gradient.to(plan.dtype).contiguous()
        )
        return *found, None, None, None, None
