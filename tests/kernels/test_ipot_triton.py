"""IPOT's Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for real GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlscale.kernels.ipot import triton_backend
from vlscale.kernels.ipot.numerics import COSINE_RANGE, needs_log_form
from vlscale.kernels.ipot.triton_backend import SIZES, tile_of

triton = pytest.importorskip("triton")
from tests.kernels.compiled_triton import SHARED, compiled, launches  # noqa: E402  (needs triton)

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = SIZES[2:]  # the others take less of everything


def test_the_interpreter_agrees_with_the_reference():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:]
    # Nothing but passes, so nothing skipped, and not by an oversight next to nothing.
    summary = re.search(r"^(\d+) passed(, \d+ warnings?)? in ", done.stdout, re.MULTILINE)
    assert summary, done.stdout[-500:]
    assert int(summary[1]) >= 30


def check_that_it_fits(launch, architecture):
    made = compiled(launch, architecture)
    assert made.registers * made.threads <= 65_536
    assert made.shared <= SHARED[architecture], made
    # What spills is little, and only where a program holds two tiles or both forms.
    assert made.stack <= (16 if launch.kernel.__name__ == "forward" else 256), made


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_the_largest_tile_compiles_ahead_of_time(monkeypatch, architecture, beta):
    for launch in launches(monkeypatch, SIZES[2], torch.float16, beta)[:2]:
        check_that_it_fits(launch, architecture)


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "sizes", "dtypes"),
    [(80, SIZES, DTYPES), (90, SIZES, DTYPES), (86, LARGEST, DTYPES), (120, LARGEST, DTYPES), (100, SIZES, DTYPES[:1])],
)
def test_whatever_is_launched_compiles_ahead_of_time_and_stays_in_registers(monkeypatch, architecture, sizes, dtypes):
    """On sm_100 in float32 alone: see ``triton_backend.problem``."""
    for size in sizes:
        for dtype in dtypes:
            plan, backward, of_cost = launches(monkeypatch, size, dtype, beta=0.5)
            logarithmic = launches(monkeypatch, size, dtype, beta=0.01)[0]
            assert (plan.options["LOG"], logarithmic.options["LOG"]) == (False, True)
            for launch in (plan, backward, logarithmic):
                check_that_it_fits(launch, architecture)
            if dtype == torch.float32 or size == SIZES[2]:  # dtypes differ in its loads alone
                check_that_it_fits(of_cost, architecture)


@pytest.mark.parametrize("beta", [0.5, 0.01])
@pytest.mark.parametrize(
    ("size", "hidden", "iterations", "inner"), [((20, 36), 768, 1, 1), ((20, 36), 37, 50, 2), ((1, 1), 1, 1, 1)]
)
def test_numbers_that_triton_makes_constants_compile(monkeypatch, beta, size, hidden, iterations, inner):
    for launch in launches(monkeypatch, size, torch.float32, beta, hidden, iterations, inner):
        check_that_it_fits(launch, 90)


def test_sizes_of_a_batch_and_iterations_compile_nothing_anew():
    from vlscale.kernels.ipot import triton_kernels

    for kernel in (triton_kernels.forward, triton_kernels.backward, triton_kernels.plan_of_cost):
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert free == {"iterations", "wide", "tall"} & set(kernel.arg_names)


def test_tiles_and_forms():
    sizes = {
        (1, 1): (32, 64), (20, 36): (32, 64), (33, 36): (64, 64), (10, 65): (64, 128), (60, 100): (64, 128),
        (65, 1): (128, 64), (128, 64): (128, 64),
    }  # fmt: skip
    for bounds, tile in sizes.items():
        assert (tile_of(*bounds).words, tile_of(*bounds).regions) == tile
    assert (tile_of(60, 100).columns, tile_of(60, 100, narrow=True).columns) == (32, 16)
    for bounds in ((65, 65), (129, 1), (1, 129), (512, 100)):
        told = (
            "'triton' takes at most 64 words and 128 regions or 128 words and 64 regions of an example, "
            f"got {bounds[0]} words and {bounds[1]} regions; take 'auto'"
        )
        with pytest.raises(ValueError, match=told):
            tile_of(*bounds)
    assert not needs_log_form(COSINE_RANGE, 0.05, 60 * 100)
    assert needs_log_form(COSINE_RANGE, 0.01, 1)


def test_older_tritons_without_knobs_are_enough(monkeypatch):
    monkeypatch.delattr(triton, "knobs", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [triton_backend._exact(dtype) for dtype in DTYPES] == [True, False, False]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [triton_backend._exact(dtype) for dtype in DTYPES] == [True, False, True]
