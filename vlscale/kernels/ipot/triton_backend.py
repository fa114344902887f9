"""The Triton backend: sm_80 and later, and texts and images whose plan stays in registers."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from vlscale.kernels.ipot.checks import nvidia_problem
from vlscale.kernels.ipot.function import Outcome, Packed, Settings
from vlscale.kernels.ipot.numerics import COSINE_RANGE, NORM_FLOOR, PLAN_FORM_LIMITS, needs_log_form

WARPS = 8
"""Of a program, whatever its tile."""

SIZES = ((32, 64), (64, 64), (64, 128), (128, 64))
"""Words and regions of the tiles, smallest first: powers of two, as Triton wants them, few, because each is compiled at
its first use, and none so large that the registers or the shared memory of some GPU from sm_80 on would not hold it, or
that its plan would spill (``test_ipot_triton.py`` compiles all of them)."""


@dataclass(frozen=True)
class Tile:
    """How a size class is compiled.

    Attributes:
        words, regions: of the tile, one of ``SIZES``.
        columns: of a step through the hidden size.
    """

    words: int
    regions: int
    columns: int


def problem(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why this backend cannot run on ``device`` in ``dtype``, or None."""
    return (
        nvidia_problem(device, (8, 0))
        or _dtype_problem(torch.cuda.get_device_capability(device), dtype)
        or (None if find_spec("triton") else "triton is not installed")
        or _build_problem()
    )


def _dtype_problem(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    # Triton 3.6 keeps the products of these GPUs in their tensor memory, and its compiler stops at sums over them
    # ("parent layout must have at least rank >= 2"). Products in float32 do not go there.
    if capability[0] in (10, 11) and dtype != torch.float32:
        return f"Triton cannot compile its half-precision products for sm_{capability[0]}{capability[1]}"
    return None


def _build_problem() -> str | None:
    """Why Triton cannot build the C code that launches a kernel; it looks for the same compilers."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(shutil.which(compiler) for compiler in compilers):
        looked = " and ".join(compilers)
        return f"Triton needs a C compiler when it runs (looked for {looked}); install gcc or set CC"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"Triton needs Python's headers when it runs (no Python.h in {headers}); install python3-dev"
    return None


def tile_of(max_words: int, max_regions: int, narrow: bool = False) -> Tile:
    """The smallest tile that holds every example.

    Args:
        max_words, max_regions: bounds of every example.
        narrow: half the columns, for the backward pass in float32, whose products take more registers.

    Raises:
        ValueError: an example may be larger than the kernel takes.
    """
    for words, regions in SIZES:
        if max_words <= words and max_regions <= regions:
            return Tile(words, regions, columns=16 if narrow else 32)
    largest = " or ".join(f"{words} words and {regions} regions" for words, regions in SIZES[2:])
    raise ValueError(
        f"IPOT backend 'triton' takes at most {largest} of an example, got {max_words} words and {max_regions} "
        "regions; take 'auto'"
    )


class TritonKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`: one launch forward, one backward."""

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        """Distances, plans and what the backward pass needs."""
        from vlscale.kernels.ipot import triton_kernels

        wide, tall, dtype = settings.max_words, settings.max_regions, inputs.words.dtype
        tile = tile_of(wide, tall)
        if not inputs.examples:
            return
        with _device(inputs.words.device):
            triton_kernels.forward[(inputs.examples,)](
                inputs.words, inputs.regions, inputs.cu_words, inputs.cu_regions, inputs.hidden, settings.beta,
                settings.iterations, settings.inner_iterations, NORM_FLOOR, wide, tall,
                outcome.plan, outcome.distance, *outcome.kept.tensors,
                BLOCK_M=tile.words, BLOCK_N=tile.regions, BLOCK_H=tile.columns,
                LOG=needs_log_form(COSINE_RANGE, settings.beta, wide * tall),
                EXACT=_exact(dtype), num_warps=WARPS, num_stages=2,
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
                    EXACT=exact, num_warps=WARPS, num_stages=1,
                )  # fmt: skip
        return grad_words, grad_regions


def transport_plan(
    cost_BTR: Tensor,
    word_lengths: Tensor,
    region_counts: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
    inner_iterations: int = 1,
) -> Tensor:
    """Return the plans [B, R, T] of given costs in one launch; see :func:`vlscale.kernels.ipot.transport_plan`.

    Raises:
        ValueError: the cost is larger than the kernel takes.
    """
    from vlscale.kernels.ipot import triton_kernels

    examples, wide, tall = cost_BTR.shape
    tile = tile_of(wide, tall)
    plan_BRT = torch.empty(examples, tall, wide, dtype=torch.float32, device=cost_BTR.device)
    if plan_BRT.numel():
        with _device(cost_BTR.device):
            triton_kernels.plan_of_cost[(examples,)](
                cost_BTR.detach().contiguous(), word_lengths.contiguous(), region_counts.contiguous(), beta,
                iterations, inner_iterations, PLAN_FORM_LIMITS[torch.float32], wide, tall, plan_BRT,
                BLOCK_M=tile.words, BLOCK_N=tile.regions, num_warps=WARPS,
            )  # fmt: skip
    return plan_BRT


def _exact(dtype: torch.dtype) -> bool:
    """Whether products are of float32. (Triton's interpreter multiplies bfloat16 as if it were uint16.)"""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _interpreted())


def _interpreted() -> bool:  # as triton.knobs reads it, which older Tritons do not have
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _device(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)
