"""IPOT's Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for real GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlscale.kernels.ipot.numerics import COSINE_RANGE, needs_log_form
from vlscale.kernels.ipot.triton_backend import tile_of

triton = pytest.importorskip("triton")
INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def test_the_interpreter_agrees_with_the_reference():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "18 passed" in done.stdout


def compiled(
    name: str, architecture: int, dtype: torch.dtype, words: int, regions: int, log: bool
) -> tuple[int, int, int]:
    """Registers per thread, bytes spilled and bytes of shared memory, from Triton's compiler and NVIDIA's assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlscale.kernels.ipot import triton_kernels

    kernel = getattr(triton_kernels, name)
    tile = tile_of(words, regions, narrow=name == "backward" and dtype == torch.float32)
    constants = {
        "BLOCK_M": tile.words, "BLOCK_N": tile.regions, "BLOCK_H": tile.columns, "LOG": log,
        "EXACT": dtype == torch.float32,
    }  # fmt: skip
    rows = ("words", "regions", "grad_words", "grad_regions")
    whole = ("hidden", "iterations", "inner", "wide", "tall")
    signature = {
        argument: "constexpr" if argument in constants
        else f"*{DTYPES[dtype]}" if argument in rows
        else "*i64" if argument.startswith("cu_")
        else "i32" if argument in whole
        else "fp32" if argument in ("beta", "floor")
        else "*fp32"
        for argument in kernel.arg_names
    }  # fmt: skip
    source = ASTSource(kernel, signature, {key: value for key, value in constants.items() if key in signature})
    stages = 1 if name == "backward" else 2
    options = {"num_warps": tile.warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [
        str(assembler),
        "-v",
        f"--gpu-name=sm_{architecture}{'a' if architecture >= 90 else ''}",
        "-o",
        "/dev/null",
        "-",
    ]
    log_text = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True, check=True).stderr
    registers, spilled = (int(re.search(rf"(\d+) {what}", log_text)[1]) for what in ("registers", "bytes spill stores"))
    assert registers * 32 * tile.warps <= 65_536
    return registers, spilled, made.metadata.shared


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_ahead_of_time_and_stay_in_registers(architecture):
    for words, regions in ((20, 36), (32, 64), (60, 100), (128, 128)):
        for log in (False, True):
            registers, spilled, shared = compiled("forward", architecture, torch.float16, words, regions, log)
            assert spilled <= (1024 if words == 128 else 0), (words, regions, log, registers, spilled)
            assert shared <= 163 << 10
    for dtype in (torch.float32, torch.bfloat16):
        registers, spilled, shared = compiled("backward", architecture, dtype, 60, 100, False)
        assert spilled <= (256 if dtype == torch.float32 else 0), (dtype, registers, spilled)
        assert shared <= 163 << 10
    assert compiled("forward", architecture, torch.float32, 60, 100, False)[1] == 0


def test_tiles_and_forms():
    assert (tile_of(20, 36).words, tile_of(20, 36).regions) == (32, 64)
    assert (tile_of(1, 1).words, tile_of(1, 1).regions) == (16, 16)
    assert (tile_of(512, 100).words, tile_of(512, 100).regions) == (512, 128)
    with pytest.raises(ValueError, match="at most 65536 pairs of a word and a region, got 513 words and 128 regions"):
        tile_of(513, 128)
    assert not needs_log_form(COSINE_RANGE, 0.05, 60 * 100)
    assert needs_log_form(COSINE_RANGE, 0.01, 1)
