"""The CUDA backend: sm_70 and later, above all the V100, which Triton's matrix path has left behind.

The kernels of ``cuda_sources.py`` come compiled (``prebuild.py``) or are compiled by NVRTC at first use for the GPU at
hand into a cache folder, and are launched through the driver on PyTorch's current stream; nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from vlscale.kernels.ipot import nvrtc
from vlscale.kernels.ipot.checks import nvidia_problem
from vlscale.kernels.ipot.cuda_sources import WIDTH, Source, backward_kernel, size_class
from vlscale.kernels.ipot.function import Kept, Outcome, Packed, Settings
from vlscale.kernels.ipot.numerics import NORM_FLOOR


def problem(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    why = nvidia_problem(device, (7, 0))
    if why:
        return why
    try:
        if not nvrtc.is_prebuilt(_architecture(device)):
            nvrtc.version()
        _driver()
    except OSError as error:
        return str(error)
    return None


class CudaKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`: one launch forward, one backward."""

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        """Distances, plans and what the backward pass needs."""
        if not inputs.examples:
            return
        tile = size_class(settings.max_words, settings.max_regions)
        kernel = tile.forward_kernel(inputs.words.dtype, tile.needs_log_form(settings.beta))
        _launch(
            kernel, inputs.words.device, (inputs.examples, 1, 1), 32 * tile.warps,
            inputs.words, inputs.regions, inputs.cu_words, inputs.cu_regions, inputs.hidden, settings.beta,
            settings.iterations, settings.inner_iterations, NORM_FLOOR,
            settings.max_words, settings.max_regions, outcome.plan, outcome.distance, outcome.kept,
        )  # fmt: skip

    def backward(self, inputs: Packed, outcome: Outcome, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of words and regions."""
        grad_words, grad_regions = torch.empty_like(inputs.words), torch.empty_like(inputs.regions)
        _, tall, wide = outcome.plan.shape
        if inputs.examples:
            _launch(
                backward_kernel(inputs.words.dtype), inputs.words.device,
                (inputs.examples, -(-inputs.hidden // WIDTH), 2), WIDTH,
                inputs.words, inputs.regions, inputs.cu_words, inputs.cu_regions, inputs.hidden, wide, tall,
                outcome.plan, gradient, outcome.kept, grad_words, grad_regions,
            )  # fmt: skip
        return grad_words, grad_regions


class _KeptPointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("word", "region", "share_word", "share_region"))


class _Function:
    """A kernel in the driver's hands, for one device."""

    def __init__(self, cubin: bytes, name: str) -> None:
        module, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._handle), module, name.encode()), "cuModuleGetFunction")
        self._cubin = cubin

    def launch(self, grid: tuple[int, int, int], threads: int, *arguments: Tensor | int | float | Kept) -> None:
        """Launch on PyTorch's current stream. Whole numbers are ``int``, others ``float``, tensors pointers."""
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = _driver().cuLaunchKernel(self._handle, *grid, threads, 1, 1, 0, stream, pointers, None)
        _check(status, "cuLaunchKernel")


def _launch(
    source: Source,
    device: torch.device,
    grid: tuple[int, int, int],
    threads: int,
    *arguments: Tensor | int | float | Kept,
) -> None:
    with torch.cuda.device(device):
        _function(source, _architecture(device), device.index or 0).launch(grid, threads, *arguments)


@functools.cache
def _function(source: Source, architecture: str, device: int) -> _Function:
    torch.cuda.current_stream().synchronize()  # makes the primary context current in this thread
    return _Function(source.compiled(architecture).cubin, source.name)


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _argument(value: Tensor | int | float | Kept) -> Any:
    if isinstance(value, Kept):
        return _KeptPointers(*(tensor.data_ptr() for tensor in value.tensors))
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed with CUDA error {status}")
