"""The table of IPOT's backends: which there are, which of them run here, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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

Plan = Callable[[Tensor, Tensor, Tensor, float, int, int], Tensor]


def problem(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the backend ``name`` cannot compute on ``device`` in ``dtype``, or None."""
    if name == "reference":
        return None
    if name != "cpu" and dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    found: str | None = import_module(_MODULES[name][0]).problem(device)
    return found


def resolve_backend(name: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> str:
    """Return the backend that ``name`` stands for on ``device``; ``"auto"`` picks the fastest one that runs there.

    Without a device only the name is checked.

    Raises:
        VlscaleError: no backend has this name, or it does not run on the device.
    """
    known = ("auto", *BACKENDS)
    if name not in known:
        raise VlscaleError(f"no IPOT backend {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    if device is None:
        return name
    if name == "auto":
        return _fastest(device, dtype)
    why = problem(name, device, dtype)
    if why is not None:
        raise VlscaleError(f"IPOT backend {name!r} does not run here: {why}; take 'auto'")
    return name


@cache
def _fastest(device: torch.device, dtype: torch.dtype) -> str:
    running = (name for name in _PREFERRED.get(device.type, ()) if problem(name, device, dtype) is None)
    return next(running, "reference")


@cache
def kernel(name: str) -> Kernel:
    """The kernel of a compiled backend."""
    module, attribute = _MODULES[name]
    made: Kernel = getattr(import_module(module), attribute)()
    return made


def plan_function(name: str, device: torch.device, dtype: torch.dtype) -> Plan:
    """The function that turns costs into plans.

    Raises:
        VlscaleError: unknown backend, one that does not run here, or one that takes no costs.
    """
    if name in ("triton", "cuda"):
        raise VlscaleError(f"IPOT backend {name!r} makes its own costs; for given ones take auto, reference or cpu")
    if device.type == "cpu" and resolve_backend(name, device, dtype) == "cpu":
        plan: Plan = import_module(_MODULES["cpu"][0]).transport_plan
        return plan
    resolve_backend(name, device, dtype)
    return reference.transport_plan
