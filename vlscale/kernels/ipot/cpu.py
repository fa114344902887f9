"""The compiled CPU backend: ragged, multi-threaded, forward and backward (``ipot_cpu.cpp``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from vlscale.kernels.ipot import native
from vlscale.kernels.ipot.function import Kept, Settings
from vlscale.kernels.ipot.reference import NORM_FLOOR

_NAMES = {torch.float32: "float", torch.float64: "double"}


def problem(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cpu":
        return f"it is for the CPU, not for {device}"
    library, why = native.load()
    return None if library is not None else why


class CpuKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`. Half precision is computed in float32."""

    def forward(
        self, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Kept]:
        """Distances, plans and what the backward pass needs."""
        words, regions, cu_words, cu_regions = _prepared(words, regions, cu_words, cu_regions)
        examples, dtype = cu_words.numel() - 1, words.dtype
        plan = torch.empty(examples, settings.max_regions, settings.max_words, dtype=dtype)
        distance, kept = torch.empty(examples, dtype=dtype), Kept.empty(words, regions, dtype)
        _call(
            f"vlscale_ipot_forward_{_NAMES[dtype]}",
            words, regions, cu_words, cu_regions, examples, words.shape[1], settings.beta,
            _Int(settings.iterations), _Int(settings.inner_iterations), NORM_FLOOR, _Int(torch.get_num_threads()),
            settings.max_words, settings.max_regions, plan, distance,
            kept.inverse_word, kept.inverse_region, kept.share_word, kept.share_region,
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
        dtype = words.dtype
        words, regions, cu_words, cu_regions = _prepared(words, regions, cu_words, cu_regions)
        grad_words, grad_regions = torch.empty_like(words), torch.empty_like(regions)
        _call(
            f"vlscale_ipot_backward_{_NAMES[words.dtype]}",
            words, regions, cu_words, cu_regions, len(gradient), words.shape[1], _Int(torch.get_num_threads()),
            plan.shape[2], plan.shape[1], plan, gradient,
            kept.inverse_word, kept.inverse_region, kept.share_word, kept.share_region, grad_words, grad_regions,
        )  # fmt: skip
        return grad_words.to(dtype), grad_regions.to(dtype)


def transport_plan(
    cost_BTR: Tensor, word_lengths: Tensor, region_counts: Tensor, beta: float, iterations: int, inner_iterations: int
) -> Tensor:
    """Plans [B, R, T] of given costs; see :func:`vlscale.kernels.ipot.transport_plan`."""
    dtype = torch.float64 if cost_BTR.dtype == torch.float64 else torch.float32
    cost = cost_BTR.detach().to(dtype).contiguous()
    examples, wide, tall = cost.shape
    plan = torch.empty(examples, tall, wide, dtype=dtype)
    _call(
        f"vlscale_ipot_plans_{_NAMES[dtype]}",
        cost, word_lengths.long().contiguous(), region_counts.long().contiguous(), examples, wide, tall, beta,
        _Int(iterations), _Int(inner_iterations), _Int(torch.get_num_threads()), plan,
    )  # fmt: skip
    return plan


class _Int(int):
    """A C ``int``; other whole numbers are ``int64_t``."""


def _prepared(words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if words.dtype == torch.float64 else torch.float32
    return (
        words.detach().to(dtype).contiguous(),
        regions.detach().to(dtype).contiguous(),
        cu_words.long().contiguous(),
        cu_regions.long().contiguous(),
    )


def _call(name: str, *arguments: Tensor | int | float) -> None:
    library, why = native.load()
    if library is None:
        raise RuntimeError(f"IPOT's CPU kernel is not there: {why}")
    if getattr(library, name)(*map(_argument, arguments)) != 0:
        raise MemoryError("IPOT's CPU kernel ran out of memory")


def _argument(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, _Int):
        return ctypes.c_int(value)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)
