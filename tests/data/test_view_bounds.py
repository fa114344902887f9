"""What groups can cost at most: each text is bounded by its own views, and messages name what is long."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.data.test_plan import same
from tests.data.test_unified import LONGEST, plan_of, three
from tests.data.unified_data import toy_images, toy_texts
from vlscale.data import unified
from vlscale.data.deal import accumulation, fitting_accumulation
from vlscale.data.lengths import DatasetLengths
from vlscale.data.offsets import Offsets
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.views import MOST_DATASETS, UNIFIED, ViewSettings
from vlscale.errors import VlscaleError


def expected_bound(pairs: DatasetLengths, row: int, views: ViewSettings, retrieved: int) -> int:
    """The bound of one text's group, one view after the other."""
    image = int(pairs.first_image(np.array([row]))[0])
    tokens = int(pairs.tokens[row])
    shown = int(pairs.regions[image]) + 1 if image >= 0 else 0
    whole = tokens + 2 + shown
    total = whole + 2 * max(1, math.ceil(math.ceil(tokens / 4) / 4))
    if image < 0:
        return total
    total += 2 * whole + retrieved
    rewrites = pairs.beside.rewrites
    assert rewrites is not None
    mine = np.arange(*rewrites.ptr[[row, row + 1]])
    for wanted, says in ((views.positives, 1), (views.negatives, 0)):
        right = [int(rewrites.view_tokens[view]) for view in mine if rewrites.view_positive[view] == says]
        usable = [length for length in right if length <= LONGEST]
        total += min(wanted, len(usable)) * (max(usable, default=0) + 2 + shown)
    return total


@pytest.mark.parametrize("slice_size", [3, 1 << 18])
@pytest.mark.parametrize("views", [ViewSettings(), ViewSettings(positives=2, negatives=1), ViewSettings(negatives=0)])
def test_every_text_is_bounded_by_its_own_views(monkeypatch, views, slice_size):
    monkeypatch.setattr("vlscale.data.view_bounds._TEXTS", slice_size)
    lengths = three(without_image=3)
    plan = plan_of(lengths, views=views)
    assert plan._unified is not None
    pairs, texts, images = lengths
    retrieved = int(images.regions.max()) + 1 + int(texts.tokens[texts.tokens <= LONGEST].max()) + 2
    rows = np.flatnonzero(pairs.tokens <= LONGEST)
    found = [expected_bound(pairs, row, views, retrieved) for row in rows.tolist()]
    counts = plan._unified.bounds["pairs"].most.counts
    assert np.array_equal(counts, np.bincount(found, minlength=len(counts)))


def test_one_long_view_is_room_for_one_text_only():
    """The longest view of a dataset, times all views, was the bound of every text."""
    pairs, texts, images = three()
    rewrites = pairs.beside.rewrites
    views = rewrites.view_tokens.clip(max=5)
    short = dataclasses.replace(
        pairs, beside=dataclasses.replace(pairs.beside, rewrites=dataclasses.replace(rewrites, view_tokens=views))
    )
    smallest = int(pairs.tokens.argmin())
    assert rewrites.ptr[smallest] < rewrites.ptr[smallest + 1]
    views = views.copy()
    views[rewrites.ptr[smallest]] = LONGEST
    one = dataclasses.replace(
        pairs, beside=dataclasses.replace(pairs.beside, rewrites=dataclasses.replace(rewrites, view_tokens=views))
    )
    before, after = (plan_of([each, texts, images]) for each in (short, one))
    name, task = before.pairs[0]
    assert before.heaviest(name, task, 1) == after.heaviest(name, task, 1)


