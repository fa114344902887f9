"""The Triton backend: sm_80 and later."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from vlscale.kernels.ipot.checks import nvidia_problem
from vlscale.kernels.ipot.function import Outcome, Packed, Settings
from vlscale.kernels.ipot.numerics import COSINE_RANGE, NORM_FLOOR, needs_log_form

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
    why = nvidia_problem(device, (8, 0))
    return why or (None if find_spec("triton") else "triton is not installed")


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


class TritonKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`: one launch forward, one backward."""

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        """Distances, plans and what the backward pass needs."""
        from vlscale.kernels.ipot import triton_kernels

        if not inputs.examples:
            return
        wide, tall, dtype = settings.max_words, settings.max_regions, inputs.words.dtype
        tile = tile_of(wide, tall)
        with _device(inputs.words.device):
            triton_kernels.forward[(inputs.examples,)](
                inputs.words, inputs.regions, inputs.cu_words, inputs.cu_regions, inputs.hidden, settings.beta,
                settings.iterations, settings.inner_iterations, NORM_FLOOR, wide, tall,
                outcome.plan, outcome.distance, *outcome.kept.tensors,
                BLOCK_M=tile.words, BLOCK_N=tile.regions, BLOCK_H=tile.columns,
                LOG=needs_log_form(COSINE_RANGE, settings.beta, wide * tall),
                EXACT=_exact(dtype), num_warps=tile.warps, num_stages=2,
            )  # fmt: skip

    def backward(self, inputs: Packed, outcome: Outcome, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of words and regions."""
        from vlscale.kernels.ipot import triton_kernels

        grad_words, grad_regions = torch.empty_like(inputs.words), torch.empty_like(inputs.regions)
        _, tall, wide = outcome.plan.shape
        exact = _exact(inputs.words.dtype)
        tile = tile_of(wide, tall, narrow=exact)
        if inputs.examples:
            with _device(inputs.words.device):
                triton_kernels.backward[(inputs.examples, -(-inputs.hidden // tile.columns))](
                    inputs.words, inputs.regions, inputs.cu_words, inputs.cu_regions, inputs.hidden, wide, tall,
                    outcome.plan, gradient, *outcome.kept.tensors, grad_words, grad_regions,
                    BLOCK_M=tile.words, BLOCK_N=tile.regions, BLOCK_H=tile.columns,
                    EXACT=exact, num_warps=tile.warps, num_stages=1,
                )  # fmt: skip
        return grad_words, grad_regions


def _exact(dtype: torch.dtype) -> bool:
    """Whether products are of float32. (Triton's interpreter multiplies bfloat16 as if it were uint16.)"""
    import triton

    return dtype == torch.float32 or (dtype == torch.bfloat16 and triton.knobs.runtime.interpret)


def _device(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)
