"""The table of IPOT's backends: which there are, which of them run here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from importlib import import_module

import torch
from torch import Tensor

from vlscale.errors import VlscaleError, nearest
from vlscale.kernels.ipot import reference
from vlscale.kernels.ipot.function import Kernel

BACKENDS = ("reference", "cpu", "triton", "cuda")
_MODULES = {
    "cpu": ("vlscale.kernels.ipot.cpu", "CpuKernel"),
    "triton": ("vlscale.kernels.ipot.triton_backend", "TritonKernel"),
    "cuda": ("vlscale.kernels.ipot.cuda_backend", "CudaKernel"),
}
_PREFERRED = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""By type of device, fastest first; the reference is last everywhere."""
_SIZES = {
    "triton": ("vlscale.kernels.ipot.triton_backend", "tile_of"),
    "cuda": ("vlscale.kernels.ipot.cuda_sources", "size_class"),
}
"""What chooses a kernel for the longest example, or refuses it; a backend that is not here takes any."""
_TAKE_COSTS = ("reference", "cpu", "triton")

Plan = Callable[[Tensor, Tensor, Tensor, float, int, int], Tensor]


def problem(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the backend ``name`` cannot compute on ``device`` in ``dtype``, or None."""
    if name == "reference":
        return None
    if name != "cpu" and dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    if name != "cpu" and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"PyTorch sees no GPU {device} here, it sees {torch.cuda.device_count()}"
    module = import_module(_MODULES[name][0])
    found: str | None = module.problem(device, dtype) if name == "triton" else module.problem(device)
    return found


def resolve_backend(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    max_words: int = 1,
    max_regions: int = 1,
) -> str:
    """Return the backend that ``name`` stands for; ``"auto"`` picks the fastest that runs there and takes the sizes.

    Cheap after the first call for a device and a dtype. Without a device only the name is checked.

    Args:
        name: of a backend, or ``"auto"``.
        device, dtype: of the tensors.
        max_words, max_regions: bounds of every example.

    Raises:
        VlscaleError: no backend has this name, or it does not run on the device.
        ValueError: the backend of this name does not take examples so large.
    """
    known = ("auto", *BACKENDS)
    if name not in known:
        raise VlscaleError(f"no IPOT backend {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    if device is None:
        return name
    running = _fastest(device, dtype)
    if name == "auto":
        return _first(running, max_words, max_regions)
    why = None if name in running else problem(name, device, dtype)
    if why is not None:
        raise VlscaleError(f"IPOT backend {name!r} does not run here: {why}; take 'auto'")
    too_large = _size_problem(name, max_words, max_regions)
    if too_large is not None:
        raise ValueError(too_large)
    return name


@cache
def _fastest(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    return tuple(name for name in _PREFERRED.get(device.type, ()) if problem(name, device, dtype) is None)


def _first(names: Iterable[str], max_words: int, max_regions: int) -> str:
    return next((name for name in names if _size_problem(name, max_words, max_regions) is None), "reference")


@lru_cache(maxsize=1 << 12)
def _size_problem(name: str, max_words: int, max_regions: int) -> str | None:
    if name not in _SIZES:
        return None
    module, choose = _SIZES[name]
    try:
        getattr(import_module(module), choose)(max_words, max_regions)
    except ValueError as error:
        return str(error)
    return None


@cache
def kernel(name: str) -> Kernel:
    """The kernel of a compiled backend."""
    module, attribute = _MODULES[name]
    made: Kernel = getattr(import_module(module), attribute)()
    return made


def plan_function(name: str, device: torch.device, dtype: torch.dtype, max_words: int, max_regions: int) -> Plan:
    """The function that turns costs into plans; for the arguments see :func:`resolve_backend`.

    Raises:
        VlscaleError: unknown backend, one that does not run here, or one that takes no costs.
        ValueError: the backend of this name does not take costs so large.
    """
    if name == "cuda":
        raise VlscaleError(
            f"IPOT backend 'cuda' makes its own costs; for given ones take auto, {', '.join(_TAKE_COSTS)}"
        )
    if name == "auto":
        running = (found for found in _fastest(device, dtype) if found in _TAKE_COSTS)
        name = _first(running, max_words, max_regions)
    else:
        name = resolve_backend(name, device, dtype, max_words, max_regions)
    if name == "reference":
        return reference.transport_plan
    plan: Plan = import_module(_MODULES[name][0]).transport_plan
    return plan
