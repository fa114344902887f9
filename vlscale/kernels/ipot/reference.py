"""IPOT in plain PyTorch: the backend that every other one is measured against.

Inexact proximal point method for optimal transport (Xie, Wang, Wang, Zha, "A Fast Proximal Point Method for Computing
Exact Wasserstein Distance", UAI 2019, algorithm 1), with cosine cost, uniform marginals over the valid words and
regions of each example, and a detached plan, as UNITER uses it (appendix A.2 of arXiv 1909.11740).

With ``A = exp(-C^T / beta)``, ``T = 1`` and ``sigma = 1/m`` (m words, n regions), each outer iteration does
``Q = A * T;  delta = 1 / (n Q sigma);  sigma = 1 / (m Q^T delta);  T = diag(delta) Q diag(sigma)``. The last
``sigma`` is carried over to the next outer iteration. Two equivalent forms are used:

* the plan form above, fast, safe while ``(max C - min C) / beta + ln(m n)`` stays well inside the exponent's range;
* a potential (log) form, ``T_t = exp(F_t + G_t - t C^T / beta)``, which keeps two vectors only and cannot underflow.

Padding is cut away by selection, never by multiplication, so NaN and Inf in padded places do not spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlscale.kernels.ipot.function import Settings, computing_dtype
from vlscale.kernels.ipot.numerics import COSINE_RANGE, NORM_FLOOR, needs_log_form
from vlscale.ragged import owners


def ipot_packed(
    words: Tensor,
    regions: Tensor,
    cu_words: Tensor,
    cu_regions: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Return distances [B] and plans [B, R, T] of packed words [Nw, H] and regions [Nr, H].

    See :func:`vlscale.kernels.ipot.ipot_distance`.
    """
    return ipot_padded(
        _pad(words, cu_words, settings.max_words),
        _pad(regions, cu_regions, settings.max_regions),
        cu_words.diff(),
        cu_regions.diff(),
        settings,
    )


