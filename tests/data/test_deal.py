from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.bench.bench_plan import demo_lengths, load_lengths, ours
from tests.data.toy import toy_lengths
from vlscale.data.deal import Rule, accumulation, deal, deal_hand, fitting_accumulation, straggler
from vlscale.data.laying import lay_evenly, lay_in_runs
from vlscale.data.plan import Plan, PlanSettings
from vlscale.errors import VlscaleError

ROWS = ("texts", "images", "passes", "examples", "labels", "group")


def plan_of(lengths=None, mix=None, **changes):
    if "global_batch_tokens" not in changes:
        changes.setdefault("global_batch_examples", 24)
    lengths = toy_lengths() if lengths is None else lengths
    return Plan([(lengths, mix or {"mlm": 1, "itm": 1})], PlanSettings(seed=5, **changes))


def steps_of(plan, count):
    position = plan.start()
    for _ in range(count):
        step, position = plan.step(position)
        yield step


def check(step, dealt, world_size, gas, ceiling):
    """The promises of ``deal``, whatever the step."""
    assert len(dealt) == world_size
    assert all([micro.micro for micro in rank] == list(range(gas)) for rank in dealt)
    flat = [micro for rank in dealt for micro in rank]
    real = [micro for micro in flat if micro.weight == 1.0]
    costs = dict(zip(zip(step.passes.tolist(), step.examples.tolist(), strict=True), step.costs.tolist(), strict=True))
    group_costs = np.bincount(step.group, weights=step.costs)
    for micro in flat:
        assert len(micro) > 0
        assert (micro.step, micro.task, micro.dataset) == (step.index, step.task, step.dataset)
        keys = zip(micro.passes.tolist(), micro.examples.tolist(), strict=True)
        assert micro.tokens == sum(costs[key] for key in keys) <= ceiling
        if micro.weight != 1.0:
            assert micro.weight == 0.0
            assert len(set(micro.group.tolist())) == 1
            assert micro.tokens == group_costs.min()
    # Every example exactly once, groups whole, everything that belongs to it beside it.
    groups = [set(micro.group.tolist()) for micro in real]
    assert sum(map(len, groups)) == len(set.union(*groups))
    columns = {name: np.concatenate([getattr(micro, name) for micro in real]) for name in ROWS}
    back = np.lexsort([columns["examples"], columns["passes"], columns["group"]])
    there = np.lexsort([step.examples, step.passes, step.group])
    for name in ROWS:
        assert np.array_equal(columns[name][back], getattr(step, name)[there]), name
        assert columns[name].dtype == getattr(step, name).dtype


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("ceiling", [140, 200, 500, 5000])
@pytest.mark.parametrize("changes", [{}, {"itm_group": 3}, {"global_batch_tokens": 700}])
def test_union_of_the_hands_is_the_step(world_size, ceiling, changes):
    plan = plan_of(micro_batch_tokens=ceiling, itm_replace="both", **changes)
    gas = accumulation(plan, world_size)
    for step in steps_of(plan, 8):
        dealt = deal(step, world_size, gas, ceiling)
        check(step, dealt, world_size, gas, ceiling)
        for rank in range(world_size):
            for one, other in zip(dealt[rank], deal_hand(step, rank, world_size, gas, ceiling), strict=True):
                assert (one.weight, one.tokens) == (other.weight, other.tokens)
                assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ROWS)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 8),
    spare=st.integers(0, 400),
    examples=st.integers(1, 12),
    group=st.integers(1, 4),
    seed=st.integers(0, 1000),
    budget=st.one_of(st.none(), st.integers(0, 2000)),
)
def test_accumulation_always_suffices(world_size, spare, examples, group, seed, budget):
    lengths = toy_lengths(images=15, seed=seed)
    changes = {"itm_group": group, "itm_replace": ("image", "text", "both")[seed % 3]}
    probe = plan_of(lengths, global_batch_examples=examples * group, **changes)
    largest = max(probe.sources["toy"].heaviest(task, probe.settings.group_of(task)) for task in ("mlm", "itm"))
    ceiling = largest + spare
    changes |= {"micro_batch_tokens": ceiling}
    if budget is None:
        changes |= {"global_batch_examples": examples * group}
    else:
        changes |= {"global_batch_tokens": largest + budget}
    plan = plan_of(lengths, **changes)
    try:
        gas = accumulation(plan, world_size)
    except VlscaleError as error:
        assert "more processes than examples" in str(error)  # noqa: PT017
        return
    for step in steps_of(plan, 12):
        check(step, deal(step, world_size, gas, ceiling), world_size, gas, ceiling)
        assert fitting_accumulation(step, world_size, ceiling) <= gas


