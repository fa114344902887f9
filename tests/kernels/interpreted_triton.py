"""Tests that need Triton's interpreter, which is chosen by the environment before Triton is imported.

``test_ipot_triton.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.golden_batches import load_golden
from tests.kernels.ipot_cases import make_pairs
from tests.kernels.test_ipot_cuda import SMALL, check
from vlscale.kernels.ipot import reference, triton_backend
from vlscale.kernels.ipot.function import Settings, run
from vlscale.kernels.ipot.triton_backend import SIZES, TritonKernel, transport_plan

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


@pytest.mark.parametrize("size", SIZES)
def test_every_tile_to_its_brim(size):
    check(TritonKernel(), [size, (5, 3)], 0.5, hidden=37, plan_tolerance=1e-4)


@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_one_iteration(beta):
    x, y, cu_x, cu_y = make_pairs([(6, 5), (1, 1), (0, 2)], 40, seed=6)
    distance, plan = run(TritonKernel(), x, y, cu_x, cu_y, Settings(beta, 1, 1, 6, 5))
    exact = reference.ipot_packed(x.double(), y.double(), cu_x, cu_y, Settings(beta, 1, 1, 6, 5))
    torch.testing.assert_close(distance.double(), exact[0], rtol=5e-6, atol=0)
    torch.testing.assert_close(plan.double(), exact[1], rtol=0, atol=1e-5)


def test_neighbours_do_not_leak():
    words, regions, cu_words, cu_regions = make_pairs([(5, 6), (3, 4), (4, 9)], 40, seed=4)
    settings = Settings(0.5, 50, 1, 8, 12)
    good, good_plan = run(TritonKernel(), words, regions, cu_words, cu_regions, settings)
    words[5:8], regions[6:10] = float("nan"), float("inf")
    distance, plan = run(TritonKernel(), words, regions, cu_words, cu_regions, settings)
    for example in (0, 2):
        assert distance[example] == good[example]
        assert torch.equal(plan[example], good_plan[example])


def test_zero_vectors_cost_one_and_have_finite_gradients():
    x, y, cu_x, cu_y = make_pairs([(5, 6), (3, 4)], 40, seed=4)
    x[1], y[7:10] = 0, 0
    x, y = x.requires_grad_(True), y.requires_grad_(True)
    settings = Settings(0.5, 50, 1, 5, 6)
    distance, plan = run(TritonKernel(), x, y, cu_x, cu_y, settings)
    distance.sum().backward()
    exact = [tensor.detach().double().requires_grad_(True) for tensor in (x, y)]
    expected, expected_plan = reference.ipot_packed(*exact, cu_x, cu_y, settings)
    expected.sum().backward()
    torch.testing.assert_close(distance.double(), expected, rtol=5e-6, atol=0)
    torch.testing.assert_close(plan.double(), expected_plan, rtol=0, atol=1e-5)
    for ours, right in zip((x, y), exact, strict=True):
        assert torch.isfinite(ours.grad).all()
        assert (ours.grad - right.grad).abs().max() <= 5e-5 * right.grad.abs().max()
    assert x.grad[1].any()


def test_the_order_of_words_and_regions_does_not_matter():
    x, y, cu_x, cu_y = make_pairs([(20, 30)], 40, seed=7)
    settings = Settings(0.5, 50, 1, 20, 30)
    distance, plan = run(TritonKernel(), x, y, cu_x, cu_y, settings)
    generator = torch.Generator().manual_seed(8)
    words, regions = (torch.randperm(length, generator=generator) for length in (20, 30))
    turned, turned_plan = run(TritonKernel(), x[words], y[regions], cu_x, cu_y, settings)
    torch.testing.assert_close(turned, distance, rtol=1e-6, atol=0)
    difference = (turned_plan[0] - plan[0][regions][:, words]).abs().max()
    assert difference <= 1e-5 * plan.max()


def test_padding_of_the_plan_changes_no_bit_and_is_zero():
    inputs = make_pairs(SMALL, 40, seed=5)
    tight = run(TritonKernel(), *inputs, Settings(0.5, 50, 1, 31, 64))
    wide = run(TritonKernel(), *inputs, Settings(0.5, 50, 1, 32, 64))
    assert torch.equal(tight[0], wide[0])
    assert torch.equal(tight[1], wide[1][:, :, :31])
    assert not wide[1][:, :, 31:].any()
    for example, (words, regions) in enumerate(SMALL):
        assert not tight[1][example, regions:].any()
        assert not tight[1][example, :, words:].any()


def test_rows_beyond_a_bound_that_is_too_small_have_no_gradient(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, float("nan")))
    sizes = [(40, 3), (2, 30), (6, 5)]
    x, y, cu_x, cu_y = make_pairs(sizes, 40, seed=10)
    x, y = x.requires_grad_(True), y.requires_grad_(True)
    run(TritonKernel(), x, y, cu_x, cu_y, Settings(0.5, 50, 1, 4, 6))[0].sum().backward()
    for rows, cu, bound in ((x, cu_x, 4), (y, cu_y, 6)):
        assert torch.isfinite(rows.grad).all()
        for first, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            assert rows.grad[first : min(first + bound, end)].any(1).all()
            assert not rows.grad[min(first + bound, end) : end].any()


LENGTHS, COUNTS = torch.tensor([20, 7, 0, 3, 1]), torch.tensor([15, 15, 3, 0, 9])


def costs(scale, dtype=torch.float32):
    """Of ``LENGTHS`` and ``COUNTS``, with rubbish where there is no pair."""
    cost = scale * torch.rand(5, 20, 15, generator=torch.Generator().manual_seed(9))
    for example, (words, regions) in enumerate(zip(LENGTHS.tolist(), COUNTS.tolist(), strict=True)):
        cost[example, words:], cost[example, :, regions:] = float("nan"), float("inf")
    return cost.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "beta", "bound"), [(1, 0.5, 3e-5), (2, 0.05, 3e-5), (2, 0.01, 1e-2), (100, 0.5, 1e-3)]
)
def test_plans_of_given_costs(scale, beta, bound, dtype):
    cost = costs(scale, dtype)
    for inner in (1, 2):
        plan = transport_plan(cost, LENGTHS, COUNTS.int(), beta, 50, inner)
        right = reference.transport_plan(cost.double(), LENGTHS, COUNTS, beta, 50, inner)
        assert plan.dtype == torch.float32
        assert ((plan - right).abs() <= bound * right.amax((1, 2), keepdim=True)).all()
        assert torch.equal(plan == 0, right.float() == 0) or scale * 50 > 60 * beta  # padding, but for what underflows


def test_a_wide_cost_takes_the_log_form_in_its_own_example_alone():
    cost = costs(1)
    alone = transport_plan(cost, LENGTHS, COUNTS, 0.5)
    cost[1, 3, 5] = 300
    beside = transport_plan(cost, LENGTHS, COUNTS, 0.5)
    assert torch.isfinite(beside).all()
    assert torch.equal(alone[0], beside[0])


def test_a_constant_cost_has_a_uniform_plan_and_nothing_has_none():
    plan = transport_plan(torch.full((1, 4, 6), 7.5).transpose(1, 2), torch.tensor([6]), torch.tensor([4]), 0.5)
    torch.testing.assert_close(plan, torch.full((1, 4, 6), 1 / 24))
    assert transport_plan(torch.ones(0, 3, 2), torch.ones(0).long(), torch.ones(0).long()).shape == (0, 2, 3)
    assert transport_plan(torch.ones(2, 0, 2), torch.zeros(2).long(), torch.ones(2).long()).shape == (2, 2, 0)


@pytest.mark.golden
def test_uniter_golden_plans():
    data = load_golden("ipot")
    cases = sorted({name.split(".")[0] for name in data if name.startswith("case")})
    assert cases
    for case in cases:
        beta, iterations, inner = data[f"{case}.params_beta_iter_k"].tolist()
        cost, lengths, counts = (data[f"{case}.{name}"] for name in ("C", "x_len", "y_len"))
        plan = transport_plan(cost.float(), lengths, counts, beta, int(iterations), int(inner))
        torch.testing.assert_close(plan, data[f"{case}.T_f32"], rtol=0, atol=1e-6)
        distance = (cost.float() * plan.transpose(1, 2)).sum((1, 2))
        torch.testing.assert_close(distance, data[f"{case}.dist_f32"], rtol=0, atol=1e-6)
