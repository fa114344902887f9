"""Promises of the plan and of dealing, for whatever recipe, data and number of processes Hypothesis thinks of."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.bench.bench_plan import demo_lengths, load_lengths
from tests.data.test_plan import same
from tests.data.toy import toy_lengths
from vlscale.data.deal import Rule, accumulation, deal, fill_advice, fitting_accumulation, straggler
from vlscale.data.plan import Plan, PlanSettings, Position
from vlscale.errors import VlscaleError

LONGEST = 18
RECIPES = Path(__file__).resolve().parents[2] / "launch/recipes"
STEPS = 12


@st.composite
def recipes(draw, modes=("packed", "padded", "reference")):
    """A way to build a plan (twice gives two plans of one recipe), a ceiling and a mode."""
    seed, images = draw(st.integers(0, 10**6)), draw(st.integers(8, 80))
    one, other = toy_lengths(images=images, seed=seed), toy_lengths(images=images + 3, seed=seed + 1, name="other")
    if draw(st.booleans()):  # a few images of far more regions than the others
        many = np.random.default_rng(seed).random(images) < 0.15
        one = dataclasses.replace(one, regions=np.where(many, 90, 2).astype(np.int32))
    mode, group, size = draw(st.sampled_from(modes)), draw(st.integers(1, 5)), draw(st.integers(1, 60))
    unit = {"global_batch_examples": size * group, "itm_group": group}
    if mode == "reference":
        unit = {"reference_batches": size}
    elif draw(st.booleans()):
        unit = {"global_batch_tokens": size * 120, "itm_group": group}
    chosen = PlanSettings(
        seed=seed,
        mode=mode,
        micro_batch_tokens=draw(st.integers(800, 4000)),
        itm_negative_probability=draw(st.sampled_from([0.0, 0.5, 1.0])),
        itm_replace=draw(st.sampled_from(["image", "text", "both"])),
        mix_unit=draw(st.sampled_from(["steps", "samples"])),
        window_shards=draw(st.integers(1, 5)),
        max_text_tokens=LONGEST,
        **unit,
    )
    mix = {"mlm": draw(st.integers(0, 3)), "itm": draw(st.integers(1, 3))}
    return lambda: Plan([(one, mix), (other, {"itm": 1})], chosen)


def built(recipe):
    """The plan; recipes that are refused (too small a step or a dataset) are no cases."""
    try:
        return recipe()
    except VlscaleError:
        assume(False)
        raise


def keys(pieces):
    return sorted(
        (p, e) for piece in pieces for p, e in zip(piece.passes.tolist(), piece.examples.tolist(), strict=True)
    )


@hypothesis_settings(max_examples=80, deadline=None)
@given(recipe=recipes())
def test_a_plan_goes_on_alike_from_any_place(recipe):
    """Order, labels, partners and groups depend on nothing that is not in the position."""
    plan = built(recipe)
    position = plan.start()
    for _ in range(STEPS):
        restored = Position.from_json(json.loads(json.dumps(position.to_json())))
        fresh, there = recipe().step(restored)
        step, position = plan.step(position)
        same(fresh, step)
        assert there == position


@hypothesis_settings(max_examples=80, deadline=None)
@given(recipe=recipes())
def test_a_pass_meets_every_eligible_text_once(recipe):
    plan = built(recipe)
    position, met = plan.start(), {name: [] for name in plan.sources}
    for _ in range(3 * STEPS):
        step, position = plan.step(position)
        met[step.dataset].append(step)
    for name, steps in met.items():
        pairs, source = keys(steps), plan.sources[name]
        assert len(set(pairs)) == len(pairs)
        eligible = np.flatnonzero(source.lengths.tokens <= LONGEST).tolist()
        for pass_index in range(position.cursors[name][0]):
            seen = [example for found, example in pairs if found == pass_index]
            if plan.settings.mode == "reference":
                assert set(seen) <= set(eligible)
                if pass_index == 0:
                    assert len(seen) == len(eligible) - plan.dropped[name]
            else:
                assert seen == eligible


@hypothesis_settings(max_examples=120, deadline=None)
@given(recipe=recipes(), world_size=st.integers(1, 12), hidden_size=st.sampled_from([None, 1, 8, 768]))
def test_any_number_of_processes_runs_the_same_step_under_the_ceiling(recipe, world_size, hidden_size):
    plan = built(recipe)
    settings = plan.settings
    rule, ceiling = Rule(settings.mode, hidden_size), settings.micro_batch_tokens
    try:
        gas = accumulation(plan, world_size)
    except VlscaleError as error:
        assert "more processes than" in str(error) or "is smaller than one" in str(error)  # noqa: PT017
        return
    position = plan.start()
    for _ in range(STEPS):
        step, position = plan.step(position)
        dealt = deal(step, world_size, gas, ceiling, rule)
        assert [len(rank) for rank in dealt] == [gas] * world_size
        real = [micro for rank in dealt for micro in rank if micro.weight]
        assert keys(real) == keys([step])
        for micro in real:
            if settings.mode == "reference":
                assert len(set(micro.group.tolist())) == 1
            else:
                assert (micro.padded if settings.mode == "padded" else micro.tokens) <= ceiling
        if settings.mode != "reference":
            assert fitting_accumulation(step, world_size, ceiling, rule) <= gas


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("negatives", [0.0, 0.5])
@pytest.mark.parametrize("unit", [{"global_batch_tokens": 20_000}, {"global_batch_examples": 960}])
def test_padded_groups_of_unlike_lengths_fit(group, negatives, unit):
    """One long example makes its whole group long: most positions of such groups are padding."""
    many = np.random.default_rng(1).random(1500) < 0.05
    lengths = toy_lengths(images=1500, texts_per_image=(1, 1), tokens=(3, 3), shard=500)
    lengths = dataclasses.replace(lengths, regions=np.where(many, 90, 2).astype(np.int32))
    for ceiling in (1600, 3000, 6000):
        settings = PlanSettings(
            1, micro_batch_tokens=ceiling, itm_group=group, itm_negative_probability=negatives, mode="padded", **unit
        )
        plan = Plan([(lengths, {"itm": 1})], settings)
        gas = accumulation(plan, 1)
        position = plan.start()
        for _ in range(3):
            step, position = plan.step(position)
            assert all(micro.padded <= ceiling for micro in deal(step, 1, gas, ceiling, Rule("padded"))[0])


REFERENCE = {"mode": "reference", "reference_batches": 4, "micro_batch_tokens": 400}


@pytest.mark.parametrize("offset", [3, 1232, 1234])
def test_a_cursor_between_no_batches_is_refused(offset):
    plan = Plan([(toy_lengths(images=400, seed=1), {"mlm": 1})], PlanSettings(1, **REFERENCE))
    assert len(plan.sources["toy"].order) - plan.dropped["toy"] == 1232
    with pytest.raises(VlscaleError, match="no batch of dataset toy begins at text") as error:
        plan.step(Position(0, {"toy": (0, offset)}))
    assert "\n" not in str(error.value)


UNITS = [{"global_batch_tokens": 3000}, {"global_batch_examples": 50}, REFERENCE | {"micro_batch_tokens": 2000}]


def share_met(unit, datasets, steps=3000, sizes=None, **changes):
    """The first dataset's share of the examples met."""
    plan = Plan(datasets, PlanSettings(seed=3, **unit, **changes), None, sizes)
    met, position = {name: 0 for name in plan.sources}, plan.start()
    for _ in range(steps):
        step, position = plan.step(position)
        met[step.dataset] += len(step)
    return met[datasets[0][0].name] / sum(met.values())


