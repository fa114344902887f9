from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.config import parse_recipe
from vlscale.data.plan import FixedSteps, Plan, PlanSettings, Position, evaluation_seed, evaluation_steps
from vlscale.errors import VlscaleError

FIELDS = ("texts", "images", "passes", "examples", "labels", "group", "costs")
MIX = {"mlm": 2.0, "itm": 1.0, "mrfr": 0.0}


def settings(**changes):
    if "global_batch_tokens" not in changes:
        changes.setdefault("global_batch_examples", 16)
    return PlanSettings(seed=changes.pop("seed", 5), **changes)


def plan_of(lengths=None, mix=MIX, **changes):
    return Plan([(toy_lengths() if lengths is None else lengths, mix)], settings(**changes))


def same(one, other):
    assert (one.index, one.task, one.dataset) == (other.index, other.task, other.dataset)
    for name in FIELDS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype


def run(plan, count, position=None):
    steps, position = [], position or plan.start()
    for _ in range(count):
        step, position = plan.step(position)
        steps.append(step)
    return steps, position


@pytest.mark.parametrize("unit", [{"global_batch_examples": 16}, {"global_batch_tokens": 400}])
def test_every_text_once_per_pass(unit):
    lengths = toy_lengths()
    steps, position = run(plan_of(lengths, max_text_tokens=15, **unit), 40)
    passes = np.concatenate([step.passes for step in steps])
    examples = np.concatenate([step.examples for step in steps])
    eligible = np.flatnonzero(lengths.tokens <= 15)
    assert passes[-1] >= 3
    for pass_index in range(passes[-1]):
        assert sorted(examples[passes == pass_index].tolist()) == eligible.tolist()
    last, offset = position.cursors["toy"]
    assert last * len(eligible) + offset == len(examples)


@pytest.mark.parametrize("task", ["mlm", "itm"])
@pytest.mark.parametrize("group", [1, 4])
def test_token_budget_is_filled_greedily(task, group):
    plan = plan_of(mix={task: 1}, global_batch_tokens=300, itm_group=group, itm_replace="both")
    position = plan.start()
    for _ in range(30):
        step, after = plan.step(position)
        assert step.tokens <= 300
        assert step.tokens == plan.sources["toy"].lengths.costs(step.texts, step.images, 100).sum()
        used = group if task == "itm" else 1
        assert len(step) % used == 0
        longer = plan.sources["toy"].block(0, task, position.cursors["toy"], len(step) + used)
        assert longer.tokens > 300  # one more group would not have fitted
        position = after


def test_groups_are_runs_of_itm_only():
    plan = plan_of(itm_group=4)
    steps, _ = run(plan, 20)
    assert {step.task for step in steps} == {"mlm", "itm"}
    for step in steps:
        size = 4 if step.task == "itm" else 1
        assert step.group.tolist() == (np.arange(16) // size).tolist()
        assert step.group.dtype == np.int32
        if step.task != "itm":
            assert step.labels.all()
            assert np.array_equal(step.texts, step.examples)


def test_ceiling_and_accumulation_do_not_touch_the_plan():
    for one, other in zip(run(plan_of(), 10)[0], run(plan_of(micro_batch_tokens=50), 10)[0], strict=True):
        same(one, other)
    assert plan_of().fingerprint == plan_of(micro_batch_tokens=50).fingerprint


@pytest.mark.parametrize("unit", [{"global_batch_examples": 16}, {"global_batch_tokens": 400}])
def test_resume_anywhere(unit):
    plan = plan_of(**unit)
    steps, _ = run(plan, 25)
    position = plan.start()
    for index in range(25):
        restored = Position.from_json(json.loads(json.dumps(position.to_json())))
        assert restored == position
        same(plan_of(**unit).step(restored)[0], steps[index])
        position = plan.step(position)[1]


def test_step_may_run_over_the_end_of_passes():
    lengths = toy_lengths(images=3, texts_per_image=(2, 2))
    steps, position = run(plan_of(lengths, global_batch_examples=16), 1)
    assert steps[0].passes.tolist() == [0] * 6 + [1] * 6 + [2] * 4
    assert position.cursors == {"toy": (2, 4)}


def test_pairs_are_drawn_by_their_share():
    datasets = [(toy_lengths(name="a"), {"mlm": 3, "itm": 1}), (toy_lengths(name="b"), {"mrc": 4, "mlm": 0})]
    plan = Plan([*datasets, (toy_lengths(name="unused"), {"mlm": 0})], settings())
    assert plan.pairs == [("a", "mlm"), ("a", "itm"), ("b", "mrc")]
    drawn = [plan.pair(step) for step in range(4000)]
    shares = np.array([drawn.count(pair) for pair in plan.pairs]) / 4000
    assert np.abs(shares - [3 / 8, 1 / 8, 1 / 2]).max() < 0.03
    assert list(plan.start().cursors) == ["a", "b"]
    steps, position = run(plan, 30)
    seen = {name: sum(len(step) for step in steps if step.dataset == name) for name in "ab"}
    for name, (pass_index, offset) in position.cursors.items():
        assert pass_index * len(plan.sources[name].order) + offset == seen[name]


def test_over_long_texts_are_counted():
    lengths = toy_lengths()
    plan = plan_of(lengths, max_text_tokens=15)
    assert plan.left_out == {"toy": int((lengths.tokens > 15).sum())}
    for step in run(plan, 10)[0]:
        assert lengths.tokens[step.texts].max() <= 15


def test_costs_cap_regions_of_the_image_that_is_used():
    lengths = toy_lengths()
    for step in run(plan_of(lengths, max_regions=4), 6)[0]:
        expected = lengths.tokens[step.texts] + 2 + np.minimum(lengths.regions[step.images], 4)
        assert np.array_equal(step.costs, expected)


@pytest.mark.parametrize("replace", ["image", "text", "both"])
@pytest.mark.parametrize("count", [1, 4, 16, 150])
def test_bounds_hold(replace, count):
    lengths = toy_lengths(images=12)
    for task in ("mlm", "itm"):
        plan = plan_of(lengths, mix={task: 1}, itm_replace=replace, global_batch_examples=count)
        bound = plan.sources["toy"].heaviest(task, count)
        smallest = plan.sources["toy"].smallest_example(task)
        for step in run(plan, 60)[0]:
            assert step.tokens <= bound
            assert step.costs.min() >= smallest
        if count == 1 and task == "mlm":  # the bound is met, not merely above
            assert max(step.tokens for step in run(plan, len(lengths))[0]) == bound


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"seed": 6}, "seed"),
        ({"max_regions": 99}, "data"),
        ({"window_shards": 3}, "data"),
        ({"global_batch_examples": 32}, "batch"),
        ({"itm_negative_probability": 0.4}, "itm"),
        ({"itm_group": 2}, "itm"),
        ({"mix": {"mlm": 1, "itm": 1}}, "mix"),
        ({"lengths": toy_lengths(seed=3)}, "a changed data set on resume: dataset toy"),
    ],
)
def test_fingerprint_names_what_changed(changes, part):
    old, new = plan_of(), plan_of(**changes)
    new.check_resume(new.fingerprint)
    assert old.fingerprint != new.fingerprint
    with pytest.raises(VlscaleError, match=part) as error:
        new.check_resume(old.fingerprint)
    assert "\n" not in str(error.value)


