"""UNITER's batches, against those that its own sampler made."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.config import BatchSection, parse_recipe
from vlscale.data.deal import Rule, accumulation, deal
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.reference import token_buckets
from vlscale.errors import VlscaleError

GOLDEN = Path(__file__).parents[1] / "goldens" / "uniter" / "sampler.json"


def batches_of(found):
    return [batch.tolist() for batch in np.split(found.rows, found.ends[:-1])]


@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_those_of_the_authors_sampler(drop_last):
    golden = json.loads(GOLDEN.read_bytes())
    lengths = np.array(golden["lens"], np.int32)
    found = token_buckets(
        lengths,
        golden["batch_size"],
        random.Random(golden["py_random_seed"]),
        golden["bucket_size"],
        golden["size_multiple"],
        drop_last,
    )
    expected = golden[f"batches_droplast_{drop_last}"]
    assert batches_of(found) == expected
    assert found.dropped == len(lengths) - sum(map(len, expected))
    assert (found.dropped > 0) is drop_last


def test_the_maximum_is_sticky():
    """All batches of a bucket hold as many examples as its longest allows, however short theirs are."""
    lengths = np.array([100] + [10] * 63, np.int32)
    found = token_buckets(lengths, 1600, random.Random(0), drop_last=False)
    assert sorted(map(len, batches_of(found))) == [16] * 4


def test_published_fill():
    """UNITER's sampler on 100,000 lengths, seed 42, as measured: 1,405 batches, 1.280 % padding, 33.8 % fill."""
    stored = np.load(Path(__file__).parents[1] / "bench" / "uniter_lengths.npz", allow_pickle=False)
    lengths = (stored["txt_len"] + stored["num_bb"]).astype(np.int32)
    found = token_buckets(lengths, 10_240, random.Random(42))
    batches = np.split(found.rows, found.ends[:-1])
    assert (len(batches), len(found.rows), found.dropped) == (1405, 99_296, 704)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert round(1 - lengths[found.rows].sum() / padded, 5) == 0.0128
    assert round(padded / len(batches) / 10_240, 3) == 0.338


def test_a_group_over_the_budget_is_refused():
    with pytest.raises(VlscaleError, match="raise it to at least 800"):
        token_buckets(np.array([100, 5], np.int32), 799, random.Random(0))
    assert token_buckets(np.empty(0, np.int32), 799, random.Random(0)).dropped == 0


def plan_of(seed=1, **changes):
    chosen = {"mode": "reference", "reference_batches": 6, "micro_batch_tokens": 400} | changes
    return Plan([(toy_lengths(images=400, seed=1), {"mlm": 1})], PlanSettings(seed, **chosen))


@pytest.mark.parametrize(("world_size", "gas"), [(1, 6), (2, 3), (4, 2), (6, 1)])
def test_a_batch_is_a_micro_batch_on_any_number_of_processes(world_size, gas):
    plan = plan_of()
    step, _ = plan.step(plan.start())
    assert accumulation(plan, world_size) == gas
    dealt = deal(step, world_size, gas, 400, Rule("reference"))
    real = [micro for rank in dealt for micro in rank if micro.weight]
    assert sorted(set(micro.group.tolist()).pop() for micro in real) == list(range(6))
    assert sorted(map(len, real)) == sorted(np.bincount(step.group).tolist())


def test_the_first_batches_of_a_plan_are_the_samplers():
    lengths = toy_lengths(images=400, seed=1)
    costs = lengths.tokens + lengths.regions[lengths.first_image(np.arange(len(lengths)))]
    found = token_buckets(costs, 400, random.Random("1\0toy\x000"))
    plan = plan_of()
    step, after = plan.step(plan.start())
    assert [step.examples[step.group == number].tolist() for number in range(6)] == batches_of(found)[:6]
    assert after.cursors == {"toy": (0, len(step))}
    assert plan.dropped == {"toy": found.dropped}


def test_the_ceiling_is_part_of_what_is_learnt():
    assert plan_of().fingerprint != plan_of(micro_batch_tokens=500).fingerprint
    assert plan_of().fingerprint != plan_of(reference_batches=5).fingerprint


def recipe(batch, validation=(), loss="reference", **dataset):
    raw = {
        "name": "x",
        "model": {},
        "data": {
            "datasets": [{"name": "toy", "root": "a", "mix": {"mlm": 1}, **dataset}],
            "validation": [{"name": "held", "root": "b", **extra} for extra in validation],
        },
        "batch": batch,
        "objectives": {"wra": {"loss": loss}},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1, "total_steps": 2},
    }
    return parse_recipe(raw, "test")


class Opened:
    """What a plan reads of a data set."""

    lengths = toy_lengths(images=400, seed=1)
    fingerprint = "f"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch": {"mode": "reference"}}, "counts a step in batch.reference_batches"),
        ({"batch": {"mode": "reference", "reference_batches": 6, "global_batch_tokens": 9}}, "and neither"),
        ({"batch": {"reference_batches": 6, "global_batch_tokens": 9}}, "with batch.mode reference only"),
        ({"batch": {"mode": "padded"}}, "set exactly one of"),
        ({"batch": {"mode": "packt", "global_batch_tokens": 9}}, "packed"),
        ({"batch": {"mode": "reference", "reference_batches": 6}, "loss": "hinge"}, "hinge its groups"),
        ({"batch": {"global_batch_tokens": 900}, "repeat": 1, "choose": 2}, "repeat and choose exclude each other"),
        ({"batch": {"global_batch_tokens": 900}, "choose": 0}, "choose"),
        ({"batch": {"global_batch_tokens": 900}, "validation": [{"repeat": 2}]}, "held: repeat has no effect"),
    ],
)
def test_nonsense_gets_one_line(arguments, says):
    with pytest.raises(VlscaleError, match=says) as error:
        Plan.from_recipe(recipe(**arguments), {"toy": Opened})
    assert "\n" not in str(error.value)


def test_modes_come_from_the_recipe():
    assert BatchSection(global_batch_tokens=9).mode == "packed"
    made = Plan.from_recipe(recipe({"mode": "reference", "reference_batches": 6}, repeat=2.5), {"toy": Opened})
    assert (made.settings.mode, made.settings.reference_batches) == ("reference", 6)


def test_fewer_batches_than_processes():
    with pytest.raises(VlscaleError, match="more processes than batches in a step: 7 processes"):
        accumulation(plan_of(), 7)
