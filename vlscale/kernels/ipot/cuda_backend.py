"""The CUDA backend: sm_70 and later, above all the V100, which Triton's matrix path has left behind.

The kernels of ``cuda_sources.py`` come compiled (``prebuild.py``) or are compiled by NVRTC at first use for the GPU at
hand into a cache folder, and are launched through the driver on PyTorch's current stream; nothing waits for the GPU.
Loading a kernel is no work of a stream, so call each size once before capturing a graph.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlscale.kernels.ipot import nvrtc
from vlscale.kernels.ipot.checks import nvidia_problem
from vlscale.kernels.ipot.cuda_sources import WIDTH, Source, backward_kernel, is_prebuilt, size_class
from vlscale.kernels.ipot.function import Kept, Outcome, Packed, Settings
from vlscale.kernels.ipot.numerics import NORM_FLOOR

Argument = Tensor | int | float | Kept
"""Of a kernel."""


def problem(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    why = nvidia_problem(device, (7, 0))
    if why:
        return why
    return _cannot_load(_architecture(device))


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


@functools.cache
def _cannot_load(architecture: str) -> str | None:
    """Why kernels for ``architecture`` are not to be had, or None; asked once, as it reads files."""
    try:
        if not is_prebuilt(architecture):
            nvrtc.target(architecture)
        _driver()
    except OSError as error:
        return str(error)
    return None


class _KeptPointers(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("word", "region", "share_word", "share_region"))


class _Function:
    """A kernel in the driver's hands, for one device, whose context is current."""

    def __init__(self, cubin: bytes, name: str) -> None:
        module, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._handle), module, name.encode()), "cuModuleGetFunction")
        self._cubin = cubin

    def launch(self, grid: tuple[int, int, int], threads: int, stream: int, arguments: ctypes.Array[Any]) -> None:
        """Launch with ``arguments`` as :func:`pointers` gives them."""
        status = _driver().cuLaunchKernel(
            self._handle, *grid, threads, 1, 1, 0, ctypes.c_void_p(stream), arguments, None
        )
        _check(status, "cuLaunchKernel")


def _launch(
    source: Source, device: torch.device, grid: tuple[int, int, int], threads: int, *arguments: Argument
) -> None:
    """Launch on PyTorch's current stream of ``device``."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        _enter_context(index)
        function = _function(source, _architecture(device), index)
        values = c_values(arguments)
        function.launch(grid, threads, torch.cuda.current_stream().cuda_stream, pointers(values))


def c_values(arguments: Sequence[Argument]) -> list[Any]:
    """What a kernel takes: whole numbers are ``int``, others ``float``, tensors pointers."""
    return [_c_value(value) for value in arguments]


def pointers(values: Sequence[Any]) -> ctypes.Array[Any]:
    """Pointers to ``values``, which must outlive them: the form in which the driver takes a kernel's arguments."""
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


def _c_value(value: Argument) -> Any:
    if isinstance(value, Kept):
        return _KeptPointers(*(tensor.data_ptr() for tensor in value.tensors))
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


@functools.cache
def _function(source: Source, architecture: str, _device: int) -> _Function:
    return _Function(source.compiled(architecture).cubin, source.name)


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _enter_context(device: int) -> None:
    """Make the device's primary context current in this thread, unless one of the device is.

    A thread that has not called CUDA's runtime has none, such as autograd's own when all memory comes from PyTorch's
    cache, and ``torch.cuda.device`` calls nothing where the device is the current one already.
    """
    current = ctypes.c_int()
    if _driver().cuCtxGetDevice(ctypes.byref(current)) == 0 and current.value == _device_handle(device):
        return
    _check(_driver().cuCtxSetCurrent(_primary_context(device)), "cuCtxSetCurrent")


@functools.cache
def _device_handle(device: int) -> int:
    found = ctypes.c_int()
    _check(_driver().cuDeviceGet(ctypes.byref(found), device), "cuDeviceGet")
    return found.value


@functools.cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """Retained once and for good; PyTorch holds it too."""
    context = ctypes.c_void_p()
    _check(
        _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), _device_handle(device)), "cuDevicePrimaryCtxRetain"
    )
    return context


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        why = text.value.decode(errors="replace") if text.value else "unknown to this driver"
        raise RuntimeError(f"{call} failed with CUDA error {status}: {why}")