def test_fingerprint_covers_stores_and_ignores_idle_settings():
    one = Plan([(toy_lengths(), {"mlm": 1})], settings(), {"toy": "abc"})
    other = Plan([(toy_lengths(), {"mlm": 1})], settings(), {"toy": "abd"})
    with pytest.raises(VlscaleError, match="a changed data set on resume: dataset toy"):
        other.check_resume(one.fingerprint)
    idle = Plan([(toy_lengths(), {"mlm": 1})], settings(itm_group=4), {"toy": "abc"})
    idle.check_resume(one.fingerprint)
    with pytest.raises(VlscaleError, match="resume"):
        one.check_resume("nonsense")


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        {},
        {"step": 1},
        {"step": -1, "cursors": {}},
        {"step": True, "cursors": {}},
        {"step": 1.0, "cursors": {}},
        {"step": 1, "cursors": {"a": 3}},
        {"step": 1, "cursors": {"a": [1]}},
        {"step": 1, "cursors": {"a": [1, "2"]}},
        {"step": 1, "cursors": [["a", 1, 2]]},
    ],
)
def test_position_from_anything_else_is_refused(raw):
    with pytest.raises(VlscaleError, match="resume state"):
        Position.from_json(raw)


@pytest.mark.parametrize("cursors", [{}, {"other": (0, 0)}, {"toy": (0, 10_000)}, {"toy": (0, 0), "more": (0, 0)}])
def test_position_of_another_plan_is_refused(cursors):
    with pytest.raises(VlscaleError, match="do not fit"):
        plan_of().step(Position(0, cursors))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: plan_of(max_text_tokens=2), "dataset toy: no text is left with data.max_text_tokens 2"),
        (lambda: plan_of(toy_lengths(images=0)), "no texts at all"),
        (lambda: plan_of(toy_lengths(without_image=2)), r"\(2 of \d+\) has no image, which task itm needs"),
        (lambda: plan_of(toy_lengths(images=1)), "only 1 image"),
        (lambda: plan_of(mix={"mlm": 0}), "no dataset has a task"),
        (lambda: plan_of(global_batch_tokens=20), "smaller than one example of dataset toy, task .*: 3. tokens"),
        (lambda: plan_of(global_batch_tokens=50, itm_group=2), "smaller than one group of 2 examples of dataset toy"),
        (lambda: plan_of(itm_group=5), "16 is not a multiple of objectives.wra.group 5.* set it to 20"),
        (lambda: plan_of(global_batch_tokens=5, global_batch_examples=5), "exactly one of"),
    ],
)
def test_mistakes_get_one_line(make, says):
    with pytest.raises(VlscaleError, match=says) as error:
        make()
    assert "\n" not in str(error.value)


