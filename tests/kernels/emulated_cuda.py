"""The CUDA backend with its launches replaced: the same sources, compiled for the CPU, run by ``emulated_cuda.h``."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from vlscale.kernels.ipot import cuda_backend
from vlscale.kernels.ipot.cuda_sources import SizeClass, Source
from vlscale.kernels.ipot.function import Kept, Outcome, Packed, Settings

HERE = Path(__file__).parent
RUN = """
extern "C" int count() { return parameters(KERNEL); }
extern "C" void run(unsigned x, unsigned y, unsigned z, unsigned threads, int reversed, void** arguments) {
    run_grid(KERNEL, {x, y, z}, threads, reversed, arguments);
}
"""


@functools.cache
def library(source: Source) -> ctypes.CDLL:
    """Compile one source and load it."""
    text = "\n".join([
        '#include "emulated_cuda.h"',
        "namespace {",
        source.text.replace('extern "C" __global__', "__global__"),
        "}",
        RUN.replace("KERNEL", source.name),
    ])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        command = ["g++", "-O1", "-std=c++17", "-march=native", "-w", "-fPIC", "-shared", f"-I{HERE}", "-x", "c++", "-"]
        done = subprocess.run([*command, *(f"-D{d}" for d in source.defines), "-o", str(path)], input=text, text=True)
        assert done.returncode == 0
        return ctypes.CDLL(str(path))


def launch(
    source: Source,
    device: torch.device,
    grid: tuple[int, int, int],
    threads: int,
    *arguments: cuda_backend.Argument,
) -> None:
    """In place of ``cuda_backend._launch``: run the threads in both orders, which must not differ in a bit."""
    compiled, values = library(source), cuda_backend.c_values(arguments)
    assert device.type == "cpu"
    assert compiled.count() == len(values)
    tensors = [part for value in arguments for part in _tensors(value)]
    before, after = [tensor.clone() for tensor in tensors], []
    for reverse in (0, 1):
        for tensor, content in zip(tensors, before, strict=True):
            tensor.detach().copy_(content)
        compiled.run(*grid, threads, reverse, cuda_backend.pointers(values))
        after.append([tensor.detach().clone() for tensor in tensors])
    for one, other in zip(*after, strict=True):
        assert torch.equal(one.nan_to_num(12345.0), other.nan_to_num(12345.0)), "a barrier is missing"


def _tensors(value: cuda_backend.Argument) -> tuple[Tensor, ...]:
    return value.tensors if isinstance(value, Kept) else (value,) if isinstance(value, Tensor) else ()


class _Forced(SizeClass):
    """A tile in one form whatever beta is."""

    log_form: bool

    def needs_log_form(self, beta: float) -> bool:
        return self.log_form


def _forced(tile: SizeClass, log_form: bool) -> SizeClass:
    made = _Forced(**dataclasses.asdict(tile))
    object.__setattr__(made, "log_form", log_form)
    return made


class EmulatedKernel(cuda_backend.CudaKernel):
    """``CudaKernel`` on CPU tensors; ``tile`` and ``log_form`` override its choice."""

    def __init__(self, tile: SizeClass | None = None, log_form: bool | None = None) -> None:
        self.tile, self.log_form = tile, log_form

    def forward(self, inputs: Packed, settings: Settings, outcome: Outcome) -> None:
        for tensor in (outcome.plan, outcome.distance, *outcome.kept.tensors):
            tensor.fill_(float("nan"))  # whatever a kernel forgets to write is seen
        tile = self.tile
        if tile is not None and self.log_form is not None:
            tile = _forced(tile, self.log_form)
        with ExitStack() as replaced:
            replaced.enter_context(patch.object(cuda_backend, "_launch", launch))
            if tile is not None:
                replaced.enter_context(patch.object(cuda_backend, "size_class", lambda *_: tile))
            super().forward(inputs, settings, outcome)

    def backward(self, inputs: Packed, outcome: Outcome, gradient: Tensor) -> tuple[Tensor, Tensor]:
        def poisoned(like: Tensor) -> Tensor:
            return torch.full_like(like, float("nan"))

        with patch.object(cuda_backend, "_launch", launch), patch.object(torch, "empty_like", poisoned):
            return super().backward(inputs, outcome, gradient)
