"""Which of IPOT's backends is taken, and why another one is not."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from vlscale.errors import VlscaleError
from vlscale.kernels import ipot
from vlscale.kernels.ipot import backends, reference, triton_backend

GPU = torch.device("cuda", 0)


@pytest.fixture
def everything_runs(monkeypatch):
    """As if every backend ran on every device in float32 and half precision; yields the questions that were asked."""
    asked = []

    def problem(name, device, dtype=torch.float32):
        asked.append(name)
        return "no float64" if dtype == torch.float64 else None

    monkeypatch.setattr(backends, "problem", problem)
    backends._fastest.cache_clear()
    yield asked
    backends._fastest.cache_clear()


@pytest.mark.parametrize(
    ("words", "regions", "taken"),
    [
        (20, 36, "triton"), (64, 128, "triton"), (128, 64, "triton"), (65, 65, "cuda"), (128, 128, "cuda"),
        (512, 100, "cuda"), (1024, 512, "cuda"), (1025, 3, "reference"), (3, 513, "reference"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("everything_runs")
def test_auto_takes_the_fastest_backend_that_holds_the_longest_example(words, regions, taken):
    assert backends.resolve_backend("auto", GPU, torch.float16, words, regions) == taken
    assert backends.resolve_backend("auto", GPU, torch.float64, words, regions) == "reference"
    plan_of = backends.plan_function("auto", GPU, torch.float16, words, regions)
    assert plan_of is (triton_backend.transport_plan if taken == "triton" else reference.transport_plan)


@pytest.mark.usefixtures("everything_runs")
def test_a_backend_asked_for_by_name_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"'triton' takes at most .* got 512 words and 100 regions; take 'auto'"):
        backends.resolve_backend("triton", GPU, torch.float16, 512, 100)
    with pytest.raises(ValueError, match=r"'cuda' takes at most .* got 1025"):
        backends.resolve_backend("cuda", GPU, torch.float16, 1025, 3)
    with pytest.raises(ValueError, match=r"'triton' takes at most .* got 128 words and 65"):
        backends.plan_function("triton", GPU, torch.float16, 128, 65)
    assert backends.resolve_backend("reference", GPU, torch.float16, 4000, 4000) == "reference"
    with pytest.raises(VlscaleError, match="'cuda' makes its own costs"):
        backends.plan_function("cuda", GPU, torch.float16, 3, 3)


@pytest.mark.usefixtures("everything_runs")
def test_sizes_are_refused_before_anything_is_launched(monkeypatch):
    monkeypatch.setattr(backends, "kernel", None)
    x, y, cu_x, cu_y = torch.randn(70, 8), torch.randn(80, 8), torch.tensor([0, 70]), torch.tensor([0, 80])
    refused = pytest.raises(ValueError, match=r"'triton' takes at most .* got 70 words and 80 regions")
    with refused:
        ipot.ipot_distance(x, y, cu_x, cu_y, backend="triton")
    with refused:
        ipot.ipot_distance(x, y, cu_x, cu_y, backend="triton", max_words=70, max_regions=80)
    with refused:
        ipot.ipot_distance_padded(x[None], y[None], cu_x[1:], cu_y[1:], backend="triton")
    with refused:
        ipot.transport_plan(torch.ones(1, 70, 80), cu_x[1:], cu_y[1:], backend="triton")


def test_devices_are_asked_once(everything_runs):
    for words in range(1, 60):
        backends.resolve_backend("auto", GPU, torch.float16, words, 36)
        backends.resolve_backend("cuda", GPU, torch.float16, words, 36)
    assert everything_runs == ["triton", "cuda"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_without_a_gpu_there_is_a_reason(name):
    assert "sees no GPU cuda:99 here" in backends.problem(name, torch.device("cuda", 99))
    if not torch.cuda.is_available():
        assert "sees no GPU cuda here" in backends.problem(name, torch.device("cuda"))
        with pytest.raises(VlscaleError, match=f"'{name}' does not run here: PyTorch sees no GPU"):
            backends.resolve_backend(name, torch.device("cuda"))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose compute capability a test sets, on a machine with what Triton needs."""
    pytest.importorskip("triton")
    found = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found.capability)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(triton_backend.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", sys.executable)
    found.headers = tmp_path
    return found


def test_triton_needs_a_compiler_and_headers(gpu, monkeypatch):
    assert backends.problem("triton", GPU) is None
    (gpu.headers / "Python.h").unlink()
    assert "no Python.h in" in backends.problem("triton", GPU)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "looked for no-such-compiler" in backends.problem("triton", GPU)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(gpu.headers))
    assert "looked for gcc and clang" in backends.problem("triton", GPU)


@pytest.mark.parametrize(
    ("capability", "whole", "half"),
    [((7, 0), False, False), ((8, 0), True, True), ((8, 6), True, True), ((9, 0), True, True), ((10, 0), True, False),
     ((10, 3), True, False), ((12, 0), True, True)],
)  # fmt: skip
def test_triton_runs_what_it_compiles(gpu, capability, whole, half):
    gpu.capability = capability
    problems = [backends.problem("triton", GPU, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    assert [why is None for why in problems] == [whole, half, half]
    if whole and not half:
        assert "half-precision products for sm_10" in problems[1]
