"""IPOT against a float64 oracle, the exact optimum, the authors' numbers, and its degenerate cases, on every backend
that runs on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_batches import load_golden
from vlscale.errors import VlscaleError
from vlscale.kernels import ipot
from vlscale.kernels.ipot import backends, cosine_cost, reference
from vlscale.ragged import cumulative

CPU = torch.device("cpu")
backend = "reference"


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def _each_backend(request, monkeypatch):
    why = backends.problem(request.param, CPU)
    if why:
        pytest.skip(why)
    monkeypatch.setitem(globals(), "backend", request.param)


def ipot_distance(*arguments, **options):
    return ipot.ipot_distance(*arguments, **{"backend": backend, **options})


def ipot_distance_padded(*arguments, **options):
    return ipot.ipot_distance_padded(*arguments, **{"backend": backend, **options})


def transport_plan(*arguments, **options):
    return ipot.transport_plan(*arguments, **{"backend": backend, **options})


def oracle_plan(cost_TR: np.ndarray, beta: float, iterations: int, inner_iterations: int = 1) -> np.ndarray:
    """The definition, in float64 and one example at a time: plan [R, T] of cost [T, R]."""
    words, regions = cost_TR.shape
    kernel = np.exp(-(cost_TR.T.astype(np.float64)) / beta)
    plan, sigma = np.ones((regions, words)), np.full(words, 1 / words)
    for _ in range(iterations):
        q = kernel * plan
        for _ in range(inner_iterations):
            delta = 1 / (regions * (q @ sigma))
            sigma = 1 / (words * (q.T @ delta))
        plan = delta[:, None] * q * sigma[None]
    return plan


def oracle_potentials(cost_TR: np.ndarray, beta: float, iterations: int) -> np.ndarray:
    """The same plan [R, T] through extrapolated potentials, for steps too small for the plan itself."""
    words, regions = cost_TR.shape
    scaled = cost_TR.T.astype(np.float64) / beta
    before, last = np.zeros(words), np.zeros(words)
    for t in range(1, iterations + 1):
        ahead = np.full(words, -np.log(words)) if t == 1 else 2 * last - before
        f = -np.log(regions) - np.logaddexp.reduce(ahead[None] - t * scaled, axis=1)
        before, last = last, -np.log(words) - np.logaddexp.reduce(f[:, None] - t * scaled, axis=0)
    return np.exp(f[:, None] + last[None] - iterations * scaled)


def make_pairs(sizes: list[tuple[int, int]], hidden: int, seed: int, dtype=torch.float32, themes: float = 1.0):
    """Packed words and regions; themes > 0 gives them shared components, so that costs spread as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    words, regions = zip(*sizes, strict=True)
    cu_words, cu_regions = cumulative(torch.tensor(words)), cumulative(torch.tensor(regions))
    shared = themes * torch.randn(8, hidden, generator=generator)

    def draw(count: int) -> Tensor:
        pick = torch.randint(8, (count,), generator=generator)
        return (shared[pick] + torch.randn(count, hidden, generator=generator)).to(dtype)

    return draw(sum(words)), draw(sum(regions)), cu_words, cu_regions


def oracle_cost(words: Tensor, regions: Tensor) -> np.ndarray:
    x, y = words.double().numpy(), regions.double().numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-5)
    y = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-5)
    return 1 - x @ y.T


def per_example(words, regions, cu_words, cu_regions):
    for i in range(cu_words.numel() - 1):
        yield words[cu_words[i] : cu_words[i + 1]], regions[cu_regions[i] : cu_regions[i + 1]]


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


SIZES = [(16, 36), (1, 5), (7, 1), (1, 1), (33, 20), (60, 100)]


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_the_oracle_on_the_same_inputs(beta, dtype):
    check_against_oracle(make_pairs(SIZES, 64, seed=1, dtype=dtype), beta)