def short_and_long():
    short = toy_lengths(images=2000, seed=2, name="short", tokens=(3, 6), regions=(2, 4))
    return short, toy_lengths(images=2000, seed=3, name="long", tokens=(20, 40), regions=(30, 60))


@pytest.mark.parametrize("unit", UNITS)
def test_shares_of_samples_count_examples(unit):
    short, long = short_and_long()
    assert share_met(unit, [(short, {"mlm": 1}), (long, {"mlm": 3})], mix_unit="samples") == pytest.approx(
        0.25, abs=0.03
    )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["repeat", "choose"])
def test_sizes_count_examples_whatever_the_tasks(unit, kind):
    short, long = short_and_long()
    sizes = {"short": ("repeat", 0.5), "long": ("repeat", 1.0)}
    if kind == "choose":
        sizes = {"short": ("choose", 100), "long": ("choose", 300)}
    texts = [
        size * (len(each) if kind == "repeat" else 1)
        for each, (_, size) in zip((short, long), sizes.values(), strict=True)
    ]
    datasets = [(short, {"mlm": 1, "itm": 3}), (long, {"mlm": 1})]
    found = share_met(unit, datasets, sizes=sizes)
    assert found == pytest.approx(texts[0] / sum(texts), abs=0.03)
    with pytest.raises(VlscaleError, match="all or none"):
        Plan(datasets, PlanSettings(3, **unit), None, {"short": sizes["short"]})


