"""The CUDA backend: sm_70 and later, above all the V100, which Triton's matrix path has left behind.

Sources are ``ipot_prelude.cuh`` with ``ipot_tile.cu``, ``ipot_large.cu`` or ``ipot_backward.cu``. They are compiled by
NVRTC at first use for the GPU at hand, for each dtype and size class that occurs, into a cache folder, and launched
through the driver on PyTorch's current stream; nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.kernels.ipot import nvrtc
from vlscale.kernels.ipot.function import Kept, Settings
from vlscale.kernels.ipot.reference import COSINE_RANGE, NORM_FLOOR

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDTH = 128
"""Columns of a block of the backward pass (``ipot_backward.cu``)."""
PLAN_FORM_LIMIT = 60.0
"""Largest spread of logits in the plan form, as in ``reference.py``."""


@dataclass(frozen=True)
class SizeClass:
    """A compiled tile: an example of at most ``words`` and ``regions`` is one block of ``warps`` warps.

    ``large`` examples take more than one tile; ``words`` and ``regions`` are then the tile's, not the example's.
    """

    words: int
    regions: int
    warps: int
    large: bool = False

    def defines(self, dtype: torch.dtype, log_form: bool) -> tuple[str, ...]:
        """What the source is compiled with."""
        values = {
            "TYPE": TYPES[dtype], "TM": self.words, "TN": self.regions, "WARPS": self.warps, "LOG": int(log_form)
        }  # fmt: skip
        return tuple(f"{name}={value}" for name, value in values.items())


TILES = (SizeClass(32, 64, 4), SizeClass(64, 64, 8), SizeClass(64, 128, 8), SizeClass(128, 128, 16))
LARGE = SizeClass(64, 64, 16, large=True)
MOST_WORDS, MOST_REGIONS = 1024, 512
"""Of an example in ``ipot_large.cu``."""


def problem(device: torch.device) -> str | None:
    """Why this backend cannot run on ``device``, or None."""
    if device.type != "cuda":
        return f"it is for NVIDIA GPUs, not for {device}"
    if torch.version.hip is not None:
        return "it is for NVIDIA GPUs, this PyTorch is for AMD's"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "it needs sm_70 or later"
    try:
        nvrtc.version()
        _driver()
    except OSError as error:
        return str(error)
    return None


def source(file: str) -> str:
    """The text of one kernel with the prelude in front."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("ipot_prelude.cuh", file))


def size_class(max_words: int, max_regions: int) -> SizeClass:
    """The smallest tile that holds every example.

    Raises:
        ValueError: an example may be larger than any kernel takes.
    """
    if max_words > MOST_WORDS or max_regions > MOST_REGIONS:
        raise ValueError(
            f"IPOT backend 'cuda' takes at most {MOST_WORDS} words and {MOST_REGIONS} regions of an example, "
            f"got {max_words} and {max_regions}; take backend 'reference'"
        )
    return next((tile for tile in TILES if max_words <= tile.words and max_regions <= tile.regions), LARGE)


def needs_log_form(beta: float, tile: SizeClass) -> bool:
    """Whether cosine costs may be too wide for the plan form in float32."""
    return tile.large or COSINE_RANGE / beta + math.log(tile.words * tile.regions) >= PLAN_FORM_LIMIT


class CudaKernel:
    """See :class:`vlscale.kernels.ipot.function.Kernel`: one launch forward, one backward."""

    def forward(
        self, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Kept]:
        """Distances, plans and what the backward pass needs."""
        examples, device = cu_words.numel() - 1, words.device
        tile = size_class(settings.max_words, settings.max_regions)
        plan = torch.empty(examples, settings.max_regions, settings.max_words, device=device)
        distance, kept = torch.empty(examples, device=device), Kept.empty(words, regions, torch.float32)
        if examples:
            file = "ipot_large.cu" if tile.large else "ipot_tile.cu"
            defines = tile.defines(words.dtype, needs_log_form(settings.beta, tile))
            with torch.cuda.device(device):
                _function(file, "ipot_forward", _architecture(device), device.index or 0, defines).launch(
                    (examples, 1, 1), 32 * tile.warps,
                    words, regions, cu_words.long(), cu_regions.long(), words.shape[1], settings.beta,
                    settings.iterations, settings.inner_iterations, NORM_FLOOR,
                    settings.max_words, settings.max_regions, plan, distance, kept,
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
        grad_words, grad_regions = torch.empty_like(words), torch.empty_like(regions)
        if len(gradient):
            device = words.device
            defines = LARGE.defines(words.dtype, log_form=True)  # only the dtype matters here
            file, name = "ipot_backward.cu", "ipot_backward"
            with torch.cuda.device(device):
                _function(file, name, _architecture(device), device.index or 0, defines).launch(
                    (len(gradient), -(-words.shape[1] // WIDTH), 2), WIDTH,
                    words, regions, cu_words.long(), cu_regions.long(), words.shape[1], plan.shape[2], plan.shape[1],
                    plan, gradient, kept, grad_words, grad_regions,
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


@functools.cache
def _function(file: str, name: str, architecture: str, device: int, defines: tuple[str, ...]) -> _Function:
    torch.cuda.current_stream().synchronize()  # makes the primary context current in this thread
    return _Function(nvrtc.compile_kernel(source(file), file, architecture, defines).cubin, name)


def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _argument(value: Tensor | int | float | Kept) -> Any:
    if isinstance(value, Kept):
        tensors = (value.inverse_word, value.inverse_region, value.share_word, value.share_region)
        return _KeptPointers(*(tensor.data_ptr() for tensor in tensors))
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status != 0:
        raise RuntimeError(f"{call} failed with CUDA error {status}")