@pytest.mark.parametrize("inner", [2, 3])
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
    if backend == "cpu":  # a word that costs 300 more than the others takes the log form, and no part of the plan
        far = torch.cat([cost, torch.full_like(cost[:, :1], 300)], 1)
        far[1, 5] = 300
        ours = transport_plan(far, lengths + 1, counts, 0.5, 50, inner)
        theirs = reference.transport_plan(far.double(), lengths + 1, counts, 0.5, 50, inner)
        assert (ours - theirs).abs().max() <= 5e-4 * theirs.max()
    tolerance = 5e-4 if dtype == torch.float32 else 1e-11
    assert (plan - log).abs().max() <= tolerance * plan.max()
    distance = [(cost * p.transpose(1, 2)).sum((1, 2)) for p in (plan, log)]
    torch.testing.assert_close(distance[0], distance[1], rtol=3e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_small_beta_takes_the_log_form():
    inputs = make_pairs([(16, 36), (60, 30)], 64, seed=6)
    distance, plan = ipot_distance(*inputs, beta=0.01, return_plan=True)
    assert torch.isfinite(plan).all()
    for i, (x, y) in enumerate(per_example(*inputs)):
        cost = oracle_cost(x, y)
        expected = oracle_potentials(cost, 0.01, 50)
        assert np.abs(plan[i, : len(y), : len(x)].numpy() - expected).max() <= 1e-2 * expected.max()
        assert distance[i].item() == pytest.approx((cost * expected.T).sum(), rel=5e-5)


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


def test_uniform_plan_when_one_side_has_one_member_or_the_cost_is_constant():
    inputs = make_pairs([(1, 9), (9, 1)], 32, seed=10)
    distance = ipot_distance(*inputs)
    for i, (x, y) in enumerate(per_example(*inputs)):
        assert distance[i].item() == pytest.approx(oracle_cost(x, y).mean(), rel=1e-6)
    plan = transport_plan(torch.full((1, 6, 4), 0.7), torch.tensor([6]), torch.tensor([4]))
    torch.testing.assert_close(plan, torch.full((1, 4, 6), 1 / 24))


def test_empty_sides_have_distance_and_gradient_zero():
    x, y, _, _ = make_pairs([(4, 6)], 16, seed=11)
    x.requires_grad_(True)
    y.requires_grad_(True)
    cu_x, cu_y = torch.tensor([0, 0, 3, 4]), torch.tensor([0, 2, 2, 6])
    distance, plan = ipot_distance(x, y, cu_x, cu_y, return_plan=True)
    assert distance[0] == 0
    assert distance[1] == 0
    assert not plan[:2].any()
    (distance * torch.tensor([5.0, 5.0, 1.0])).sum().backward()
    assert not x.grad[:3].any()
    assert not y.grad[:2].any()
    assert x.grad[3:].any()
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_no_words_or_no_examples_at_all(beta):
    x, y = torch.zeros(0, 8, requires_grad=True), torch.randn(3, 8)
    distance = ipot_distance(x, y, torch.tensor([0, 0]), torch.tensor([0, 3]), beta=beta)
    distance.sum().backward()
    assert distance.tolist() == [0]
    assert ipot_distance(x, y[:0], torch.tensor([0]), torch.tensor([0]), beta=beta).shape == (0,)


def test_zero_vectors_cost_one_and_have_finite_gradients():
    x, y = torch.randn(3, 8), torch.randn(4, 8)
    x[1] = 0
    x.requires_grad_(True)
    cost = cosine_cost(x[None], y[None], torch.tensor([3]), torch.tensor([4]))
    torch.testing.assert_close(cost[0, 1], torch.ones(4))
    ipot_distance(x, y, torch.tensor([0, 3]), torch.tensor([0, 4])).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_identical_sides():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(12))
    distance = ipot_distance(x, x, torch.tensor([0, 5]), torch.tensor([0, 5]), beta=0.1)
    assert abs(distance.item()) < 1e-4


@pytest.mark.parametrize("beta", [0.5, 0.01])
def test_padding_may_hold_anything(beta):
    sizes = [(5, 3), (2, 6), (0, 4), (4, 0)]
    words, regions, cu_words, cu_regions = make_pairs(sizes, 16, seed=13)
    x = reference._pad(words, cu_words, 9)
    y = reference._pad(regions, cu_regions, 8)
    outside_x = torch.arange(9) >= cu_words.diff()[:, None]
    outside_y = torch.arange(8) >= cu_regions.diff()[:, None]
    x[outside_x], y[outside_y] = float("nan"), float("inf")
    x.requires_grad_(True)
    y.requires_grad_(True)
    distance, plan = ipot_distance_padded(x, y, cu_words.diff(), cu_regions.diff(), beta, return_plan=True)
    distance.sum().backward()
    packed, packed_plan = ipot_distance(words, regions, cu_words, cu_regions, beta, return_plan=True)
    torch.testing.assert_close(distance, packed, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plan[:, :6, :5], packed_plan, rtol=1e-5, atol=1e-7)
    assert not x.grad[outside_x].any()
    assert not y.grad[outside_y].any()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(y.grad).all()


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
    before, seen, product = torch.get_float32_matmul_precision(), set(), torch.bmm

    def watched(*tensors):
        seen.add(torch.get_float32_matmul_precision())
        return product(*tensors)

    monkeypatch.setattr(torch, "bmm", watched)
    try:
        torch.set_float32_matmul_precision("medium")
        check_against_oracle(make_pairs(SIZES, 64, seed=18), 0.1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ({"highest"} if backend == "reference" else set())


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
    if backend == "cpu":
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1][:, : one[1].shape[1], : one[1].shape[2]])


