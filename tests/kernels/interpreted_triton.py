"""Tests that need Triton's interpreter, which is chosen by the environment before Triton is imported.

``test_ipot_triton.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.kernels.test_ipot import make_pairs
from tests.kernels.test_ipot_cuda import SMALL, check
from vlscale.kernels.ipot import triton_backend
from vlscale.kernels.ipot.function import Settings, run
from vlscale.kernels.ipot.triton_backend import TritonKernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # divisions by zero that are selected away


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    monkeypatch.setattr(triton_backend, "_device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.05, 0.01])
def test_parity(dtype, beta):
    check(TritonKernel(), SMALL, beta, dtype, plan_tolerance=1e-2 if beta == 0.01 else 1e-4)


@pytest.mark.parametrize("inner", [2, 5])
@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_inner_iterations(inner, beta):
    check(TritonKernel(), SMALL, beta, inner=inner, plan_tolerance=1e-2 if beta == 0.01 else 1e-4)


def test_odd_widths_and_long_texts():
    check(TritonKernel(), [(5, 3), (40, 17), (2, 2)], 0.5, hidden=37, plan_tolerance=1e-4)
    check(TritonKernel(), [(200, 20), (5, 100)], 0.5, hidden=24, plan_tolerance=1e-4)


def test_neighbours_do_not_leak():
    words, regions, cu_words, cu_regions = make_pairs([(5, 6), (3, 4), (4, 9)], 40, seed=4)
    settings = Settings(0.5, 50, 1, 8, 12)
    good, good_plan = run(TritonKernel(), words, regions, cu_words, cu_regions, settings)
    words[5:8], regions[6:10] = float("nan"), float("inf")
    distance, plan = run(TritonKernel(), words, regions, cu_words, cu_regions, settings)
    for example in (0, 2):
        assert distance[example] == good[example]
        assert torch.equal(plan[example], good_plan[example])
