"""The CUDA backend with its launches replaced: the same sources, compiled for the CPU, run by ``emulated_cuda.h``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vlscale.kernels.ipot import cuda_backend
from vlscale.kernels.ipot.function import Kept, Settings
from vlscale.kernels.ipot.reference import NORM_FLOOR

HERE = Path(__file__).parent
FORWARD = """
extern "C" void run_forward(int examples, const scalar* words, const scalar* regions, const int64* cu_words,
    const int64* cu_regions, int hidden, float beta, int iterations, int inner, float floor, int wide, int tall,
    float* plan, float* distance, float* a, float* b, float* c, float* d) {
    run_grid({(unsigned)examples, 1, 1}, THREADS, [=] { ipot_forward(words, regions, cu_words, cu_regions, hidden, beta,
        iterations, inner, floor, wide, tall, plan, distance, Kept{a, b, c, d}); });
}
"""
BACKWARD = """
extern "C" void run_backward(int examples, const scalar* words, const scalar* regions, const int64* cu_words,
    const int64* cu_regions, int hidden, int wide, int tall, const float* plan, const float* gradient, float* a,
    float* b, float* c, float* d, scalar* grad_words, scalar* grad_regions) {
    run_grid({(unsigned)examples, (unsigned)((hidden + WIDTH - 1) / WIDTH), 2}, WIDTH, [=] { ipot_backward(words,
        regions, cu_words, cu_regions, hidden, wide, tall, plan, gradient, Kept{a, b, c, d}, grad_words,
        grad_regions); });
}
"""


@functools.cache
def library(file: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    """Compile one source with ``defines`` and load it."""
    text = "\n".join([
        '#include "emulated_cuda.h"',
        cuda_backend.source(file).replace('extern "C" __global__', "static __global__"),
        BACKWARD if "backward" in file else FORWARD,
    ])  # fmt: skip
    key = hashlib.sha256(repr((text, (HERE / "emulated_cuda.h").read_text(), defines)).encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"emulated-{key}.so"
        command = ["g++", "-O1", "-std=c++17", "-march=native", "-w", "-fPIC", "-shared", f"-I{HERE}", "-x", "c++", "-"]
        done = subprocess.run([*command, *(f"-D{d}" for d in defines), "-o", str(path)], input=text, text=True)
        assert done.returncode == 0
        return ctypes.CDLL(str(path))


def call(function: ctypes._NamedFuncPointer, *arguments: Tensor | int | float) -> None:
    function.restype = None
    function(
        *(
            ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor)
            else ctypes.c_float(a) if isinstance(a, float) else ctypes.c_int(a)
            for a in arguments
        )
    )  # fmt: skip


class EmulatedKernel:
    """``CudaKernel`` on CPU tensors; ``tile`` and ``log_form`` override its choice."""

    def __init__(self, tile: cuda_backend.SizeClass | None = None, log_form: bool | None = None) -> None:
        self.tile, self.log_form = tile, log_form

    def forward(
        self, words: Tensor, regions: Tensor, cu_words: Tensor, cu_regions: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor, Kept]:
        tile = self.tile or cuda_backend.size_class(settings.max_words, settings.max_regions)
        log_form = cuda_backend.needs_log_form(settings.beta, tile) if self.log_form is None else self.log_form
        examples = cu_words.numel() - 1
        # Whatever a kernel forgets to write is seen.
        plan = torch.full((examples, settings.max_regions, settings.max_words), float("nan"))
        distance, kept = torch.full((examples,), float("nan")), Kept.empty(words, regions, torch.float32)
        for tensor in kept.__dict__.values():
            tensor.fill_(float("nan"))
        library_ = library("ipot_large.cu" if tile.large else "ipot_tile.cu", tile.defines(words.dtype, log_form))
        call(
            library_.run_forward, examples, words, regions, cu_words.long(), cu_regions.long(), words.shape[1],
            settings.beta, settings.iterations, settings.inner_iterations, NORM_FLOOR, settings.max_words,
            settings.max_regions, plan, distance, *kept.__dict__.values(),
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
        found = torch.full_like(words, float("nan")), torch.full_like(regions, float("nan"))
        call(
            library("ipot_backward.cu", cuda_backend.LARGE.defines(words.dtype, True)).run_backward, len(gradient),
            words, regions, cu_words.long(), cu_regions.long(), words.shape[1], plan.shape[2], plan.shape[1], plan,
            gradient, *kept.__dict__.values(), *found,
        )  # fmt: skip
        return found
