"""What the Triton backend launches, compiled ahead of time for GPUs that are not here.

The launches are caught from the backend itself, so that arguments, constants, tiles, warps and stages are those of a
real call, and are specialised as Triton would: an argument that is 1 becomes a constant, whole numbers and pointers
that are multiples of 16 are known to be.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.kernels.ipot_cases import make_pairs
from vlscale.kernels.ipot import triton_backend
from vlscale.kernels.ipot.function import Outcome, Packed, Settings

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
"""Bytes of shared memory that a program can have, by compute capability."""
_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch, not made."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: per thread, at most 255.
        stack: bytes per thread, into which registers spill.
        shared: bytes of shared memory.
        threads: of a program.
    """

    registers: int
    stack: int
    shared: int
    threads: int


class _Catcher:
    """Stands for a kernel in its module."""

    def __init__(self, kernel: Any, caught: list[Launch]) -> None:
        self._kernel, self._caught = kernel, caught

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self._caught.append(Launch(self._kernel, arguments, options))

        return launch


def launches(monkeypatch, size, dtype, beta, hidden=768, iterations=50, inner=1) -> list[Launch]:
    """Forward and backward of one call for examples of at most ``size`` words and regions, and plans of a cost."""
    from vlscale.kernels.ipot import triton_kernels

    caught: list[Launch] = []
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "_device", lambda device: contextlib.nullcontext())
        for name in ("forward", "backward", "plan_of_cost"):
            patch.setattr(triton_kernels, name, _Catcher(getattr(triton_kernels, name), caught))
        inputs = Packed(*make_pairs([size], hidden, seed=1, dtype=dtype))
        settings = Settings(beta, iterations, inner, *size)
        outcome = Outcome.empty(inputs, settings)
        kernel = triton_backend.TritonKernel()
        kernel.forward(inputs, settings, outcome)
        kernel.backward(inputs, outcome, torch.ones(1))
        words, regions = (torch.tensor([length]) for length in size)
        triton_backend.transport_plan(torch.ones(1, *size, dtype=dtype), words, regions, beta, iterations, inner)
    assert [launch.kernel.__name__ for launch in caught] == ["forward", "backward", "plan_of_cost"]
    return caught


def compiled(launch: Launch, architecture: int) -> Resources:
    """Compile, for ``architecture`` (90 is sm_90); whatever Triton or NVIDIA's assembler refuses is raised."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = dict(launch.options)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        given = index < len(launch.arguments)
        value = launch.arguments[index] if given else options.pop(parameter.name)
        signature[parameter.name], known = _kind(parameter, value)
        if signature[parameter.name] == "constexpr":
            constants[parameter.name] = value
        elif known:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"\b{what}:(\d+)", told)[1]) for what in ("REG", "STACK"))
    return Resources(registers, stack, made.metadata.shared, 32 * options["num_warps"])


def _kind(parameter: Any, value: Any) -> tuple[str, bool]:
    """The type of an argument in a signature, and whether it is known to be a multiple of 16."""
    if parameter.is_constexpr:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return f"*{_NAMES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if parameter.do_not_specialize:
        return "i32", False
    return ("constexpr", False) if value == 1 else ("i32", value % 16 == 0)