X, Y, CU = torch.ones(3, 4), torch.ones(3, 4), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((X, Y, CU, CU), {"beta": 0.0}, "beta is 0.0, expected a positive"),
        ((X, Y, CU, CU), {"beta": float("nan")}, "beta is nan"),
        ((X, Y, CU, CU), {"iterations": 0}, "iterations is 0"),
        ((X, Y, CU, CU), {"inner_iterations": -1}, "inner_iterations is -1"),
        ((X[0], Y, CU, CU), {}, r"words is torch.float32 \[4\], expected a float tensor \[N, H\]"),
        ((X.long(), Y, CU, CU), {}, "words is torch.int64"),
        ((X, Y[:, :3].contiguous(), CU, CU), {}, "words has width 4, regions 3"),
        ((X, Y[:, :3], CU, CU), {}, r"regions is not contiguous \(strides \[4, 1\]\): hand over regions.contiguous"),
        ((X.T, Y, CU, CU), {}, "words is not contiguous"),
        ((X[:, :0], Y[:, :0], CU, CU), {}, "above 0"),
        ((X.half(), Y, CU, CU), {}, "one dtype"),
        ((X.to("meta"), Y, CU.to("meta"), CU), {}, "one device"),
        ((X, Y, CU.to("meta"), CU), {}, "cu_words is on meta, words on cpu"),
        ((X, Y, CU.float(), CU), {}, "cu_words is torch.float32"),
        ((X, Y, CU[:0], CU), {}, r"cu_words is torch.int64 \[0\]"),
        ((X, Y, CU, CU[[0, 2]]), {}, "cu_words is of 2 examples, cu_regions of 1"),
        ((X, Y, torch.tensor([0, 4, 3]), CU), {}, "cu_words falls after example 1: a negative length"),
        ((X, Y, torch.tensor([0, 1, 2]), CU), {}, "from 0 to 2, expected 0 to 3"),
        ((X, Y, torch.tensor([1, 2, 3]), CU), {}, "from 1 to 3"),
        ((X, Y, CU, CU), {"max_words": 1, "max_regions": 2}, "an example has 2 words, max_words is 1"),
        ((X, Y, CU, CU), {"max_words": 2}, "give both"),
        ((X, Y, CU, CU), {"max_words": -1, "max_regions": 2}, "max_words is -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(arguments, options, says):
    with pytest.raises(ValueError, match=says):
        ipot_distance(*arguments, **options)


def test_mistakes_of_padded_inputs_and_costs():
    x, y, two = torch.ones(2, 3, 4), torch.ones(2, 5, 4), torch.tensor([1, 2])
    for arguments, says in (
        ((x, y, torch.tensor([1, 4]), two), r"lengths of words lie in 1..4, expected 0..3"),
        ((x, y, two, torch.tensor([-1, 4])), r"lengths of regions lie in -1..4"),
        ((x, y[:1], two, two[:1]), "words is of 2 examples, regions of 1"),
        ((x[0], y, two, two), r"words is torch.float32 \[3, 4\]"),
        ((x, y, two[:1], two), r"expected int32 or int64 \[2\]"),
    ):
        with pytest.raises(ValueError, match=says):
            ipot_distance_padded(*arguments)
    with pytest.raises(ValueError, match=r"region_counts lie in 1..6, expected 0..5"):
        transport_plan(torch.ones(2, 3, 5), two, torch.tensor([1, 6]))
    with pytest.raises(ValueError, match="beta is -1"):
        transport_plan(torch.ones(2, 3, 5), two, two, beta=-1)
    with pytest.raises(ValueError, match=r"cost is torch.float32 \[3, 5\]"):
        transport_plan(torch.ones(3, 5), two, two)


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
