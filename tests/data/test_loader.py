from __future__ import annotations

import dataclasses
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from tests.data.test_packing import equal
from tests.helpers import make_dataset
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import accumulation
from vlscale.data.feed import DEALT_AHEAD
from vlscale.data.loader import Loader
from vlscale.data.plan import FixedSteps, Plan, PlanSettings, evaluation_seed, evaluation_steps
from vlscale.errors import VlscaleError

SETTINGS = PlanSettings(seed=3, global_batch_examples=12, micro_batch_tokens=120, max_regions=6, itm_replace="both")


class Masker:
    """Masks regions: one keyed draw per region, and the first where none was drawn."""

    needs_class_probs = False

    def prepare(self, batch, draws):
        owner = batch.region_owner().numpy()
        index = np.arange(len(owner)) - batch.cu_regions.numpy()[owner]
        chance = draws.uniform("toy mask", batch.passes.numpy()[owner], batch.examples.numpy()[owner], index)[:, 0]
        mask = torch.from_numpy((chance < 0.3) | (index == 0))
        batch.targets["region_positions"] = mask.nonzero().flatten()
        return dataclasses.replace(batch, region_mask=mask)


class ClassMasker(Masker):
    needs_class_probs = True


class Faulty(Masker):
    def __init__(self, how, step):
        self.how, self.calls = how, step

    def prepare(self, batch, draws):
        self.calls -= 1
        if self.calls < 0:
            if self.how == "user":
                raise VlscaleError("texts row 7: no tokens; build the store again")
            if self.how == "bug":
                raise ZeroDivisionError("a bug")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(batch, draws)


class Nosy(Masker):
    """Tells what its process looks like."""

    def prepare(self, batch, draws):
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        batch.targets["seen"] = torch.tensor([os.getpid(), torch.get_num_threads(), ignored])
        return super().prepare(batch, draws)


