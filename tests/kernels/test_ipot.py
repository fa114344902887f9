"""IPOT against a float64 oracle, the exact optimum and the authors' numbers, on every backend that runs on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden_batches import load_golden
from tests.kernels.ipot_cases import (
    SIZES,
    chosen,
    ipot_distance,
    make_pairs,
    oracle_cost,
    oracle_plan,
    oracle_potentials,
    per_example,
    transport_plan,
)
from tests.kernels.ipot_cases import each_backend as each_backend
from vlscale.errors import VlscaleError
from vlscale.kernels import ipot
from vlscale.kernels.ipot import checks, cosine_cost, reference


def check_against_oracle(inputs, beta: float, inner: int = 1, plan_tol: float = 1e-4, rtol: float = 1e-6) -> None:
    distance, plan = ipot_distance(*inputs, beta=beta, inner_iterations=inner, return_plan=True)
    assert distance.dtype == plan.dtype == torch.float32
    for i, (x, y) in enumerate(per_example(*inputs)):
        cost = oracle_cost(x, y)
        expected = oracle_plan(cost, beta, 50, inner)
        got = plan[i, : len(y), : len(x)].double().numpy()
        assert np.abs(got - expected).max() <= plan_tol * expected.max()
        assert distance[i].item() == pytest.approx((cost * expected.T).sum(), rel=rtol)
        assert not plan[i, len(y) :].any()
        assert not plan[i, :, len(x) :].any()


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_the_oracle_on_the_same_inputs(beta, dtype):
    check_against_oracle(make_pairs(SIZES, 64, seed=1, dtype=dtype), beta)


@pytest.mark.parametrize("inner", [2, 3, 5])
def test_inner_iterations(inner):
    check_against_oracle(make_pairs(SIZES, 64, seed=2), beta=0.5, inner=inner)


@pytest.mark.parametrize(("beta", "bound"), [(0.5, 3e-5), (0.1, 3e-5), (0.05, 3e-5)])
def test_plan_of_a_given_cost(beta, bound):
    cost = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(3)) * 2
    lengths, counts = torch.tensor([40, 17, 3]), torch.tensor([30, 30, 8])
    plan = transport_plan(cost, lengths, counts, beta)
    for i, (m, n) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        expected = oracle_plan(cost[i, :m, :n].numpy(), beta, 50)
        assert np.abs(plan[i, :n, :m].numpy() - expected).max() <= bound * expected.max()


def test_half_precision_against_unrounded_inputs():
    x, y, cu_x, cu_y = make_pairs(SIZES[:1] + SIZES[4:], 64, seed=4, dtype=torch.float64, themes=0)
    exact = ipot_distance(x, y, cu_x, cu_y)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(ipot_distance(x.half(), y.half(), cu_x, cu_y).double(), exact, rtol=2e-5, atol=0)
    rough = ipot_distance(x.bfloat16(), y.bfloat16(), cu_x, cu_y).double()
    torch.testing.assert_close(rough, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [1, 2])
def test_log_form_equals_plan_form(dtype, inner):
    generator = torch.Generator().manual_seed(5)
    cost = torch.rand(2, 12, 9, generator=generator, dtype=dtype)
    lengths, counts = torch.tensor([12, 5]), torch.tensor([9, 4])
    plan = transport_plan(cost, lengths, counts, 0.5, 50, inner)
    log = reference.transport_plan(cost, lengths, counts, 0.5, 50, inner, cost_range=1e9)
    if chosen() == "cpu":  # a word that costs 300 more than the others takes the log form, and no part of the plan
        far = torch.cat([cost, torch.full_like(cost[:, :1], 300)], 1)
        far[1, 5] = 300
        ours = transport_plan(far, lengths + 1, counts, 0.5, 50, inner)
        theirs = reference.transport_plan(far.double(), lengths + 1, counts, 0.5, 50, inner)
        assert (ours - theirs).abs().max() <= 5e-4 * theirs.max()
    tolerance = 5e-4 if dtype == torch.float32 else 1e-11
    assert (plan - log).abs().max() <= tolerance * plan.max()
    distance = [(cost * p.transpose(1, 2)).sum((1, 2)) for p in (plan, log)]
    torch.testing.assert_close(distance[0], distance[1], rtol=3e-5 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_small_beta_takes_the_log_form(dtype):
    inputs = make_pairs([(16, 36), (60, 30)], 64, seed=6, dtype=dtype)
    distance, plan = ipot_distance(*inputs, beta=0.01, return_plan=True)
    assert torch.isfinite(plan).all()
    for i, (x, y) in enumerate(per_example(*inputs)):
        cost = oracle_cost(x, y)
        expected = oracle_potentials(cost, 0.01, 50)
        assert np.abs(plan[i, : len(y), : len(x)].numpy() - expected).max() <= 1e-2 * expected.max()
        assert distance[i].item() == pytest.approx((cost * expected.T).sum(), rel=5e-5)


@pytest.mark.parametrize("beta", checks.BETAS)
def test_the_least_and_the_greatest_beta_stay_finite(beta):
    inputs = make_pairs(SIZES, 24, seed=7)
    distance, plan = ipot_distance(*inputs, beta=beta, return_plan=True)
    assert torch.isfinite(plan).all()
    exact = ipot.ipot_distance(*(t.double() for t in inputs[:2]), *inputs[2:], beta, backend="reference")
    torch.testing.assert_close(distance.double(), exact, rtol=2e-2 if beta < 1 else 1e-5, atol=0)


def test_large_costs_stay_finite_and_right():
    cost = torch.rand(1, 20, 15, generator=torch.Generator().manual_seed(7)) * 100
    plan = transport_plan(cost, torch.tensor([20]), torch.tensor([15]), 0.5)
    expected = oracle_potentials(cost[0].numpy(), 0.5, 50)
    assert np.abs(plan[0].numpy() - expected).max() <= 1e-2 * expected.max()
    assert plan.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("beta", "bound"), [(0.5, 1e-2), (0.1, 1e-3), (0.05, 1e-3)])
@pytest.mark.parametrize(("words", "regions"), [(16, 36), (30, 30), (128, 50)])
def test_close_to_the_exact_optimum(beta, bound, words, regions):
    linear_programme = pytest.importorskip("scipy.optimize").linprog
    x, y, cu_x, cu_y = make_pairs([(words, regions)], 64, seed=8, themes=0)
    cost = oracle_cost(x, y)
    from scipy.sparse import eye, kron, vstack

    marginals = vstack([kron(eye(words), np.ones((1, regions))), kron(np.ones((1, words)), eye(regions))])
    masses = np.concatenate([np.full(words, 1 / words), np.full(regions, 1 / regions)])
    exact = linear_programme(cost.ravel(), A_eq=marginals.tocsr(), b_eq=masses, method="highs").fun
    distance = ipot_distance(x, y, cu_x, cu_y, beta=beta).item()
    assert distance == pytest.approx(exact, rel=bound)


def test_marginals():
    _, plan = ipot_distance(*make_pairs(SIZES, 64, seed=9), return_plan=True)
    for i, (words, _regions) in enumerate(SIZES):
        torch.testing.assert_close(plan[i].sum(0)[:words] * words, torch.ones(words), rtol=0, atol=2e-6)
        assert plan[i].sum().item() == pytest.approx(1, abs=1e-6)


def test_permutation_equivariance():
    inputs = make_pairs([(11, 7)], 32, seed=14)
    order_x, order_y = torch.randperm(11), torch.randperm(7)
    distance, plan = ipot_distance(*inputs, return_plan=True)
    moved, moved_plan = ipot_distance(inputs[0][order_x], inputs[1][order_y], *inputs[2:], return_plan=True)
    torch.testing.assert_close(moved, distance, rtol=1e-6, atol=0)
    torch.testing.assert_close(moved_plan, plan[:, order_y][:, :, order_x], rtol=0, atol=1e-6)


def test_known_bounds_give_the_same_result():
    inputs = make_pairs(SIZES, 16, seed=15)
    torch.testing.assert_close(
        ipot_distance(*inputs, max_words=70, max_regions=128), ipot_distance(*inputs), rtol=1e-6, atol=0
    )


def test_gradient_is_plan_times_gradient_of_the_cost():
    x, y, cu_x, cu_y = make_pairs([(4, 3), (2, 5)], 6, seed=16, dtype=torch.float64)
    lengths, counts = cu_x.diff(), cu_y.diff()
    _, plan = ipot_distance(x, y, cu_x, cu_y, return_plan=True)
    assert not plan.requires_grad

    def surrogate(words, regions):
        cost = cosine_cost(reference._pad(words, cu_x, 4), reference._pad(regions, cu_y, 5), lengths, counts)
        return (cost * plan.transpose(1, 2)).sum((1, 2))

    x.requires_grad_(True)
    y.requires_grad_(True)
    assert torch.autograd.gradcheck(surrogate, (x, y))
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = torch.autograd.grad((surrogate(x, y) * weights).sum(), (x, y))
    got = torch.autograd.grad((ipot_distance(x, y, cu_x, cu_y) * weights).sum(), (x, y))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_autocast_does_not_reach_inside():
    inputs = make_pairs(SIZES, 64, seed=17)
    plain = ipot_distance(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ipot_distance(*inputs), plain)


def test_products_run_at_full_precision_and_the_setting_is_restored(monkeypatch):
    before, seen, product = torch.get_float32_matmul_precision(), [], torch.bmm

    def watched(*tensors):
        seen.append((torch.get_float32_matmul_precision(), torch._C._current_graph_task_id() >= 0))
        return product(*tensors)

    monkeypatch.setattr(torch, "bmm", watched)
    try:
        torch.set_float32_matmul_precision("medium")
        check_against_oracle(make_pairs(SIZES, 64, seed=18), 0.1)
        x, y, cu_x, cu_y = make_pairs(SIZES, 64, seed=18)
        ipot_distance(x.requires_grad_(True), y.requires_grad_(True), cu_x, cu_y).sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    expected = {("highest", False), ("highest", True)}  # forward and backward
    assert set(seen) == (expected if chosen() == "reference" else set())


def test_unknown_backend_names_the_known_ones():
    inputs = make_pairs([(2, 2)], 4, seed=19)
    with pytest.raises(VlscaleError, match=r"'referense'.*did you mean 'reference'.*known: auto, reference"):
        ipot_distance(*inputs, backend="referense")


@pytest.mark.parametrize("length", [0, 1, 3, 17, 64, 129, 512])
@pytest.mark.parametrize("beta", [0.5, 0.05, 0.01])
def test_all_lengths(length, beta):
    """Against the oracle at its own precision: the reference in float64, which other tests hold to the definition."""
    inputs = make_pairs(
        [(length, regions) for regions in (0, 1, 2, 15, 16, 17, 36, 64, 100)], 32, seed=length, themes=0
    )
    distance, plan = ipot_distance(*inputs, beta=beta, return_plan=True)
    exact, exact_plan = ipot.ipot_distance(
        inputs[0].double(), inputs[1].double(), *inputs[2:], beta=beta, backend="reference", return_plan=True
    )
    torch.testing.assert_close(distance.double(), exact, rtol=5e-6 if beta == 0.01 else 1e-6, atol=0)
    largest = exact_plan.amax((1, 2), keepdim=True)
    assert ((plan - exact_plan).abs() <= (1e-2 if beta == 0.01 else 1e-4) * largest).all()


@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_those_of_the_reference(inner, dtype):
    inputs = make_pairs([*SIZES, (0, 3), (3, 0)], 40, seed=21, dtype=dtype)
    x, y = (tensor.requires_grad_(True) for tensor in inputs[:2])
    exact = [tensor.detach().double().requires_grad_(True) for tensor in (x, y)]
    weights = torch.linspace(-1, 2, len(SIZES) + 2)
    got = torch.autograd.grad((ipot_distance(*inputs, inner_iterations=inner) * weights).sum(), (x, y))
    distance = ipot.ipot_distance(*exact, *inputs[2:], inner_iterations=inner, backend="reference")
    expected = torch.autograd.grad((distance * weights).sum(), exact)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_threads_and_padding_do_not_change_a_bit():
    inputs = make_pairs(SIZES * 8, 48, seed=22)
    one = ipot_distance(*inputs, return_plan=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = ipot_distance(*inputs, return_plan=True, max_words=77, max_regions=111)
    finally:
        torch.set_num_threads(before)
    _, tall, wide = one[1].shape
    assert not two[1][:, tall:].any()
    assert not two[1][:, :, wide:].any()
    bits = {"rtol": 0, "atol": 0} if chosen() == "cpu" else {"rtol": 1e-5, "atol": 1e-7}  # PyTorch sums as it likes
    torch.testing.assert_close(one[0], two[0], **bits)
    torch.testing.assert_close(one[1], two[1][:, :tall, :wide], **bits)


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-6), ("f64", 1e-10)])
def test_uniter_golden_plans(kind, tolerance):
    data = load_golden("ipot")
    cases = sorted({name.split(".")[0] for name in data if name.startswith("case")})
    assert cases
    for case in cases:
        beta, iterations, inner = data[f"{case}.params_beta_iter_k"].tolist()
        cost = data[f"{case}.C"].to(torch.float32 if kind == "f32" else torch.float64)
        lengths, counts = data[f"{case}.x_len"], data[f"{case}.y_len"]
        plan = transport_plan(cost, lengths, counts, beta, int(iterations), int(inner))
        torch.testing.assert_close(plan, data[f"{case}.T_{kind}"], rtol=0, atol=tolerance)
        distance = (cost * plan.transpose(1, 2)).sum((1, 2))
        torch.testing.assert_close(distance, data[f"{case}.dist_{kind}"], rtol=0, atol=tolerance)


@pytest.mark.golden
def test_uniter_golden_cosine_cost():
    data = load_golden("ipot")
    x, y = data["cosine.x"], data["cosine.y"]
    full = [torch.full((len(t),), t.shape[1]) for t in (x, y)]
    torch.testing.assert_close(cosine_cost(x, y, *full), data["cosine.cost"], rtol=0, atol=1e-6)
