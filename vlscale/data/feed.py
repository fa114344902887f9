"""The feed of a loader: steps are planned and dealt in a thread, a few ahead of what the workers have been given.

Dealing a step for a thousand processes takes as long as some micro-batches do; in a thread it does not hold up the
training process, which spends its time waiting for the GPU anyway.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from vlscale.data.deal import PACKED, MicroBatch, Rule, deal_hand, fitting_accumulation
from vlscale.data.plan import Plan, Position, Step
from vlscale.data.slots import Slots

DEALT_AHEAD = 2
"""Dealt steps that wait to be given out; one more may be in the making."""

_END_S = 10.0

Dealt = tuple[Step, Position, list[MicroBatch]]


class StepSource(Protocol):
    """What the loader reads of a :class:`~vlscale.data.plan.Plan` or :class:`~vlscale.data.plan.FixedSteps`."""

    pairs: list[tuple[str, str]]

    def steps(self, position: Position) -> Iterator[tuple[Step, Position]]:
        """Yield (step, position after it)."""
        ...


class Feed:
    """Iterates one rank's micro-batches, each with the slot that it may be written to.

    Args:
        plan: the source of steps; a :class:`Plan` is not shared with other threads, but copied.
        position: where to begin.
        rank: this process; world_size: their number.
        gas: micro-steps per step; None: the least that fits each step.
        ceiling: most tokens of a micro-batch.
        slots: where batches are to be written.
        rule: how steps are dealt.

    Attributes:
        pending: (step, position after it, number of micro-batches) of each step that has been begun, oldest first.
    """

    def __init__(
        self,
        plan: StepSource,
        position: Position,
        rank: int,
        world_size: int,
        gas: int | None,
        ceiling: int,
        slots: Slots,
        rule: Rule = PACKED,
    ) -> None:
        self.pending: deque[tuple[Step, Position, int]] = deque()
        self._slots = slots
        self._ahead = _Ahead()
        steps = own_plan(plan).steps(position)
        # The thread knows nothing of the feed, so a feed that is dropped is collected, and ends the thread.
        arguments = (self._ahead, steps, rank, world_size, gas, ceiling, rule)
        self._thread = threading.Thread(target=_plan_ahead, args=arguments, name="plan", daemon=True)
        self._thread.start()
        weakref.finalize(self, _end, self._ahead, self._thread)

    def __iter__(self) -> Iterator[tuple[MicroBatch, int | None]]:
        """Yield (micro-batch, slot or None).

        Raises:
            VlscaleError: what planning or dealing says.
        """
        while (dealt := self._ahead.take()) is not None:
            step, after, hand = dealt
            self.pending.append((step, after, len(hand)))
            for micro in hand:
                yield micro, self._slots.acquire()

    def close(self) -> None:
        """End the thread. May be called again."""
        _end(self._ahead, self._thread)


def _plan_ahead(
    ahead: _Ahead,
    steps: Iterator[tuple[Step, Position]],
    rank: int,
    world_size: int,
    gas: int | None,
    ceiling: int,
    rule: Rule,
) -> None:
    try:
        for step, after in steps:
            micro_steps = gas or fitting_accumulation(step, world_size, ceiling, rule)
            if not ahead.put((step, after, deal_hand(step, rank, world_size, micro_steps, ceiling, rule))):
                return
        ahead.put(None)
    except BaseException as error:  # whatever it is, the process that waits for the step has to hear of it
        ahead.put(error)


def _end(ahead: _Ahead, thread: threading.Thread) -> None:
    ahead.close()
    if thread is not threading.current_thread():
        thread.join(_END_S)


class _Ahead:
    """A short queue that can be closed from both ends."""

    def __init__(self) -> None:
        self._items: deque[Dealt | BaseException | None] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: Dealt | BaseException | None) -> bool:
        """Wait for room and append; False: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < DEALT_AHEAD)
            self._items.append(item)
            self._changed.notify_all()
            return not self._closed

    def take(self) -> Dealt | None:
        """Wait for the next item; None: the end, or closed. An exception is raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._items))
            if self._closed:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Drop what waits, and wake whoever waits: both ends are told. May be called again."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def own_plan(plan: StepSource) -> StepSource:
    """Return a plan that remembers passes and windows of its own: what it remembers is not safe to share by threads."""
    return plan.twin() if isinstance(plan, Plan) else plan