@pytest.mark.parametrize("world_size", [1, 8, 64, 256, 1024])
@pytest.mark.parametrize(("load", "ceiling", "width"), [(load_lengths, 10_240, 768), (demo_lengths, 4096, 128)])
def test_packed_micro_batches_are_full_and_even(world_size, load, ceiling, width):
    """Fill and the straggler factor in tokens and in operations; `make bench` has the whole table."""
    lengths, rule = load(), Rule("packed", width)
    probe = Plan([(lengths, {"mlm": 1})], PlanSettings(42, global_batch_tokens=1 << 28))
    longest = probe.sources[lengths.name].heaviest("mlm", 1)
    # The largest step that is sure to fit into one micro-batch per rank.
    total = world_size * (ceiling - longest) + longest
    plan = Plan([(lengths, {"mlm": 1})], PlanSettings(42, global_batch_tokens=total, micro_batch_tokens=ceiling))
    assert accumulation(plan, world_size) == 1
    position, done = plan.start(), 0
    while done < len(lengths):
        step, position = plan.step(position)
        done += len(step)
        dealt = deal(step, world_size, 1, ceiling, rule)
        assert step.tokens / (world_size * ceiling) >= 0.97
        assert straggler(dealt) <= 1.02
        work = [int(rule.work(lengths.costs(micro.texts, micro.images, 100)).sum()) for (micro,) in dealt]
        assert max(work) / np.mean(work) <= 1.02


def test_operations_are_even_where_lengths_differ_widely():
    """Balanced by tokens, a rank with the long examples has far more attention to do than the others."""
    lengths = toy_lengths(images=3000, texts_per_image=(1, 1), tokens=(3, 40), regions=(2, 600), shard=500)
    settings = PlanSettings(1, global_batch_tokens=100_000, max_regions=600)
    plan = Plan([(lengths, {"mlm": 1})], settings)
    step, _ = plan.step(plan.start())
    rule = Rule("packed", 16)

    def uneven(way):
        dealt = deal(step, 8, 1, 20_000, way)
        work = [int(rule.work(lengths.costs(rank[0].texts, rank[0].images, 600)).sum()) for rank in dealt]
        return max(work) / np.mean(work)

    assert uneven(rule) < 1.005
    assert uneven(Rule("packed")) > uneven(rule)


def test_work_falls_back_to_tokens_where_the_ceiling_is_tight():
    """Even in work, one micro-batch would have more tokens than the ceiling; the proved rule takes over."""
    lengths = toy_lengths(images=400, texts_per_image=(1, 1), tokens=(3, 40), regions=(2, 600), shard=500)
    plan = Plan([(lengths, {"mlm": 1})], PlanSettings(1, global_batch_tokens=20_000, max_regions=600))
    step, _ = plan.step(plan.start())
    by_work = max(rank[0].tokens for rank in deal(step, 4, 1, 1 << 30, Rule("packed", 1)))
    by_tokens = max(rank[0].tokens for rank in deal(step, 4, 1, 1 << 30))
    assert by_tokens < by_work
    assert max(rank[0].tokens for rank in deal(step, 4, 1, by_work - 1, Rule("packed", 1))) == by_tokens


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["uniter_base", "uniter_large"])
def test_shipped_recipes_fill_their_micro_batches(name, world_size):
    """Accumulation jumps by whole micro-batches per process; a ceiling taken at random may leave them half empty."""
    batch = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["batch"]
    plan = Plan([(load_lengths(), {"mlm": 1.0})], PlanSettings(1, **batch))
    assert fill_advice(plan, world_size) is None
    step, _ = plan.step(plan.start())
    assert step.tokens / (world_size * accumulation(plan, world_size) * batch["micro_batch_tokens"]) >= 0.97


def test_a_batch_that_leaves_micro_batches_empty_gets_cures_that_cure():
    def plan_of(total, ceiling):
        settings = PlanSettings(1, global_batch_tokens=total, micro_batch_tokens=ceiling)
        return Plan([(load_lengths(), {"mlm": 1.0})], settings)

    said = fill_advice(plan_of(8 * 10_240, 10_240), 8)
    assert said is not None
    assert "50% full" in said
    fewer, smaller, larger = (
        int(re.search(pattern, said)[1])
        for pattern in (r"or (\d+) \(8 ", r"tokens (\d+) \(16\)", r"tokens (\d+), fills")
    )
    assert fill_advice(plan_of(8 * 10_240, fewer), 8) is None
    assert accumulation(plan_of(8 * 10_240, fewer), 8) == 1
    assert fill_advice(plan_of(8 * 10_240, smaller), 8) is None
    assert fill_advice(plan_of(larger, 10_240), 8) is None
    assert fill_advice(plan_of(8 * 2_000, 10_240), 8) is None  # one each: even, and nothing to gain


def test_steps_beyond_reason_are_refused():
    with pytest.raises(VlscaleError, match=r"batch.global_batch_tokens is 99999999999, at most 268435456"):
        Plan([(load_lengths(), {"mlm": 1.0})], PlanSettings(1, global_batch_tokens=99_999_999_999))
