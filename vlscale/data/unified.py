"""Unified steps: images, texts and pairs of several datasets in every step, in the proportion of the recipe's mix.

The units of all datasets are merged into one endless sequence: unit i of a dataset with share s has its place at
(i + 1/2) / s. So at any place T, each dataset has been met T s times, give or take half a unit, for ever. Steps are
consecutive parts of the sequence. Where it stands follows from the datasets' cursors alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vlscale.data.expansion import Expansion, Units
from vlscale.data.order import PassOrder
from vlscale.data.source import PlanSettings, Source, Step
from vlscale.data.view_bounds import GroupBounds, group_bounds
from vlscale.data.views import MOST_DATASETS
from vlscale.errors import VlscaleError

_SAMPLE = 512
"""Units from which the cost of a step's units is estimated; the estimate decides how fast it is cut, not where."""

_MARGIN = 1.04

Cursors = Mapping[str, tuple[int, int]]


def merged(taken: NDArray[np.int64], shares: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The datasets of the next ``count`` units.

    Args:
        taken: int64 [D], units of each dataset that have been met.
        shares: float64 [D], adding up to 1.
        count: how many.

    Returns:
        int64 [count], numbers of datasets.
    """
    likely = np.minimum(np.ceil(shares * (count + len(shares))).astype(np.int64) + 2, count)
    for each in (likely, np.full(len(shares), count)):  # more where a dataset has fallen behind
        source = np.repeat(np.arange(len(shares)), each)
        inside = np.arange(len(source)) - np.repeat(np.cumsum(each) - each, each)
        places = (taken[source] + inside + 0.5) / shares[source]
        order = np.argsort(places, kind="stable")[:count]
        found = source[order]
        used = np.bincount(found, minlength=len(shares))
        if not len(order) or np.all((used < each) | (each == count)):
            break
    return found


class UnifiedSteps:
    """Cuts unified steps.

    Args:
        sources: name -> dataset, in the recipe's order.
        shares: float64 [D], share of units of each, adding up to 1.
        settings: the recipe's part of the plan.
        training: see :class:`~vlscale.data.expansion.Expansion`.

    Attributes:
        bounds: name -> what its groups can cost.

    Raises:
        VlscaleError: the recipe's mode does not go with this task, or a store is missing.
    """

    def __init__(
        self, sources: Mapping[str, Source], shares: NDArray[np.float64], settings: PlanSettings, training: bool = True
    ) -> None:
        if settings.mode != "packed":
            raise VlscaleError(
                f"batch.mode {settings.mode} knows pairs only; task unified mixes images, texts and pairs: set "
                f"batch.mode to packed"
            )
        if len(sources) > MOST_DATASETS:
            raise VlscaleError(
                f"data.datasets: {len(sources)} datasets are trained with task unified, at most {MOST_DATASETS} can be "
                f"mixed in a step; merge some of them"
            )
        self._sources, self._shares, self._settings = dict(sources), shares, settings
        self._expansion = Expansion(self._sources, settings, training)
        self.bounds: dict[str, GroupBounds] = {
            name: group_bounds(number, source, settings, self._expansion)
            for number, (name, source) in enumerate(self._sources.items())
        }

    def twin(self, sources: Mapping[str, Source]) -> UnifiedSteps:
        """The same over the sources of another thread."""
        other = object.__new__(UnifiedSteps)
        other._sources, other._shares, other._settings = dict(sources), self._shares, self._settings
        other._expansion, other.bounds = self._expansion.twin(other._sources), self.bounds
        return other

    def step(self, index: int, cursors: Cursors) -> tuple[Step, dict[str, tuple[int, int]]]:
        """Cut the step at ``cursors``: whole groups within the budget, at least one; or so many units.

        Returns:
            The step, and the cursors behind it.
        """
        budget, count = self._settings.global_batch_tokens, self._settings.global_batch_examples
        if budget is None:
            assert count is not None
            step = self.expanded(index, cursors, count)
        else:
            step = self._filled(index, cursors, budget)
        return step, self._behind(cursors, self._next(cursors, int(step.group[-1]) + 1))

    def _filled(self, index: int, cursors: Cursors, budget: int) -> Step:
        mean = sum(float(s) * b.most.mean for s, b in zip(self._shares, self.bounds.values(), strict=True))
        count = min(int(budget / mean) + 2, _SAMPLE)  # what groups cost is known better once some are drawn
        step = self.expanded(index, cursors, count)
        while True:
            ends = group_ends(step)
            totals = np.cumsum(step.costs, dtype=np.int64)[ends - 1]
            if totals[-1] > budget:
                kept = max(1, int(np.searchsorted(totals, budget, side="right")))
                return step.part(index, 0, int(ends[kept - 1]))
            known, count = count, max(int(count * budget / totals[-1] * _MARGIN), count) + 2
            step = step.joined(self.expanded(index, cursors, count, known))

    def expanded(self, index: int, cursors: Cursors, count: int, known: int = 0) -> Step:
        """The next ``count`` units but for the first ``known`` of them, as a step that is not cut to any budget."""
        return self._expansion.step(index, self.take(cursors, count).behind(known))

    def take(self, cursors: Cursors, count: int) -> Units:
        """The next ``count`` units."""
        found = self._next(cursors, count)
        rows, passes = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, (name, source) in enumerate(self._sources.items()):
            assert isinstance(source.order, PassOrder)
            at = np.flatnonzero(found == number)
            if len(at):
                part = source.order.take(*cursors[name], len(at))
                rows[at], passes[at] = part.rows, part.passes
        return Units(found, rows, passes)

    def _next(self, cursors: Cursors, count: int) -> NDArray[np.int64]:
        """int64 [count], the datasets of the next units."""
        taken = [cursors[name][0] * len(source.order) + cursors[name][1] for name, source in self._sources.items()]
        return merged(np.array(taken, np.int64), self._shares, count)

    def _behind(self, cursors: Cursors, found: NDArray[np.int64]) -> dict[str, tuple[int, int]]:
        used = np.bincount(found, minlength=len(self._sources)).tolist()
        return {
            name: source.order.advance(*cursors[name], count)
            for (name, source), count in zip(self._sources.items(), used, strict=True)
        }

    @property
    def drawn_from(self) -> frozenset[str]:
        """Names of the datasets that retrieved views are rows of: any row, at any time."""
        return self._expansion.drawn_from

    @property
    def least(self) -> int:
        """Fewest tokens of a group."""
        return min(bounds.least for bounds in self.bounds.values())

    @property
    def largest(self) -> tuple[str, str]:
        """The dataset whose groups may be the largest, and what is long in the largest of them."""
        name = max(self.bounds, key=lambda each: self.bounds[each].most.most)
        return name, self.bounds[name].largest

    def heaviest(self, count: int) -> int:
        """Most tokens that ``count`` consecutive groups can cost together."""
        if count == 1:
            return max(bounds.most.most for bounds in self.bounds.values())
        datasets = len(self._shares)
        total = 0
        for share, bounds in zip(self._shares.tolist(), self.bounds.values(), strict=True):
            # Between two places T apart lie less than T s + 1 units of a dataset, and T is less than count + D.
            total += bounds.most.heaviest(min(count, math.floor(share * (count + datasets)) + 1))
        return total

    def most_groups(self, budget: int) -> int:
        """Most groups that a step of ``budget`` tokens can hold."""
        parts = [(share, b.least) for share, b in zip(self._shares.tolist(), self.bounds.values(), strict=True)]
        mean = sum(share * least for share, least in parts)
        # Of so many groups, more than (count - D) s - 1 are of a dataset with share s.
        evenly = math.ceil((budget + sum(least for _, least in parts)) / mean) + len(parts)
        return max(1, min(budget // self.least, evenly))


def group_ends(step: Step) -> NDArray[np.int64]:
    """int64 [G], the row behind each group."""
    return np.flatnonzero(np.r_[step.group[1:] != step.group[:-1], True]) + 1