def ipot_padded(
    words_BTH: Tensor,
    regions_BRH: Tensor,
    word_lengths: Tensor,
    region_counts: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Return distances [B] and plans [B, R, T]; the twin of :func:`ipot_packed` for padded tensors."""
    with torch.autocast(words_BTH.device.type, enabled=False):
        cost_BTR = cosine_cost(words_BTH, regions_BRH, word_lengths, region_counts)
        plan_BRT = transport_plan(
            cost_BTR,
            word_lengths,
            region_counts,
            settings.beta,
            settings.iterations,
            settings.inner_iterations,
            cost_range=COSINE_RANGE,
        )
        return (cost_BTR * plan_BRT.transpose(1, 2)).sum((1, 2)), plan_BRT


def cosine_cost(words_BTH: Tensor, regions_BRH: Tensor, word_lengths: Tensor, region_counts: Tensor) -> Tensor:
    """Return the cost [B, T, R], one minus the cosine, zero at padding; float32 (float64 for float64 inputs).

    Half-precision inputs are not rounded again: their raw dot products are accumulated in float32 and divided by
    float32 norms.
    """
    dtype = computing_dtype(words_BTH.dtype)
    word_BT, region_BR = valid(word_lengths, words_BTH.shape[1]), valid(region_counts, regions_BRH.shape[1])
    words = torch.where(word_BT[..., None], words_BTH, 0).to(dtype)
    regions = torch.where(region_BR[..., None], regions_BRH, 0).to(dtype)
    word_norm_BT = torch.linalg.vector_norm(words, dim=-1).clamp_min(NORM_FLOOR)
    region_norm_BR = torch.linalg.vector_norm(regions, dim=-1).clamp_min(NORM_FLOOR)
    dots_BTR = _Product.apply(words, regions.transpose(1, 2))
    cost_BTR = 1 - dots_BTR / word_norm_BT[:, :, None] / region_norm_BR[:, None, :]
    return torch.where(word_BT[:, :, None] & region_BR[:, None, :], cost_BTR, 0)


@torch.no_grad()
def transport_plan(
    cost_BTR: Tensor,
    word_lengths: Tensor,
    region_counts: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
    cost_range: float | None = None,
) -> Tensor:
    """Return the transport plans [B, R, T] of given costs, detached; zero at padding and in examples without a side.

    Each word's column sums to 1/m exactly; each region's row sums to 1/n only approximately at a finite number of
    iterations.

    Args:
        cost_BTR: [B, T, R] cost of moving a word to a region; padding may hold anything.
        word_lengths: int [B], m of each example.
        region_counts: int [B], n of each example.
        beta: proximal step; smaller is sharper, and below about 0.03 the log form is used.
        iterations: outer iterations.
        inner_iterations: updates of (delta, sigma) per outer iteration (k in the paper).
        cost_range: a known bound on max C - min C; without it the costs are looked at (one device synchronisation).
    """
    dtype = computing_dtype(cost_BTR.dtype)
    word_BT, region_BR = valid(word_lengths, cost_BTR.shape[1]), valid(region_counts, cost_BTR.shape[2])
    valid_BRT = region_BR[:, :, None] & word_BT[:, None, :]
    if valid_BRT.numel() == 0:
        return torch.zeros(valid_BRT.shape, dtype=dtype, device=cost_BTR.device)
    cost_BRT = cost_BTR.detach().transpose(1, 2).to(dtype)
    # A constant per region does not change the plan, and its minimum puts a 1 into every row of A.
    lowest_BR1 = torch.where(valid_BRT, cost_BRT, math.inf).amin(2, keepdim=True)
    logits_BRT = torch.where(valid_BRT, (lowest_BR1 - cost_BRT) / beta, -math.inf)
    if cost_range is None:
        cost_range = _widest(cost_BRT, valid_BRT)
    form = _log_form if needs_log_form(cost_range, beta, valid_BRT[0].numel(), dtype) else _plan_form
    with torch.autocast(cost_BTR.device.type, enabled=False), _full_precision_products():
        return form(logits_BRT, valid_BRT, word_BT, region_BR, iterations, inner_iterations)


def _plan_form(
    logits_BRT: Tensor, valid_BRT: Tensor, word_BT: Tensor, region_BR: Tensor, iterations: int, inner_iterations: int
) -> Tensor:
    kernel_BRT = logits_BRT.exp()  # exactly zero at padding
    plan_BRT = valid_BRT.to(logits_BRT.dtype)
    words_B11 = word_BT.sum(1).to(plan_BRT.dtype)[:, None, None]
    regions_B11 = region_BR.sum(1).to(plan_BRT.dtype)[:, None, None]
    word_B1T, region_B1R = word_BT[:, None, :], region_BR[:, None, :]
    on_cpu, smallest = plan_BRT.device.type == "cpu", 1e3 * torch.finfo(plan_BRT.dtype).tiny
    # An example without words or regions has no valid entry: its divisions by zero are selected away.
    sigma_B1T = torch.where(word_B1T, 1 / words_B11, 0)
    delta_B1R = torch.zeros_like(region_B1R, dtype=plan_BRT.dtype)
    for _ in range(iterations):
        plan_BRT.mul_(kernel_BRT)
        if on_cpu:  # what fades out of the plan would end in subnormal numbers, which a CPU computes very slowly
            torch.threshold_(plan_BRT, smallest, 0.0)
        for _ in range(inner_iterations):
            row_sums_B1R = torch.bmm(plan_BRT, sigma_B1T.transpose(1, 2)).transpose(1, 2)
            delta_B1R = torch.where(region_B1R, 1 / (regions_B11 * row_sums_B1R), 0)
            sigma_B1T = torch.where(word_B1T, 1 / (words_B11 * torch.bmm(delta_B1R, plan_BRT)), 0)
        plan_BRT.mul_(delta_B1R.transpose(1, 2)).mul_(sigma_B1T)
    return torch.where(valid_BRT, plan_BRT, 0)


def _log_form(
    logits_BRT: Tensor, valid_BRT: Tensor, word_BT: Tensor, region_BR: Tensor, iterations: int, inner_iterations: int
) -> Tensor:
    word_B1T, region_BR1 = word_BT[:, None, :], region_BR[:, :, None]
    log_words_B11 = word_BT.sum(1).to(logits_BRT.dtype).log()[:, None, None]
    log_regions_B11 = region_BR.sum(1).to(logits_BRT.dtype).log()[:, None, None]
    word_potential_B1T = torch.where(word_B1T, torch.zeros_like(logits_BRT[:, :1]), -math.inf)
    log_sigma_B1T = torch.where(word_B1T, -log_words_B11, 0)
    region_potential_BR1 = torch.zeros_like(logits_BRT[:, :, :1])
    for step in range(1, iterations + 1):
        scaled_BRT = step * logits_BRT
        ahead_B1T = word_potential_B1T + log_sigma_B1T
        for _ in range(inner_iterations):
            region_potential_BR1 = -log_regions_B11 - (ahead_B1T + scaled_BRT).logsumexp(2, keepdim=True)
            region_potential_BR1 = torch.where(region_BR1, region_potential_BR1, -math.inf)
            ahead_B1T = -log_words_B11 - (region_potential_BR1 + scaled_BRT).logsumexp(1, keepdim=True)
            ahead_B1T = torch.where(word_B1T, ahead_B1T, -math.inf)
        log_sigma_B1T = torch.where(word_B1T, ahead_B1T - word_potential_B1T, 0)
        word_potential_B1T = ahead_B1T
    log_plan_BRT = region_potential_BR1 + word_potential_B1T + iterations * logits_BRT
    plan_BRT = torch.where(valid_BRT, log_plan_BRT.exp(), 0)
    # Potentials grow with the iterations, and their rounding with them: restore the words' marginal, which is exact.
    mass_B1T = plan_BRT.sum(1, keepdim=True) * log_words_B11.exp()
    return torch.where(valid_BRT, plan_BRT / mass_B1T, 0)


def valid(lengths: Tensor, width: int) -> Tensor:
    """Return bool [B, width], True in front of each length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def _widest(cost_BRT: Tensor, valid_BRT: Tensor) -> float:
    """Return the largest max C - min C of any example."""
    highest_B = torch.where(valid_BRT, cost_BRT, -math.inf).amax((1, 2))
    lowest_B = torch.where(valid_BRT, cost_BRT, math.inf).amin((1, 2))
    return torch.where(valid_BRT.any(2).any(1), highest_B - lowest_B, 0).max().item()


def _pad(packed: Tensor, cu: Tensor, width: int) -> Tensor:
    """Return [B, width, H], packed [N, H] rows laid out in one scatter, zero elsewhere."""
    examples = cu.numel() - 1
    owner = owners(cu, packed.shape[0])
    within = torch.arange(packed.shape[0], device=packed.device) - cu.long()[owner]
    padded = packed.new_zeros(examples * width, packed.shape[1])
    return padded.index_copy(0, owner * width + within, packed).view(examples, width, packed.shape[1])


class _Product(torch.autograd.Function):
    """A batched product that stays in full precision in its backward pass too, whatever the user's setting is then."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with _full_precision_products():
            return torch.bmm(left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        return (
            _Product.apply(gradient, right.transpose(1, 2)) if ctx.needs_input_grad[0] else None,
            _Product.apply(left.transpose(1, 2), gradient) if ctx.needs_input_grad[1] else None,
        )


@contextmanager
def _full_precision_products() -> Iterator[None]:
    """Keep float32 products in float32: TF32 and bfloat16 shortcuts move the plan by a thousand times its error."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
