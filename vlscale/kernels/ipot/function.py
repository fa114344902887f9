"""IPOT as one differentiable function over a compiled kernel: what every backend but the reference shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlscale.ragged import cumulative, owners


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
class Packed:
    """A call's tensors, contiguous and on one device.

    Attributes:
        words, regions: [Nw, H], [Nr, H] of one float dtype.
        cu_words, cu_regions: int64 [B+1].
    """

    words: Tensor
    regions: Tensor
    cu_words: Tensor
    cu_regions: Tensor

    @property
    def examples(self) -> int:
        """B."""
        return self.cu_words.numel() - 1

    @property
    def hidden(self) -> int:
        """H."""
        return self.words.shape[1]


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward pass, beside the plan; all of the computing dtype.

    Attributes:
        inverse_word, inverse_region: [Nw], [Nr], one over the (clamped) norm.
        share_word, share_region: [Nw], [Nr], sum of plan times cosine over the other side; 0 where the norm was
            clamped.
    """

    inverse_word: Tensor
    inverse_region: Tensor
    share_word: Tensor
    share_region: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in the order in which kernels take them."""
        return self.inverse_word, self.inverse_region, self.share_word, self.share_region


@dataclass(frozen=True)
class Outcome:
    """What the forward pass writes, every element of it.

    Attributes:
        plan: [B, R, T].
        distance: [B].
        kept: for the backward pass.
    """

    plan: Tensor
    distance: Tensor
    kept: Kept

    @classmethod
    def empty(cls, inputs: Packed, settings: Settings) -> Outcome:
        """Allocate; float64 inputs are computed in float64, all others in float32."""
        dtype, device = computing_dtype(inputs.words.dtype), inputs.words.device
        by_word, by_region = (
            torch.empty(2, len(rows), dtype=dtype, device=device) for rows in (inputs.words, inputs.regions)
        )
        return cls(
            torch.empty(inputs.examples, settings.max_regions, settings.max_words, dtype=dtype, device=device),
            torch.empty(inputs.examples, dtype=dtype, device=device),
            Kept(by_word[0], by_region[0], by_word[1], by_region[1]),
        )


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which inputs of ``dtype`` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Kernel(Protocol):
    """The two passes of a compiled backend.

    With g the gradient of an example's distance, T its plan, and x, y rows with norms |x|, |y|:

        dx_i = g (share_i / |x_i|^2 x_i - sum_j T_ij / (|x_i| |y_j|) y_j)

    and the same for y: the gradient of ``sum(cost * T)`` with T held fast.
    """

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        """Fill ``outcome``."""
        ...

    def backward(self, inputs: Packed, outcome: Outcome, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of words and regions, of their dtype, from the distances' [B]."""
        ...


def run(
    kernel: Kernel, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return distances [B], differentiable, and plans [B, R, T], which are not."""
    cu_words, cu_regions = (cu.long().contiguous() for cu in (cu_words, cu_regions))
    distance, plan = _Ipot.apply(words, regions, cu_words, cu_regions, kernel, settings)
    return distance, plan


def packed_rows(rows_BLH: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Return the valid rows [count, H] of padded ones, without waiting for a GPU.

    Args:
        rows_BLH: [B, L, H]; padding may hold anything.
        lengths: int [B], in 0..L.
        count: their sum, from :func:`vlscale.kernels.ipot.checks.padded_counts`.
    """
    _, most, hidden = rows_BLH.shape
    cu = cumulative(lengths).long()
    owner = owners(cu, count)
    places = owner * most + torch.arange(count, device=lengths.device) - cu[owner]
    return rows_BLH.reshape(-1, hidden).index_select(0, places)


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
        inputs = Packed(words, regions, cu_words, cu_regions)
        outcome = Outcome.empty(inputs, settings)
        kernel.forward(inputs, settings, outcome)
        ctx.kernel = kernel
        ctx.mark_non_differentiable(outcome.plan)
        ctx.save_for_backward(
            words, regions, cu_words, cu_regions, outcome.plan, outcome.distance, *outcome.kept.tensors
        )
        return outcome.distance, outcome.plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        words, regions, cu_words, cu_regions, plan, distance, *kept = ctx.saved_tensors
        found = ctx.kernel.backward(
            Packed(words, regions, cu_words, cu_regions),
            Outcome(plan, distance, Kept(*kept)),
            gradient.to(plan.dtype).contiguous(),
        )
        return *found, None, None, None, None
