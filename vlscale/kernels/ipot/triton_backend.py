"""The Triton backend: sm_80 and later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from vlscale.kernels.ipot.cuda_backend import PLAN_FORM_LIMIT
from vlscale.kernels.ipot.function import Kept, Settings
from vlscale.kernels.ipot.reference import COSINE_RANGE, NORM_FLOOR

MOST_ELEMENTS = 512 * 128
"""Of a tile; up to 128 x 128 it lies in registers."""


@dataclass(frozen=True)
class Tile:
    """How a size class is compiled.

    Attributes:
        words, regions: of the tile, powers of two and at least 16, as matrix products need it.
        columns: of a step through the hidden size.
        warps: of a program.
    """

    words: int
    regions: int
    columns: int
    warps: int


def problem(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, not for {device}"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, this PyTorch is for AMD's"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs sm_80 or later"
    return None if find_spec("triton") else "triton is not installed"


def tile_of(max_words: int, max_regions: int, narrow: bool = False) -> Tile:
    """The tile for the longest example.

    Warps and columns are those that spill no register for sm_80 and sm_90 up to 64 x 128 elements, and fewest beyond
    (``test_ipot_triton.py`` asserts it).

    Args:
        max_words, max_regions: bounds of every example.
        narrow: half the columns, for the backward pass in float32, whose products take more registers.

    Raises:
        ValueError: an example may be larger than the kernel takes.
    """
    words, regions = (max(16, 1 << (bound - 1).bit_length()) for bound in (max_words, max_regions))
    if words * regions > MOST_ELEMENTS:
        raise ValueError(
            f"IPOT backend 'triton' takes at most {MOST_ELEMENTS} pairs of a word and a region, got {max_words} words "
            f"and {max_regions} regions; take backend 'cuda' or 'reference'"
        )
    large = words * regions > 128 * 128
    return Tile(words, regions, columns=16 if large or narrow else 32, warps=16 if large else 8)


def needs_log_form(beta: float, max_words: int, max_regions: int) -> bool:
    """Whether cosine costs may be too wide for the plan form in float32."""
    return COSINE_RANGE / beta + math.log(max_words * max_regions) >= PLAN_FORM_LIMIT


class TritonKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`: one launch forward, one backward."""

    def forward(
        self, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Kept]:
        """Distances, plans and what the backward pass needs."""
        from vlscale.kernels.ipot import triton_kernels

        examples, device = cu_words.numel() - 1, words.device
        tile = tile_of(settings.max_words, settings.max_regions)
        plan = torch.empty(examples, settings.max_regions, settings.max_words, device=device)
        distance, kept = torch.empty(examples, device=device), Kept.empty(words, regions, torch.float32)
        if examples:
            with _device(device):
                triton_kernels.forward[(examples,)](
                    words, regions, cu_words.long(), cu_regions.long(), words.shape[1], settings.beta,
                    settings.iterations, settings.inner_iterations, NORM_FLOOR, settings.max_words,
                    settings.max_regions, plan, distance,
                    kept.inverse_word, kept.inverse_region, kept.share_word, kept.share_region,
                    BLOCK_M=tile.words, BLOCK_N=tile.regions, BLOCK_H=tile.columns,
                    LOG=needs_log_form(settings.beta, settings.max_words, settings.max_regions),
                    EXACT=_exact(words.dtype), num_warps=tile.warps, num_stages=2,
                )  # fmt: skip
        return distance, plan, kept

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
        """Gradients of words and regions."""
        from vlscale.kernels.ipot import triton_kernels

        grad_words, grad_regions = torch.empty_like(words), torch.empty_like(regions)
        tile = tile_of(plan.shape[2], plan.shape[1], narrow=_exact(words.dtype))
        if len(gradient):
            with _device(words.device):
                triton_kernels.backward[(len(gradient), -(-words.shape[1] // tile.columns))](
                    words, regions, cu_words.long(), cu_regions.long(), words.shape[1], plan.shape[2], plan.shape[1],
                    plan, gradient, kept.inverse_word, kept.inverse_region, kept.share_word, kept.share_region,
                    grad_words, grad_regions,
                    BLOCK_M=tile.words, BLOCK_N=tile.regions, BLOCK_H=tile.columns,
                    EXACT=_exact(words.dtype), num_warps=tile.warps, num_stages=1,
                )  # fmt: skip
        return grad_words, grad_regions


def _exact(dtype: torch.dtype) -> bool:
    """Whether products are of float32. (Triton's interpreter multiplies bfloat16 as if it were uint16.)"""
    import triton

    return dtype == torch.float32 or (dtype == torch.bfloat16 and triton.knobs.runtime.interpret)


def _device(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)
