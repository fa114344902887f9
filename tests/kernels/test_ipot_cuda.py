"""IPOT's CUDA sources without a GPU: compiled by NVRTC for real, and run on the CPU by an emulated block."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.kernels.test_ipot import make_pairs
from vlscale.kernels import ipot
from vlscale.kernels.ipot import nvrtc
from vlscale.kernels.ipot.cuda_sources import LARGE, TILES, SizeClass, backward_kernel, size_class
from vlscale.kernels.ipot.function import Settings, run

CASES = [(tile, log_form) for tile in TILES for log_form in (False, True)] + [(LARGE, True)]
SMALL = [(16, 36), (1, 5), (0, 3), (7, 1), (3, 0), (31, 64)]
BEYOND = [(70, 80), (5, 3), (0, 2), (64, 64), (130, 20)]


def _emulated(tile=None, log_form=None):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulation with")
    from tests.kernels.emulated_cuda import EmulatedKernel

    return EmulatedKernel(tile, log_form)


def check(kernel, sizes, beta, dtype=torch.float32, inner=1, hidden=72, device="cpu", plan_tolerance=5e-4):
    """Distance, plan and gradients of a kernel against the reference in float64 on the same inputs."""
    words, regions, cu_words, cu_regions = (t.to(device) for t in make_pairs(sizes, hidden, seed=3, dtype=dtype))
    x, y = words.requires_grad_(True), regions.requires_grad_(True)
    wide, tall = (max(max(side), 1) for side in zip(*sizes, strict=True))
    distance, plan = run(kernel, x, y, cu_words, cu_regions, Settings(beta, 50, inner, wide, tall))
    weights = torch.linspace(-1, 2, len(sizes), device=device)
    gradients = torch.autograd.grad((distance * weights).sum(), (x, y))
    exact = [tensor.detach().double().requires_grad_(True) for tensor in (x, y)]
    expected, expected_plan = ipot.ipot_distance(
        *exact, cu_words, cu_regions, beta, 50, inner, "reference", True, max_words=wide, max_regions=tall
    )
    torch.testing.assert_close(distance.double(), expected, rtol=5e-6, atol=0)
    largest = expected_plan.amax((1, 2), keepdim=True)
    assert ((plan - expected_plan).abs() <= plan_tolerance * largest).all()
    tolerance = max({torch.float32: 5e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], plan_tolerance / 5)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    for ours, right in zip(gradients, theirs, strict=True):
        assert ours.dtype == dtype
        assert (ours - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize(("tile", "log_form"), CASES)
def test_every_size_class_and_form(tile, log_form):
    check(
        _emulated(tile, log_form), BEYOND if tile.large else SMALL, beta=0.1, plan_tolerance=5e-4 if log_form else 1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inner", [1, 2, 5])
def test_half_precision_and_inner_iterations(dtype, inner):
    check(_emulated(), SMALL, beta=0.5, dtype=dtype, inner=inner, plan_tolerance=1e-4)


def test_small_beta_and_odd_widths():
    check(_emulated(), SMALL, beta=0.01, hidden=37, plan_tolerance=1e-2)


def test_neighbours_do_not_leak_and_zero_vectors_cost_one():
    """Rows of other examples and what lies behind the last row hold NaN and infinity."""
    sizes = [(5, 6), (3, 4), (4, 9)]
    words, regions, cu_words, cu_regions = make_pairs(sizes, 40, seed=4)
    words[1] = 0
    good, good_plan = run(_emulated(), words, regions, cu_words, cu_regions, Settings(0.5, 50, 1, 8, 12))
    words[5:8], regions[6:10] = float("nan"), float("inf")
    distance, plan = run(_emulated(), words, regions, cu_words, cu_regions, Settings(0.5, 50, 1, 8, 12))
    for example in (0, 2):
        assert distance[example] == good[example]
        assert torch.equal(plan[example], good_plan[example])
    x = words[:5].clone().requires_grad_(True)
    one = run(_emulated(), x, regions[:6], cu_words[:2], cu_regions[:2], Settings(0.5, 50, 1, 5, 6))[0]
    assert one.item() == pytest.approx(good[0].item(), rel=1e-6)
    one.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not torch.equal(x.grad[1], torch.zeros(40))


def test_padding_of_the_plan_changes_no_bit():
    inputs = make_pairs(SMALL, 40, seed=5)
    tight = run(_emulated(TILES[2]), *inputs, Settings(0.5, 50, 1, 31, 64))
    wide = run(_emulated(TILES[2]), *inputs, Settings(0.5, 50, 1, 60, 100))
    assert torch.equal(tight[0], wide[0])
    assert torch.equal(tight[1], wide[1][:, :64, :31])
    assert not wide[1][:, 64:].any()
    assert not wide[1][:, :, 31:].any()


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("sm_70", torch.float32), ("sm_70", torch.float16), ("sm_80", torch.bfloat16), ("sm_90", torch.float16)],
)
def test_sources_compile_and_stay_in_registers(architecture, dtype):
    """With NVRTC itself: registers that fit, no spills but for the largest tile, static shared memory."""
    try:
        nvrtc.library()
    except OSError as error:
        pytest.skip(str(error))
    for tile, log_form in CASES:
        made = tile.forward_kernel(dtype, log_form).compiled(architecture)
        assert made.cubin[:4] == b"\x7fELF"
        threads = 32 * tile.warps
        assert 0 < made.figure("registers") * threads <= 65_536
        assert made.figure("bytes spill stores") <= (256 if tile == TILES[3] else 0)
        assert 0 < made.figure("bytes smem") <= 48 << 10
    made = backward_kernel(dtype).compiled(architecture)
    assert made.figure("registers") <= 96
    assert made.figure("bytes spill stores") == 0


def test_compiled_kernels_are_kept_and_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path))
    try:
        nvrtc.library()
    except OSError as error:
        pytest.skip(str(error))
    source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }'
    first = nvrtc.compile_kernel(source, "twice.cu", "sm_70", ["FACTOR=2"])
    assert len(list((tmp_path / "kernels").iterdir())) == 2
    monkeypatch.setattr(nvrtc, "_compile", None)  # not called again
    assert nvrtc.compile_kernel(source, "twice.cu", "sm_70", ["FACTOR=2"]) == first
    monkeypatch.undo()
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match=r"cannot compile twice.cu for --gpu-architecture=sm_70: twice.cu\(1\): error"
    ) as error:
        nvrtc.compile_kernel(source, "twice.cu", "sm_70")
    assert "\n" not in str(error.value)
    (tmp_path / "kernels").chmod(0o777)
    assert nvrtc.compile_kernel(source, "twice.cu", "sm_70", ["FACTOR=3"]).cubin  # others could write there: not used
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_the_smallest_tile_is_taken():
    assert size_class(20, 36) == SizeClass(32, 64, 4)
    assert size_class(33, 36) == SizeClass(64, 64, 8)
    assert size_class(60, 100) == SizeClass(64, 128, 8)
    assert size_class(128, 20) == SizeClass(128, 128, 16)
    assert size_class(512, 100) == LARGE
    with pytest.raises(ValueError, match="at most 1024 words and 512 regions of an example, got 1025 and 3"):
        size_class(1025, 3)
    assert not TILES[3].needs_log_form(0.05)
    assert TILES[3].needs_log_form(0.03)
    assert LARGE.needs_log_form(0.5)
