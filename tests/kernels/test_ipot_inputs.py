"""What IPOT is handed: empty sides, zero vectors, padding of any content, mistakes, lengths that do not fit; on every
backend that runs on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.ipot_cases import (
    chosen,
    ipot_distance,
    ipot_distance_padded,
    make_pairs,
    oracle_cost,
    per_example,
    transport_plan,
)
from tests.kernels.ipot_cases import each_backend as each_backend
from vlscale.kernels.ipot import checks, cosine_cost, function, reference


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


X, Y, CU = torch.ones(3, 4), torch.ones(3, 4), torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((X, Y, CU, CU), {"beta": 0.0}, "beta is 0.0, expected a positive"),
        ((X, Y, CU, CU), {"beta": float("nan")}, "beta is nan"),
        ((X, Y, CU, CU), {"beta": 1e-38}, r"beta is 1e-38, expected a positive number in 1e-06..1e\+06"),
        ((X, Y, CU, CU), {"beta": 1e300}, "beta is 1e"),
        ((X, Y, CU, CU), {"beta": "0.5"}, "beta is '0.5' of type str, expected a number"),
        ((X, Y, CU, CU), {"beta": None}, "beta is None of type NoneType"),
        ((X, Y, CU, CU), {"iterations": 2**32 + 1}, "iterations is 4294967297, expected .* at most 2147483647"),
        ((X, Y, CU, CU), {"inner_iterations": 2.0}, "inner_iterations is 2.0, expected a whole number"),
        (([[1.0]], Y, CU, CU), {}, "words is of type list, expected a tensor"),
        ((X, Y, [0, 1, 3], CU), {}, "cu_words is of type list"),
        ((X, Y, CU, CU), {"max_words": 2.5, "max_regions": 2}, "max_words is 2.5, expected a whole number"),
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
    with pytest.raises(ValueError, match="lengths of words is of type list"):
        ipot_distance_padded(x, y, [1, 2], two)
    with pytest.raises(ValueError, match="cost is of type list"):
        transport_plan([[[1.0]]], two, two)
    with pytest.raises(ValueError, match=r"region_counts lie in 1..6, expected 0..5"):
        transport_plan(torch.ones(2, 3, 5), two, torch.tensor([1, 6]))
    with pytest.raises(ValueError, match="beta is -1"):
        transport_plan(torch.ones(2, 3, 5), two, two, beta=-1)
    with pytest.raises(ValueError, match=r"cost is torch.float32 \[3, 5\]"):
        transport_plan(torch.ones(3, 5), two, two)


def test_lengths_are_looked_at_where_a_gpu_is_waited_for_anyway():
    """The two functions that wait, on CPU tensors: what is wrong is told, what is right is counted."""
    assert checks.packed_bounds(X, Y, CU, CU[[0, 0, 2]]) == (2, 3)
    assert checks.packed_bounds(X[:0], Y[:0], CU[:1], CU[:1]) == (0, 0)
    for wrong, says in (
        ([0, 2, 7], "cu_words goes from 0 to 7, expected 0 to 3"),
        ([1, 2, 3], "cu_words goes from 1 to 3"),
        ([0, 4, 3], "cu_words falls: an example has a negative length"),
        ([0], "cu_words goes from 0 to 0, expected 0 to 3"),
    ):
        with pytest.raises(ValueError, match=says):
            checks.packed_bounds(X, Y, torch.tensor(wrong), CU)
    x, y, counts = torch.ones(2, 4, 3), torch.ones(2, 5, 3), torch.tensor([0, 5])
    assert checks.padded_counts(x, y, torch.tensor([1, 4]), counts) == (5, 5)
    assert checks.padded_counts(x[:0], y[:0], counts[:0], counts[:0]) == (0, 0)
    with pytest.raises(ValueError, match=r"lengths of words lie in 3..7, expected 0..4"):
        checks.padded_counts(x, y, torch.tensor([7, 3]), counts)
    with pytest.raises(ValueError, match=r"lengths of regions lie in -1..3, expected 0..5"):
        checks.padded_counts(x, y, torch.tensor([1, 3]), torch.tensor([-1, 3]))


def test_lengths_that_were_not_looked_at_are_refused_before_anything_is_packed(monkeypatch):
    """As on a GPU, where the first checks leave lengths alone."""
    monkeypatch.setattr(checks, "_check_cumulative", lambda *_: None)
    monkeypatch.setattr(checks, "check_lengths", lambda *_: None)
    with pytest.raises(ValueError, match="cu_words goes from 0 to 7, expected 0 to 3"):
        ipot_distance(X, Y, torch.tensor([0, 2, 7]), CU)
    if chosen() != "reference":  # it packs nothing, and masks out what lies beyond the tensors
        with pytest.raises(ValueError, match=r"lengths of words lie in 3..7, expected 0..4"):
            ipot_distance_padded(torch.ones(2, 4, 3), torch.ones(2, 5, 3), torch.tensor([7, 3]), torch.tensor([5, 5]))


@pytest.mark.parametrize("lengths", [[3, 0, 4, 1], [0, 0, 0, 0], [4, 4, 4, 4]])
def test_packed_rows_are_the_valid_ones_and_pass_their_gradient_on(lengths):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    rows = torch.randn(4, 6, 4).transpose(1, 2).requires_grad_(True)
    mask = reference.valid(lengths, 4)
    packed = function.packed_rows(rows, lengths, int(lengths.sum()))
    assert torch.equal(packed, rows[mask])
    packed.sum().backward()
    assert torch.equal(rows.grad, mask[..., None].expand(4, 4, 6).float())