def test_messages_name_the_dataset_of_the_largest_unit_and_what_is_long():
    pairs, texts, images = three()
    tokens = pairs.tokens.copy()
    (row,) = np.flatnonzero(pairs.first_image(np.arange(len(pairs))) >= 0)[:1]
    tokens[row] = LONGEST
    long = dataclasses.replace(pairs, name="captions", tokens=tokens, regions=np.full_like(pairs.regions, 40))
    told = (
        r"of dataset captions \(text row \d+: \d+ word pieces, 40 regions, rewritten captions of up to \d+ tokens in "
        r"all, retrieved views of up to \d+ tokens in all\)"
    )
    with pytest.raises(
        VlscaleError, match=rf"micro_batch_tokens 60 is smaller than one unit with all its views {told}: "
    ):
        accumulation(plan_of([long, texts, images], micro_batch_tokens=60), 1)
    with pytest.raises(VlscaleError, match=rf"global_batch_tokens 60 is smaller than .* {told}, task unified: "):
        plan_of([long, texts, images], global_batch_tokens=60)
    with pytest.raises(VlscaleError, match=r"views of dataset images \(image row \d+: \d+ regions\): "):
        accumulation(plan_of([toy_images()], micro_batch_tokens=3), 1)
    with pytest.raises(VlscaleError, match=r"views of dataset texts \(text row \d+: \d+ word pieces\): "):
        accumulation(plan_of([toy_texts()], micro_batch_tokens=3), 1)
    plan = plan_of([long, texts, images])
    step, _ = plan.step(plan.start())
    with pytest.raises(VlscaleError, match=r"one unit with all its views of dataset captions \(text row \d+\): "):
        fitting_accumulation(step, 1, 60)


def test_more_datasets_than_a_row_can_number_are_refused():
    def plan(count):
        texts = [dataclasses.replace(toy_texts(), name=f"t{number}") for number in range(count)]
        return Plan([(each, {UNIFIED: 1.0}) for each in texts], PlanSettings(seed=1, global_batch_examples=2 * count))

    most = plan(MOST_DATASETS)
    step, _ = most.step(most.start())
    assert step.views is not None
    assert np.array_equal(np.unique(step.views.source), np.arange(MOST_DATASETS))
    with pytest.raises(
        VlscaleError, match=r"data\.datasets: 129 datasets are trained with task unified, at most 128 can"
    ):
        plan(MOST_DATASETS + 1)


@pytest.mark.parametrize("sample", [1, 5, 10_000])
def test_steps_do_not_depend_on_how_many_units_are_drawn_at_first(monkeypatch, sample):
    plan = plan_of(three())
    expected, _ = plan.step(plan.start())
    monkeypatch.setattr(unified, "_SAMPLE", sample)
    found, _ = plan.step(plan.start())
    same(found, expected)
    assert np.array_equal(found.views.source, expected.views.source)
    assert np.array_equal(found.views.role, expected.views.role)
    assert np.array_equal(found.views.view, expected.views.view)


def test_no_unit_is_expanded_twice(monkeypatch):
    """Lists of candidates are read as units are expanded."""
    plan, seen = plan_of(three()), []
    assert plan._unified is not None
    real = plan._unified._expansion.step
    monkeypatch.setattr(
        plan._unified._expansion, "step", lambda index, units: seen.append(len(units)) or real(index, units)
    )
    monkeypatch.setattr(unified, "_SAMPLE", 4)
    step, _ = plan.step(plan.start())
    assert len(seen) > 1
    met = plan._unified.take(plan.start().cursors, sum(seen))
    assert len(np.unique(np.stack([met.source, met.rows, met.passes]), axis=1).T) == sum(seen)
    assert sum(seen) < 1.5 * (int(step.group[-1]) + 1)


def test_slices_of_offsets_are_the_running_sum():
    lengths = np.random.default_rng(0).integers(0, 9, 1000)
    whole, offsets = np.r_[0, np.cumsum(lengths)], Offsets(lengths)
    for part in (
        slice(None),
        slice(0, 0),
        slice(63, 65),
        slice(999, None),
        slice(1000, 1001),
        slice(-5, None),
        slice(5, 90, 7),
    ):
        assert np.array_equal(offsets[part], whole[part])
