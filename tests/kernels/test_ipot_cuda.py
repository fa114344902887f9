"""IPOT's CUDA sources without a GPU: compiled by NVRTC for real, and run on the CPU by an emulated block."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.kernels.ipot_cases import make_pairs
from vlscale.kernels import ipot
from vlscale.kernels.ipot import backends, nvrtc
from vlscale.kernels.ipot.checks import BETAS
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


def check(
    kernel, sizes, beta, dtype=torch.float32, inner=1, hidden=72, device="cpu", plan_tolerance=5e-4, iterations=50
):
    """Distance, plan and gradients of a kernel against the reference in float64 on the same inputs."""
    words, regions, cu_words, cu_regions = (t.to(device) for t in make_pairs(sizes, hidden, seed=3, dtype=dtype))
    x, y = words.requires_grad_(True), regions.requires_grad_(True)
    wide, tall = (max(max(side), 1) for side in zip(*sizes, strict=True))
    distance, plan = run(kernel, x, y, cu_words, cu_regions, Settings(beta, iterations, inner, wide, tall))
    weights = torch.linspace(-1, 2, len(sizes), device=device)
    gradients = torch.autograd.grad((distance * weights).sum(), (x, y))
    exact = [tensor.detach().double().requires_grad_(True) for tensor in (x, y)]
    expected, expected_plan = ipot.ipot_distance(
        *exact, cu_words, cu_regions, beta, iterations, inner, "reference", True, max_words=wide, max_regions=tall
    )
    torch.testing.assert_close(distance.double(), expected, rtol=5e-6, atol=0)
    largest = expected_plan.amax((1, 2), keepdim=True)
    assert ((plan - expected_plan).abs() <= plan_tolerance * largest).all()
    tolerance = max({torch.float32: 5e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], plan_tolerance / 5)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    for ours, right in zip(gradients, theirs, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == right.shape
        bound = tolerance * right.abs().max() if right.numel() else 0  # a side may have no row in any example
        assert ((ours - right).abs() <= bound).all()


@pytest.mark.parametrize(("tile", "log_form"), CASES)
def test_every_size_class_and_form(tile, log_form):
    check(
        _emulated(tile, log_form), BEYOND if tile.large else SMALL, beta=0.1, plan_tolerance=5e-4 if log_form else 1e-4
    )


def test_an_odd_number_of_iterations():
    """What is used in turn ends at its other half, which the log form's last sum must not overwrite."""
    for log_form in (False, True):
        check(_emulated(TILES[0], log_form), SMALL, beta=0.5, iterations=3, plan_tolerance=1e-4)


@pytest.mark.parametrize("kernel", ["cpu", "emulated"])
def test_a_side_without_a_row_in_any_example(kernel):
    kernel = backends.kernel("cpu") if kernel == "cpu" else _emulated()
    check(kernel, [(0, 1), (0, 5)], beta=0.5)
    check(kernel, [(4, 0), (1, 0)], beta=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("beta", "inner"), [(0.5, 1), (0.5, 2), (0.5, 5), (0.1, 1), (0.05, 1)])
def test_half_precision_and_inner_iterations(dtype, beta, inner):
    check(_emulated(), SMALL, beta, dtype=dtype, inner=inner, plan_tolerance=1e-4)


@pytest.mark.parametrize("tile", [TILES[2], LARGE])
def test_permutation_equivariance(tile):
    x, y, cu_x, cu_y = make_pairs([(31, 50)], 40, seed=14)
    generator = torch.Generator().manual_seed(1)
    order_x, order_y = torch.randperm(31, generator=generator), torch.randperm(50, generator=generator)
    settings, kernel = Settings(0.1, 50, 1, 31, 50), _emulated(tile)
    distance, plan = run(kernel, x, y, cu_x, cu_y, settings)
    moved, moved_plan = run(kernel, x[order_x], y[order_y], cu_x, cu_y, settings)
    torch.testing.assert_close(moved, distance, rtol=1e-6, atol=0)
    bound = (5e-4 if tile.large else 1e-5) * plan.max()
    assert ((moved_plan - plan[:, order_y][:, :, order_x]).abs() <= bound).all()


def test_examples_longer_than_the_callers_bound_are_cut_and_their_other_rows_have_gradient_zero():
    """On a GPU lengths are not looked at: nothing is read beyond the bound, and no gradient is left unwritten."""
    x, y, cu_x, cu_y = make_pairs([(7, 9), (3, 2)], 24, seed=6)
    x, y = x.requires_grad_(True), y.requires_grad_(True)
    distance, plan = run(_emulated(), x, y, cu_x, cu_y, Settings(0.5, 50, 1, 4, 5))
    got = torch.autograd.grad(distance.sum(), (x, y))
    rows = torch.tensor([0, 1, 2, 3, 7, 8, 9]), torch.tensor([0, 1, 2, 3, 4, 9, 10])
    cut = [side.detach()[kept].requires_grad_(True) for side, kept in zip((x, y), rows, strict=True)]
    expected = run(_emulated(), *cut, torch.tensor([0, 4, 7]), torch.tensor([0, 5, 7]), Settings(0.5, 50, 1, 4, 5))
    right = torch.autograd.grad(expected[0].sum(), cut)
    assert torch.equal(distance, expected[0])
    assert torch.equal(plan, expected[1])
    for ours, theirs, kept in zip(got, right, rows, strict=True):
        assert torch.equal(ours, torch.zeros_like(ours).index_copy(0, kept, theirs))


def test_small_beta_and_odd_widths():
    check(_emulated(), SMALL, beta=0.01, hidden=37, plan_tolerance=1e-2)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tile", [None, LARGE])
def test_the_least_and_the_greatest_beta_stay_finite(tile, beta):
    inputs = make_pairs(SMALL, 24, seed=7)
    distance, plan = run(_emulated(tile), *inputs, Settings(beta, 50, 1, 31, 64))
    assert torch.isfinite(plan).all()
    exact = ipot.ipot_distance(*(t.double() for t in inputs[:2]), *inputs[2:], beta, backend="reference")
    torch.testing.assert_close(distance.double(), exact, rtol=2e-2 if beta < 1 else 1e-5, atol=0)


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
