"""The feed: steps are dealt in a thread, a few ahead."""

from __future__ import annotations

import threading
import time
from itertools import islice

import pytest

from tests.data.test_loader import SETTINGS, loader_of, plan_of, take
from tests.data.test_packing import equal
from tests.helpers import make_dataset
from vlscale.data.dataset import open_dataset
from vlscale.data.feed import DEALT_AHEAD, Feed, own_plan
from vlscale.data.plan import FixedSteps, Position, evaluation_steps
from vlscale.data.slots import Slots
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset("toy", make_dataset(tmp_path_factory.mktemp("data") / "toy"), True)


def test_planning_goes_on_while_the_consumer_works(dataset):
    """The thread has the next step dealt before it is asked for; the consumer only takes it."""
    steps, planned = evaluation_steps(dataset.lengths, "mlm", 30, SETTINGS) * 4, []

    class Watched(FixedSteps):
        def steps(self, position):
            for found in super().steps(position):
                planned.append(threading.current_thread().name)
                yield found

    feed = Feed(Watched(steps), Position(0, {}), 0, 1, None, 120, Slots(0, 1))
    deadline = time.monotonic() + 10
    while len(planned) < DEALT_AHEAD + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert planned == ["plan"] * (DEALT_AHEAD + 1)
    assert not feed.pending
    micros = list(feed)
    assert sum(len(micro) for micro, _ in micros) == sum(map(len, steps))
    assert [entry[0].index for entry in feed.pending] == [step.index for step in steps]
    feed.close()


def test_the_thread_walks_a_plan_of_its_own(dataset):
    plan = plan_of(dataset)
    own = own_plan(plan)
    assert own.sources["toy"].order is not plan.sources["toy"].order
    assert vars(own_plan(fixed := FixedSteps([]))) == vars(fixed)
    feed = Feed(plan, plan.start(), 0, 1, 4, 120, Slots(0, 1))
    feed.close()
    walks = [list(islice(walk.steps(plan.start()), 12)) for walk in (own, plan)]
    for (one, after), (other, other_after) in zip(*walks, strict=True):
        assert (one.index, one.task, after) == (other.index, other.task, other_after)
        assert one.texts.tolist() == other.texts.tolist()
        assert one.images.tolist() == other.images.tolist()


def test_two_loaders_share_a_plan(dataset):
    """Each walks its own copy: what a plan remembers is not safe for threads."""
    plan = plan_of(dataset)
    reference = take(loader_of(dataset, plan), 12)
    with loader_of(dataset, plan) as one, loader_of(dataset, plan, workers=1) as two:
        for _, _, batches in reference:
            for first, second, expected in zip(next(one)[2], next(two)[2], batches, strict=True):
                equal(first, expected)
                equal(second, expected)


def test_what_planning_says_reaches_the_consumer_after_what_was_planned(dataset):
    steps = evaluation_steps(dataset.lengths, "mlm", 30, SETTINGS)

    class Failing(FixedSteps):
        def steps(self, position):
            yield from super().steps(position)
            raise VlscaleError("resume state: no such place")

    found = []
    feed = Feed(Failing(steps), Position(0, {}), 0, 1, None, 120, Slots(0, 1))
    with pytest.raises(VlscaleError, match="no such place"):
        found.extend(feed)
    assert sum(len(micro) for micro, _ in found) == sum(map(len, steps))
    feed._thread.join(10)
    assert not feed._thread.is_alive()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_the_thread_ends_with_the_feed(dataset, how):
    plan = plan_of(dataset, {"mlm": 1})  # without end
    feed = Feed(plan, plan.start(), 0, 1, 4, 120, Slots(0, 1))
    items = iter(feed)
    next(items)
    thread = feed._thread
    assert thread.is_alive()
    if how == "close":
        feed.close()
        feed.close()
        assert len(list(items)) < 4
    del feed, items
    thread.join(10)
    assert not thread.is_alive()