OBJECTIVES = {"mlm": Masker(), "itm": Masker(), "mrc": ClassMasker()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset("toy", make_dataset(tmp_path_factory.mktemp("data") / "toy"), True)


def plan_of(dataset, mix=None, settings=SETTINGS):
    return Plan([(dataset.lengths, mix or {"mlm": 1, "itm": 1, "mrc": 1})], settings)


def loader_of(dataset, plan=None, position=None, rank=0, world_size=1, gas=None, workers=0, objectives=None, **more):
    plan = plan or plan_of(dataset)
    return Loader(
        {"toy": dataset},
        objectives or OBJECTIVES,
        plan,
        position or plan.start(),
        rank,
        world_size,
        gas,
        more.pop("ceiling", 120),
        workers=workers,
        prefetch=2,
        seed=3,
        max_regions=6,
        **more,
    )


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def per_example(batches):
    """(pass, example) -> everything that was read and drawn for it."""
    found = {}
    for batch in batches:
        if batch.weight == 0:
            continue
        for place in range(len(batch)):
            text = batch.input_ids[batch.cu_text[place] : batch.cu_text[place + 1]].tolist()
            regions = slice(int(batch.cu_regions[place]), int(batch.cu_regions[place + 1]))
            labels = batch.targets.get("itm_labels")
            key = (int(batch.passes[place]), int(batch.examples[place]))
            assert key not in found
            found[key] = (
                batch.task,
                text,
                int(batch.images[place]),
                batch.region_rows[regions].tolist(),
                batch.region_mask[regions].tolist(),
                None if labels is None else int(labels[place]),
            )
    return found


def workers_alive():
    """Reader processes below this one: all descendants but the fork server and the resource tracker."""
    helpers = psutil.Process().children()
    return [child for helper in helpers for child in helper.children(recursive=True)]


def test_same_examples_masks_and_partners_in_every_arrangement(dataset):
    reference = [per_example(batches) for _, _, batches in take(loader_of(dataset), 9)]
    assert {value[0] for window in reference for value in window.values()} == {"mlm", "itm", "mrc"}
    plan = plan_of(dataset)
    for world_size, extra, ceiling, workers in [(1, 0, 5000, 0), (2, 0, 120, 2), (3, 1, 90, 0), (8, 2, 60, 0)]:
        settings = dataclasses.replace(SETTINGS, micro_batch_tokens=ceiling)
        gas = accumulation(plan_of(dataset, settings=settings), world_size) + extra
        union = [{} for _ in reference]
        for rank in range(world_size):
            arranged = loader_of(dataset, None, None, rank, world_size, gas, workers, ceiling=ceiling)
            for index, (step, _, batches) in enumerate(take(arranged, 9)):
                assert step.index == index
                assert len(batches) == gas
                assert all(batch.tokens <= ceiling for batch in batches)
                hand = per_example(batches)
                assert not union[index].keys() & hand.keys()
                union[index] |= hand
        assert union == reference
    assert plan.step(plan.start())[0].index == 0


def test_worker_processes_deliver_the_same_batches_in_order(dataset):
    here = take(loader_of(dataset), 8)
    there = take(loader_of(dataset, workers=2), 8)
    for (step, after, batches), (other, other_after, others) in zip(here, there, strict=True):
        assert (step.index, after) == (other.index, other_after)
        for one, two in zip(batches, others, strict=True):
            equal(one, two)


def test_resume_in_the_middle(dataset):
    windows = take(loader_of(dataset), 6)
    resumed = take(loader_of(dataset, position=windows[2][1], workers=1), 3)
    for (step, after, batches), (other, other_after, others) in zip(windows[3:], resumed, strict=True):
        assert (step.index, after) == (other.index, other_after)
        for one, two in zip(batches, others, strict=True):
            equal(one, two)


@pytest.mark.parametrize("workers", [0, 1])
def test_class_probabilities_of_masked_regions(dataset, workers):
    _, _, batches = take(loader_of(dataset, plan_of(dataset, {"mrc": 1}), workers=workers), 1)[0]
    for batch in batches:
        positions = batch.targets["region_positions"]
        assert 0 < len(positions) < len(batch.region_rows)
        probs = batch.targets["class_probs"]
        assert probs.dtype == torch.float16  # as stored
        assert probs.shape == (len(positions), dataset.num_classes)
        for row, prob in zip(batch.region_rows[positions].tolist(), probs, strict=True):
            assert np.array_equal(dataset.classes.row(row)["probs"], prob.numpy())


def test_what_is_missing_is_said_at_the_start(dataset, tmp_path):
    bare = open_dataset("toy", make_dataset(tmp_path / "bare", classes=False), True)
    with pytest.raises(VlscaleError, match="dataset toy: task mrc needs class probabilities"):
        loader_of(bare)
    with pytest.raises(VlscaleError, match="task mrc of its mix has no objective"):
        loader_of(dataset, objectives={"mlm": Masker(), "itm": Masker()})
    with pytest.raises(VlscaleError, match="needs dataset toy"):
        Loader({}, OBJECTIVES, plan_of(dataset), plan_of(dataset).start(), 0, 1, 1, 120)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_mistake_keeps_its_one_line(dataset, workers):
    loader = loader_of(dataset, plan_of(dataset, {"mlm": 1}), workers=workers, objectives={"mlm": Faulty("user", 3)})
    with pytest.raises(VlscaleError) as error:
        list(loader)
    assert str(error.value) == "texts row 7: no tokens; build the store again"
    assert not workers_alive()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_damaged_store_is_reported_from_a_worker(tmp_path):
    root = make_dataset(tmp_path / "toy")
    dataset = open_dataset("toy", root, True)
    shard = sorted((root / "images").glob("*.mds"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(VlscaleError, match=re.escape(shard.name)):
        list(loader_of(dataset, workers=1))
    assert not workers_alive()


def test_a_bug_keeps_its_traceback(dataset):
    loader = loader_of(dataset, plan_of(dataset, {"mlm": 1}), workers=1, objectives={"mlm": Faulty("bug", 1)})
    with pytest.raises(ZeroDivisionError, match="in prepare"):
        list(loader)
    assert not workers_alive()


def test_a_killed_worker_is_reported(dataset):
    loader = loader_of(dataset, plan_of(dataset, {"mlm": 1}), workers=1, objectives={"mlm": Faulty("kill", 1)})
    with pytest.raises(VlscaleError, match="a reader process has died"):
        list(loader)
    assert not workers_alive()


def test_workers_leave_interrupts_and_cores_alone(dataset):
    plan = plan_of(dataset, {"mlm": 1})
    windows = take(loader_of(dataset, plan, workers=2, objectives={"mlm": Nosy()}), 6)
    seen = torch.stack([batch.targets["seen"] for _, _, batches in windows for batch in batches])
    assert len(seen[:, 0].unique()) == 2
    assert os.getpid() not in seen[:, 0].tolist()
    assert seen[:, 1].tolist() == [1] * len(seen)
    assert seen[:, 2].all()


def test_global_generator_is_left_alone(dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(loader_of(dataset, workers=1), 2)
    take(loader_of(dataset), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_reading_ahead_is_bounded(dataset):
    plan = plan_of(dataset)
    dealt = []

    class Counting:
        pairs = plan.pairs

        def steps(self, position):
            for step, after in plan.steps(position):
                dealt.append(step.index)
                yield step, after

    with loader_of(dataset, Counting(), plan.start(), gas=accumulation(plan, 1), workers=1) as loader:
        next(loader)
        time.sleep(0.3)
        # One window out, two micro-batches of one worker ahead, dealt steps that wait, and one in the making.
        assert dealt == list(range(len(dealt)))
        assert DEALT_AHEAD < len(dealt) <= 4 + DEALT_AHEAD + 1


def test_waiting_is_measured(dataset):
    class Slow(Masker):
        def prepare(self, batch, draws):
            time.sleep(0.05)
            return super().prepare(batch, draws)

    plan = plan_of(dataset, {"mlm": 1})
    gas = accumulation(plan, 1)
    with loader_of(dataset, plan, gas=gas, objectives={"mlm": Slow()}) as loader:
        assert loader.last_wait_s == 0
        next(loader)
        assert 0.05 * gas <= loader.last_wait_s < 0.05 * gas + 1


def test_evaluation_is_the_same_for_any_world(dataset):
    steps = evaluation_steps(dataset.lengths, "itm", 30, SETTINGS)
    found = []
    for world_size in (1, 2, 3):
        seen = {}
        for rank in range(world_size):
            loader = Loader(
                {"toy": dataset},
                OBJECTIVES,
                FixedSteps(steps),
                FixedSteps(steps).start(),
                rank,
                world_size,
                None,
                90,
                seed=evaluation_seed(3),
            )
            for _, _, batches in loader:
                seen |= per_example(batches)
        found.append(seen)
    assert len(found[0]) == 30
    assert found[0] == found[1] == found[2]
