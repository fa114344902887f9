"""IPOT's GPU kernels on a GPU: parity over all sizes with poisoned outputs, no waiting for the device, a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.kernels.ipot_cases import make_pairs
from tests.kernels.test_ipot_cuda import SMALL, check
from vlscale.kernels.ipot import backends, function, ipot_distance
from vlscale.kernels.ipot.cuda_sources import TYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.parametrize("name", ["triton", "cuda"]),
]
ROOT = Path(__file__).parents[2]
SIDES = (0, 1, 2, 7, 16, 31, 36, 64, 65, 100)
LONG = (0, 1, 3, 17, 60, 64, 128, 129, 300, 512)
SANITIZED = (
    "import torch; from tests.kernels.test_ipot_cuda import SMALL, check; from vlscale.kernels.ipot import backends; "
    "check(backends.kernel({name!r}), SMALL, 0.5, torch.float16, device='cuda', plan_tolerance=5e-4)"
)


@pytest.fixture(autouse=True)
def _runs_here(name):
    why = backends.problem(name, torch.device("cuda"))
    if why:
        pytest.skip(why)


@pytest.fixture
def _poisoned(monkeypatch):
    """Whatever a kernel forgets to write is NaN."""
    honest = function.Outcome.empty

    def poisoned(*arguments):
        outcome = honest(*arguments)
        for tensor in (outcome.plan, outcome.distance, *outcome.kept.tensors):
            tensor.fill_(float("nan"))
        return outcome

    monkeypatch.setattr(function.Outcome, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: torch.full_like(like, float("nan"), **options))


def _takes(name, words, regions):
    """Whether the backend takes examples of this size; Triton's largest are smaller than the others'."""
    try:
        backends.resolve_backend(name, torch.device("cuda"), torch.float32, words, regions)
    except ValueError:
        return False
    return True


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.05, 0.01])
def test_all_sizes(name, beta, dtype):
    tolerance = 1e-2 if beta == 0.01 else 5e-4
    for words in LONG:
        sizes = [(words, regions) for regions in SIDES if _takes(name, words, regions)]
        if not sizes:
            assert name == "triton"
            continue
        check(backends.kernel(name), sizes, beta, dtype, hidden=256, device="cuda", plan_tolerance=tolerance)
    check(backends.kernel(name), SMALL, beta, dtype, hidden=768, device="cuda", plan_tolerance=tolerance)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("inner", [2, 5])
def test_inner_iterations(name, inner):
    check(backends.kernel(name), SMALL, 0.5, inner=inner, device="cuda", plan_tolerance=5e-4)


def test_nothing_waits_for_the_gpu(name):
    x, y, cu_x, cu_y = (tensor.cuda() for tensor in make_pairs(SMALL, 64, seed=1))
    x, y = x.requires_grad_(True), y.requires_grad_(True)

    def step():
        ipot_distance(x, y, cu_x, cu_y, backend=name, max_words=31, max_regions=64).sum().backward()

    step()  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_thread_whose_first_cuda_call_is_the_launch(name):
    inputs = [tensor.cuda() for tensor in make_pairs(SMALL, 64, seed=1)]

    def step():
        return ipot_distance(*inputs, backend=name, max_words=31, max_regions=64)

    expected = step().clone()  # and leaves memory in PyTorch's cache
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(step).result(), expected)


def test_a_graph_can_be_captured_after_a_first_call(name):
    inputs = [tensor.cuda() for tensor in make_pairs(SMALL, 64, seed=1)]

    def step():
        return ipot_distance(*inputs, backend=name, max_words=31, max_regions=64)

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert torch.equal(found, expected)


def test_at_most_four_launches(name):
    from torch.profiler import ProfilerActivity, profile

    x, y, cu_x, cu_y = (tensor.cuda() for tensor in make_pairs(SMALL, 64, seed=1))
    x, y = x.requires_grad_(True), y.requires_grad_(True)
    weights = torch.ones(len(SMALL), device="cuda")

    def step():
        distance = ipot_distance(x, y, cu_x, cu_y, backend=name, max_words=31, max_regions=64)
        torch.autograd.grad(distance, (x, y), weights)

    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 2 <= len(kernels) <= 4, [event.name for event in kernels]


def test_compute_sanitizer_finds_nothing(name):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        checked = [sys.executable, "-c", SANITIZED.format(name=name)]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "3", *checked]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