def test_accumulation_is_not_wasteful():
    """Steps in tokens: one micro-step more than the tokens need, at most."""
    lengths = toy_lengths(images=4000, texts_per_image=(1, 2))
    for world_size in (1, 2, 8):
        plan = plan_of(lengths, mix={"mlm": 1}, global_batch_tokens=20_000, micro_batch_tokens=1000)
        assert accumulation(plan, world_size) <= -(-20_000 // (1000 * world_size)) + 1
    huge = plan_of(lengths, mix={"mlm": 1}, global_batch_tokens=20_000, micro_batch_tokens=100_000)
    assert accumulation(huge, 8) == 1


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_dealing_is_balanced(world_size):
    plan = plan_of(toy_lengths(images=4000), mix={"itm": 1}, global_batch_examples=1000, micro_batch_tokens=2000)
    gas = accumulation(plan, world_size)
    for step in steps_of(plan, 4):
        dealt = deal(step, world_size, gas, 2000)
        assert straggler(dealt) < 1.01
        for micro in range(gas):  # ranks wait for each other in every micro-step, too
            tokens = [rank[micro].tokens for rank in dealt]
            assert max(tokens) < 1.1 * np.mean(tokens)


def test_straggler():
    plan = plan_of(mix={"mlm": 1}, global_batch_examples=2)
    dealt = deal(next(steps_of(plan, 1)), 1, 2, 1000)
    uneven = [[dataclasses.replace(dealt[0][0], tokens=30)], [dataclasses.replace(dealt[0][1], tokens=10)]]
    assert straggler(uneven) == 1.5
    assert straggler(dealt) == 1.0


def test_fewer_groups_than_slots():
    plan = plan_of(mix={"mlm": 1}, global_batch_examples=3)
    step = next(steps_of(plan, 1))
    dealt = deal(step, 2, 3, 10_000)
    check(step, dealt, 2, 3, 10_000)
    weights = [[micro.weight for micro in rank] for rank in dealt]
    assert np.sum(weights) == 3
    assert weights[0][0] == weights[1][0] == 1.0  # empty slots come last


def test_order_within_a_micro_batch_is_the_steps():
    step = next(steps_of(plan_of(mix={"itm": 1}, itm_group=4), 1))
    for rank in deal(step, 2, 2, 10_000):
        for micro in rank:
            places = [int(np.flatnonzero(step.examples == example)[0]) for example in micro.examples]
            assert places == sorted(places)


def test_fitting_accumulation_is_the_least():
    for step in steps_of(plan_of(), 5):
        gas = fitting_accumulation(step, 2, 150)
        deal(step, 2, gas, 150)
        if gas > 1:
            with pytest.raises(VlscaleError, match=r"exceeds batch\.micro_batch_tokens 150"):
                deal(step, 2, gas - 1, 150)
    with pytest.raises(VlscaleError, match="smaller than one example of dataset toy"):
        fitting_accumulation(step, 2, 3)


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 8),
    spare=st.integers(1, 900),
    group=st.integers(1, 4),
    seed=st.integers(0, 1000),
    budget=st.integers(0, 4000),
)
def test_padded_accumulation_always_suffices(world_size, spare, group, seed, budget):
    """Longest x examples stays under the ceiling in every micro-batch, at the accumulation that the bound gives."""
    lengths = toy_lengths(images=60, seed=seed, regions=(2, 30))
    changes = {"itm_group": group, "itm_replace": ("image", "text", "both")[seed % 3], "mode": "padded"}
    probe = plan_of(lengths, global_batch_examples=group, **changes)
    largest = max(probe.settings.group_of(task) * probe.sources["toy"].heaviest(task, 1) for task in ("mlm", "itm"))
    ceiling = largest + spare
    plan = plan_of(lengths, micro_batch_tokens=ceiling, global_batch_tokens=largest + budget, **changes)
    try:
        gas = accumulation(plan, world_size)
    except VlscaleError as error:
        assert "more processes than examples" in str(error)  # noqa: PT017
        return
    rule = Rule("padded", 64)
    for step in steps_of(plan, 8):
        dealt = deal(step, world_size, gas, ceiling, rule)
        check(step, dealt, world_size, gas, ceiling)
        assert max(micro.padded for hand in dealt for micro in hand) <= ceiling
        assert fitting_accumulation(step, world_size, ceiling, rule) <= gas


