"""The compiled CPU backend: ragged, multi-threaded, forward and backward (``ipot_cpu.cpp``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from vlscale.kernels.ipot import native
from vlscale.kernels.ipot.function import Outcome, Packed, Settings, computing_dtype
from vlscale.kernels.ipot.numerics import NORM_FLOOR

_NAMES = {torch.float32: "float", torch.float64: "double"}


def problem(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cpu":
        return f"it is for the CPU, not for {device}"
    library, why = native.load()
    return None if library is not None else why


class CpuKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`. Half precision is computed in float32."""

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        """Distances, plans and what the backward pass needs."""
        dtype = outcome.plan.dtype
        _call(
            f"vlscale_ipot_forward_{_NAMES[dtype]}",
            *_widened(inputs, dtype), inputs.examples, inputs.hidden, settings.beta,
            _Int(settings.iterations), _Int(settings.inner_iterations), NORM_FLOOR, _Int(torch.get_num_threads()),
            settings.max_words, settings.max_regions, outcome.plan, outcome.distance, *outcome.kept.tensors,
        )  # fmt: skip

    def backward(self, inputs: Packed, outcome: Outcome, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of words and regions."""
        plan, given = outcome.plan, inputs.words.dtype
        words, regions, *cu = _widened(inputs, plan.dtype)
        grad_words, grad_regions = torch.empty_like(words), torch.empty_like(regions)
        _call(
            f"vlscale_ipot_backward_{_NAMES[plan.dtype]}",
            words, regions, *cu, inputs.examples, inputs.hidden, _Int(torch.get_num_threads()),
            plan.shape[2], plan.shape[1], plan, gradient, *outcome.kept.tensors, grad_words, grad_regions,
        )  # fmt: skip
        return grad_words.to(given), grad_regions.to(given)


def transport_plan(
    cost_BTR: Tensor, word_lengths: Tensor, region_counts: Tensor, beta: float, iterations: int, inner_iterations: int
) -> Tensor:
    """Plans [B, R, T] of given costs; see :func:`vlscale.kernels.ipot.transport_plan`."""
    dtype = computing_dtype(cost_BTR.dtype)
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


def _widened(inputs: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return inputs.words.to(dtype), inputs.regions.to(dtype), inputs.cu_words, inputs.cu_regions


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
