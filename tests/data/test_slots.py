"""Slots: shared memory that is used again, and never while somebody looks into it."""

from __future__ import annotations

import dataclasses
import multiprocessing

import numpy as np
import pytest
import torch

from tests.data.test_loader import SETTINGS, loader_of, plan_of, take
from tests.data.test_packing import equal
from tests.helpers import make_dataset
from vlscale.config import ObjectivesSection
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import accumulation
from vlscale.data.loader import Loader
from vlscale.data.plan import FixedSteps, evaluation_steps
from vlscale.data.slots import Slots
from vlscale.objectives import build_objectives


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset("toy", make_dataset(tmp_path_factory.mktemp("data") / "toy"), True)


def slot_of(slots, batch):
    """Number of the slot that a batch lies in, or None."""
    offset = batch.features.data_ptr() - slots._memory.ctypes.data
    return offset // slots.size if 0 <= offset < slots.count * slots.size else None


def same(windows, others):
    for (_, _, batches), (_, _, expected) in zip(windows, others, strict=True):
        for one, two in zip(batches, expected, strict=True):
            equal(one, two)


@pytest.mark.parametrize("workers", [0, 1])
def test_kept_batches_are_never_overwritten(dataset, workers):
    """Many more batches than slots pass by; some are kept whole, of some only a part, as an array."""
    plan, count = plan_of(dataset, {"mlm": 1}), 60
    gas = accumulation(plan, 1)
    reference = take(loader_of(dataset, plan, gas=gas), count)
    kept, parts, seen = {}, {}, set()
    with loader_of(dataset, plan, gas=gas, workers=workers) as loader:
        slots = loader._slots.count
        assert 0 < slots < count * gas / 3
        for index in range(count):
            batch = next(loader)[2][0]
            seen.add(batch.features.data_ptr())
            if index % 7 == 0:
                kept[index] = batch
            elif index % 7 == 3:
                parts[index] = batch.features[1:2, 3:].numpy()
            del batch
    for index, batch in kept.items():
        equal(batch, reference[index][2][0])
    for index, part in parts.items():
        assert np.array_equal(part, reference[index][2][0].features[1:2, 3:].numpy())
    assert len(seen) < count  # memory was used again


@pytest.mark.parametrize("workers", [0, 1])
def test_slots_come_back(dataset, workers):
    steps = FixedSteps(evaluation_steps(dataset.lengths, "mlm", 30, SETTINGS) * 5)
    loader = loader_of(dataset, steps, workers=workers)
    slots, used = loader._slots, set()
    for _, _, batches in loader:
        used |= {slot_of(slots, batch) for batch in batches}
        del batches
    assert used <= set(range(slots.count))
    assert slots.free == slots.count


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_travel_alone_where_there_are_no_slots(dataset, monkeypatch, workers):
    reference = take(loader_of(dataset), 8)
    monkeypatch.setattr("vlscale.data.slots.MAX_BYTES", 100)
    loader = loader_of(dataset, workers=workers)
    assert loader._slots.count == 0
    same(take(loader, 8), reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_travel_alone_that_are_larger_than_a_slot(tmp_path, monkeypatch, workers):
    wide = open_dataset("toy", make_dataset(tmp_path / "wide", feature_dim=512))
    reference = take(loader_of(wide), 8)
    monkeypatch.setattr("vlscale.data.loader.slot_bytes", lambda *_: 1)  # one page
    with loader_of(wide, workers=workers) as loader:
        for _, _, expected in reference:
            batches = next(loader)[2]
            assert {slot_of(loader._slots, batch) for batch in batches} == {None}
            for one, two in zip(batches, expected, strict=True):
                equal(one, two)
            del batches
            assert loader._slots.free >= 1  # what was taken for nothing is given back


def test_a_slot_holds_a_micro_batch_of_the_published_mix(tmp_path):
    """The estimate of a slot's size covers the largest micro-batches of every task."""
    root = make_dataset(tmp_path / "wide", 40, feature_dim=1024, num_classes=160, min_regions=20, max_regions=60)
    wide = open_dataset("toy", root)
    plan = plan_of(wide, {"mlm": 1, "mrfr": 1, "mrckl": 1}, dataclasses.replace(SETTINGS, max_regions=100))
    objectives = build_objectives(ObjectivesSection(), ["mlm", "mrfr", "mrckl"], wide.vocabulary)
    loader = Loader({"toy": wide}, objectives, plan, plan.start(), 0, 1, None, 400, seed=1)
    slots, found = loader._slots, []
    for _, _, batches in (next(loader) for _ in range(30)):
        found += [slot_of(slots, batch) for batch in batches]
        del batches
    assert None not in found
    loader.close()


def test_slots_are_taken_lent_and_given_back():
    slots = Slots(3, 5000)
    assert (slots.count, slots.size, slots.free, slots.pinned) == (3, 8192, 3, False)
    taken = [slots.acquire() for _ in range(4)]
    assert taken == [0, 1, 2, None]
    slots.write(1)[:] = 7
    lent = slots.lend(1)
    assert lent.unique().tolist() == [7]
    view = lent[10:20].view(torch.int16)[1:]
    del lent
    assert slots.acquire() is None
    array = view.numpy()
    del view
    assert slots.acquire() is None
    del array
    assert slots.acquire() == 1
    slots.release(0)
    assert slots.acquire() == 0
    slots.release(2)
    slots.release(1)
    assert slots.acquire() == 1  # the last one used


def test_memory_outlives_its_slots():
    slots = Slots(2, 4096)
    tensor = slots.lend(slots.acquire()).fill_(9)
    del slots
    assert tensor.unique().tolist() == [9]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("vlscale.data.slots.MAX_BYTES", 10_000)
    assert Slots(100, 4096).count == 2
    assert Slots(100, 10_001).count == 0


def fill(slots, slot):
    slots.write(slot)[:] = 5


def test_another_process_writes_where_this_one_reads():
    slots = Slots(2, 4096)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=fill, args=(slots, 1))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert [slots.write(slot).unique().tolist() for slot in (0, 1)] == [[0], [5]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
def test_slots_are_page_locked_and_held_until_they_are_copied(dataset, workers):
    plan = plan_of(dataset, {"mlm": 1})
    gas = accumulation(plan, 1)
    reference = take(loader_of(dataset, plan, gas=gas), 40)
    with loader_of(dataset, plan, gas=gas, workers=workers, pin=True) as loader:
        assert loader._slots.pinned
        for _, _, expected in reference:
            batches = next(loader)[2]
            assert all(batch.features.is_pinned() for batch in batches)
            torch.cuda._sleep(20_000_000)  # the copies below wait behind this
            moved = [batch.to("cuda") for batch in batches]
            del batches
            for one, two in zip(moved, expected, strict=True):
                assert torch.equal(one.features.cpu(), two.features)