def test_texts_without_images_may_train_mlm():
    lengths = toy_lengths(without_image=5)
    steps, _ = run(plan_of(lengths, mix={"mlm": 1}), 20)
    images = np.concatenate([step.images for step in steps])
    costs = np.concatenate([step.costs for step in steps])
    texts = np.concatenate([step.texts for step in steps])
    assert (images == -1).any()
    assert np.array_equal(costs[images < 0], lengths.tokens[texts[images < 0]] + 2)


def test_settings_come_from_the_recipe():
    raw = {
        "name": "x",
        "seed": 9,
        "model": {},
        "data": {
            "datasets": [
                {"name": "toy", "root": "a", "mix": {"itm": 1, "mlm": 3}},
            ],
            "max_regions": 7,
        },
        "batch": {"global_batch_examples": 32, "micro_batch_tokens": 512},
        "objectives": {"wra": {"loss": "hinge", "group": 8}, "itm": {"replace": "both"}},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1, "total_steps": 2},
    }

    @dataclasses.dataclass
    class Opened:
        lengths: object
        fingerprint: str = "f"

    opened = {"toy": Opened(toy_lengths())}
    plan = Plan.from_recipe(parse_recipe(raw, "test"), opened)
    expected = settings(
        seed=9, global_batch_examples=32, micro_batch_tokens=512, max_regions=7, itm_replace="both", itm_group=8
    )
    assert plan.settings == expected
    assert plan.pairs == [("toy", "mlm"), ("toy", "itm")]
    assert plan.shares.tolist() == [0.75, 0.25]
    raw["objectives"]["wra"]["loss"] = "reference"
    assert Plan.from_recipe(parse_recipe(raw, "test"), opened).settings.itm_group == 1


@pytest.mark.parametrize("unit", [{"global_batch_examples": 16}, {"global_batch_tokens": 400}])
@pytest.mark.parametrize(("task", "group"), [("mlm", 1), ("itm", 1), ("itm", 4)])
def test_evaluation_steps(unit, task, group):
    lengths = toy_lengths()
    chosen = settings(itm_group=group, **unit)
    steps = evaluation_steps(lengths, task, 38, chosen)
    assert sum(map(len, steps)) == 38
    assert [step.index for step in steps] == list(range(len(steps)))
    assert len(steps) > 1
    examples = np.concatenate([step.examples for step in steps])
    images = lengths.first_image(examples)
    assert len(set(images.tolist())) == 38  # 40 images: one round suffices
    for step in steps:
        assert step.task == task
        assert not step.passes.any()
        assert step.group[0] == 0
        if "global_batch_tokens" in unit:
            assert step.tokens <= 400
    for step in steps[:-1]:
        assert len(step) % group == 0
    for one, other in zip(steps, evaluation_steps(lengths, task, 38, chosen), strict=True):
        same(one, other)
    moved = evaluation_steps(lengths, task, 38, dataclasses.replace(chosen, micro_batch_tokens=99))
    assert np.array_equal(np.concatenate([step.images for step in moved]), np.concatenate([s.images for s in steps]))
    other_seed = evaluation_steps(lengths, task, 38, dataclasses.replace(chosen, seed=6))
    assert not np.array_equal(np.concatenate([step.examples for step in other_seed]), examples)
    whole = evaluation_steps(lengths, task, 10_000, chosen)
    assert sorted(np.concatenate([s.examples for s in whole]).tolist()) == list(range(len(lengths)))


def test_evaluation_has_its_own_seed():
    assert evaluation_seed(1) == evaluation_seed(1)
    assert len({1, 2, evaluation_seed(1), evaluation_seed(2)}) == 4
    train = plan_of(mix={"itm": 1}, global_batch_examples=16).step(Position(0, {"toy": (0, 0)}))[0]
    held_out = evaluation_steps(toy_lengths(), "itm", 16, settings())[0]
    assert not np.array_equal(train.examples, held_out.examples)


def test_fixed_steps():
    steps = evaluation_steps(toy_lengths(), "mlm", 40, settings())
    fixed = FixedSteps(steps)
    assert len(fixed) == 3
    assert fixed.pairs == [("toy", "mlm")]
    found = list(fixed.steps(fixed.start()))
    assert [step for step, _ in found] == steps
    assert [step for step, _ in fixed.steps(found[0][1])] == steps[1:]


def test_frozen_example():
    """What a step holds is part of the checkpoint format."""
    lengths = toy_lengths(images=6, texts_per_image=(2, 2), tokens=(5, 5), regions=(3, 3), shard=3)
    plan = plan_of(lengths, mix={"itm": 1}, seed=7, global_batch_examples=8)
    step, _ = plan.step(plan.start())
    assert step.examples.tolist() == [10, 4, 3, 0, 6, 9, 11, 1]
    assert step.labels.tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
    assert step.images.tolist() == [5, 5, 1, 0, 3, 0, 5, 0]
    assert plan_of(seed=7, global_batch_examples=8).fingerprint == (
        "seed=e75017cace788f82,mix=f943ca5252b3c8e9,data=af7b2b4f91dd3f22,order=1bf41ef6fd6f6f6c,"
        "batch=28f53e4097c3021d,itm=bc56551b7b12f325,dataset toy=fbd502903932b717"
    )
