"""The CUDA backend with its launches replaced: the same sources, compiled for the CPU, run by ``emulated_cuda.h``."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vlscale.kernels.ipot.cuda_sources import SizeClass, Source, backward_kernel, size_class
from vlscale.kernels.ipot.function import Outcome, Packed, Settings
from vlscale.kernels.ipot.numerics import NORM_FLOOR

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
def library(source: Source) -> ctypes.CDLL:
    """Compile one source and load it."""
    text = "\n".join([
        '#include "emulated_cuda.h"',
        source.text.replace('extern "C" __global__', "static __global__"),
        BACKWARD if source.name == "ipot_backward" else FORWARD,
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        command = ["g++", "-O1", "-std=c++17", "-march=native", "-w", "-fPIC", "-shared", f"-I{HERE}", "-x", "c++", "-"]
        done = subprocess.run([*command, *(f"-D{d}" for d in source.defines), "-o", str(path)], input=text, text=True)
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

    def __init__(self, tile: SizeClass | None = None, log_form: bool | None = None) -> None:
        self.tile, self.log_form = tile, log_form

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        tile = self.tile or size_class(settings.max_words, settings.max_regions)
        log_form = tile.needs_log_form(settings.beta) if self.log_form is None else self.log_form
        for tensor in (outcome.plan, outcome.distance, *outcome.kept.tensors):
            tensor.fill_(float("nan"))  # whatever a kernel forgets to write is seen
        call(
            library(tile.forward_kernel(inputs.words.dtype, log_form)).run_forward, inputs.examples, inputs.words,
            inputs.regions, inputs.cu_words, inputs.cu_regions, inputs.hidden, settings.beta, settings.iterations,
            settings.inner_iterations, NORM_FLOOR, settings.max_words, settings.max_regions, outcome.plan,
            outcome.distance, *outcome.kept.tensors,
        )  # fmt: skip

    def backward(self, inputs: Packed, outcome: Outcome, gradient: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.full_like(inputs.words, float("nan")), torch.full_like(inputs.regions, float("nan"))
        _, tall, wide = outcome.plan.shape
        call(
            library(backward_kernel(inputs.words.dtype)).run_backward, inputs.examples, inputs.words, inputs.regions,
            inputs.cu_words, inputs.cu_regions, inputs.hidden, wide, tall, outcome.plan, gradient,
            *outcome.kept.tensors, *found,
        )  # fmt: skip
        return found
