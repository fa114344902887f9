"""Fixed steps: what a model is evaluated on, the same each time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import DatasetLengths
from vlscale.data.position import Position
from vlscale.data.source import PlanSettings, Source, Step
from vlscale.data.unified import UnifiedSteps, group_ends
from vlscale.data.views import UNIFIED


class FixedSteps:
    """A finite list of steps behind the interface that the loader reads a :class:`Plan` through."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = list(steps)
        self.pairs = list(dict.fromkeys((step.dataset, step.task) for step in steps))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)

    def start(self) -> Position:
        """Return the position before the first step."""
        return Position(0, {})

    def steps(self, position: Position) -> Iterator[tuple[Step, Position]]:
        """Yield (step, position after it) from ``position`` to the end."""
        for index in range(position.step, len(self._steps)):
            yield self._steps[index], Position(index + 1, {})


def evaluation_seed(seed: int) -> int:
    """Return the seed of everything drawn in evaluation, so that no training draw is met again."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0evaluation".encode(), digest_size=7).digest(), "little")


def evaluation_steps(lengths: DatasetLengths, task: str, examples: int, settings: PlanSettings) -> list[Step]:
    """Return the fixed steps of one task over the first ``examples`` texts of a validation set's first pass.

    Of task ``unified`` these are units: the set is evaluated by itself, without retrieved views.

    The order, labels, partners and masks depend on the recipe's seed (through :func:`evaluation_seed`) and on nothing
    else: not on the training step, nor on the number of processes. Steps are cut to the training batch size; the last
    one is shorter. Texts over ``max_text_tokens`` are left out, as in training.

    Raises:
        VlscaleError: the set is empty after filtering or lacks what the task needs.
    """
    if settings.reference_batches is not None:  # held-out steps are cut by tokens, however training's are
        tokens = settings.reference_batches * settings.micro_batch_tokens
        settings = replace(settings, mode="packed", reference_batches=None, global_batch_tokens=tokens)
    settings = replace(settings, seed=evaluation_seed(settings.seed))
    source = Source(lengths, {task: 1.0}, settings)
    count = min(examples, len(source.order))
    block = _units(source, count, settings) if task == UNIFIED else source.block(0, task, (0, 0), count)
    ends = group_ends(block)
    if settings.global_batch_tokens is not None:
        cuts = _cuts(block, ends, settings.global_batch_tokens)
    else:
        per = (settings.global_batch_examples or 1) // settings.group_of(task)
        cuts = ends[per - 1 : -1 : per].tolist()
    edges = [0, *cuts, len(block)]
    return [block.part(index, begin, end) for index, (begin, end) in enumerate(pairwise(edges))]


def _units(source: Source, count: int, settings: PlanSettings) -> Step:
    """The first ``count`` units of a dataset with their views."""
    name = source.lengths.name
    steps = UnifiedSteps({name: source}, np.ones(1), settings, training=False)
    return steps.expanded(0, {name: (0, 0)}, count)


def _cuts(block: Step, ends: NDArray[np.int64], budget: int) -> list[int]:
    """Places inside ``block`` where a step ends, each holding whole groups within ``budget`` or a single one."""
    totals = np.r_[0, np.cumsum(block.costs, dtype=np.int64)[ends - 1]]
    found: list[int] = []
    begin = 0
    while True:
        begin = max(begin + 1, int(np.searchsorted(totals, totals[begin] + budget, side="right")) - 1)
        if begin >= len(ends):
            return found
        found.append(int(ends[begin - 1]))