def test_padded_micro_batches_hold_examples_of_like_length():
    lengths = toy_lengths(images=4000, texts_per_image=(1, 1), regions=(2, 60))
    plan = plan_of(lengths, mix={"mlm": 1}, global_batch_tokens=60_000, micro_batch_tokens=2000, mode="padded")
    gas = accumulation(plan, 8)
    for step in steps_of(plan, 2):
        shares = {}
        for mode in ("padded", "packed"):
            flat = [micro for hand in deal(step, 8, gas, 2000, Rule(mode)) for micro in hand]
            shares[mode] = 1 - sum(micro.tokens for micro in flat) / sum(micro.padded for micro in flat)
        assert shares["padded"] < 0.06 < 0.3 < shares["packed"]


def test_runs_are_as_even_as_they_can_be():
    """The smallest largest run, against all ways of cutting."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        longest, sizes = rng.integers(1, 30, 8), np.full(8, int(rng.integers(1, 4)))
        found = lay_in_runs(longest, sizes, 3)
        cost = max(longest[found == b].max() * sizes[found == b].sum() for b in set(found.tolist()))
        falling = np.sort(longest)[::-1]
        best = min(
            max(falling[a] * (b - a) * sizes[0] for a, b in itertools.pairwise([0, *cuts, 8]) if b > a)
            for cuts in itertools.combinations_with_replacement(range(9), 2)
        )
        assert cost == best


@pytest.mark.parametrize("bins", [2, 31, 33, 200])
@pytest.mark.parametrize("groups", [1, 150, 5000])
def test_no_two_loads_differ_by_more_than_the_largest_group(bins, groups):
    costs = np.random.default_rng(bins).integers(1, 100, groups)
    found = lay_evenly(costs, bins)
    loads = np.bincount(found, costs, bins)
    assert loads.sum() == costs.sum()
    assert loads.max() - loads.min() <= costs.max()
    assert loads.max() <= costs.sum() / bins + costs.max() * (1 - 1 / bins)


@pytest.mark.parametrize("world_size", [1, 7, 64, 1024])
@pytest.mark.parametrize("data", ["uniter", "demo"])
def test_fill_padding_and_balance(world_size, data):
    """Needed: fill >= 0.97, no padding, straggler factor <= 1.02, from 1 to 1024 ranks (`make bench`: all modes)."""
    lengths, budget = (load_lengths(), 10_240) if data == "uniter" else (demo_lengths(), 2048)
    figures = ours(lengths, world_size, "packed", budget, 1)
    assert figures.fill >= 0.97
    assert figures.padding <= 0.015
    assert figures.straggler <= 1.02
    assert figures.work <= 1.02


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_reference_batches_are_dealt_whole(world_size):
    lengths = toy_lengths(images=300, texts_per_image=(1, 2))
    plan = plan_of(
        lengths,
        mix={"mlm": 1},
        global_batch_examples=None,
        mode="reference",
        reference_batches=8,
        micro_batch_tokens=600,
    )
    gas = accumulation(plan, world_size)
    assert gas == -(-8 // world_size)
    for step in steps_of(plan, 6):
        dealt = deal(step, world_size, gas, 600, Rule("reference"))
        real = [micro for hand in dealt for micro in hand if micro.weight]
        assert len(real) == 8
        assert all(len(set(micro.group.tolist())) == 1 and len(micro) % 8 == 0 for micro in real)
        assert sum(map(len, real)) == len(step)
        for micro in real:  # UNITER's budget does not count [CLS] and [SEP]
            assert micro.padded - 2 * len(micro) <= 600
    with pytest.raises(VlscaleError, match=r"9 processes, batch\.reference_batches 8"):
        accumulation(plan, 9)


@pytest.mark.parametrize(
    ("changes", "world_size", "says"),
    [
        ({"micro_batch_tokens": 30}, 1, r"micro_batch_tokens 30 is smaller than one example of dataset toy: 34 tokens"),
        ({"micro_batch_tokens": 60, "itm_group": 4}, 1, "smaller than one group of 4 examples of dataset toy"),
        ({"global_batch_examples": 4}, 5, "more processes than examples in a step: 5 processes"),
        ({"global_batch_examples": 8, "itm_group": 4}, 3, "at most 2 groups of 4 examples"),
        ({"global_batch_tokens": 40}, 9, "more processes than examples in a step"),
    ],
)
def test_mistakes_get_one_line(changes, world_size, says):
    with pytest.raises(VlscaleError, match=says) as error:
        accumulation(plan_of(**changes), world_size)
    assert "\n" not in str(error.value)
