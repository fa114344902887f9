"""Outcome: what a metric found, item by item, so that the mean comes with an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.random import Draws

RESAMPLES = 1000


class UnmeasurableError(Exception):
    """A metric does not apply to this dataset; the message says why. The report leaves the metric out and says so."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Sum of ``values`` over sum of ``weights``, with what it takes to judge it.

    Attributes:
        values: float64 [K], one per item: 1 right, 0 wrong, in between where ties make it an expectation.
        clusters: int64 [K], items of one image are not independent and are drawn together by the bootstrap.
        chance: what guessing gets.
        weights: float64 [K] or None (all 1); the mean predictor's error in a relative error.
        baseline: what a simple method without training gets, or None.
        extra: further figures for summary.json.
    """

    values: NDArray[np.float64]
    clusters: NDArray[np.int64]
    chance: float
    weights: NDArray[np.float64] | None = None
    baseline: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of items K."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """The metric."""
        return float(self.values.sum() / self._weights.sum())

    @property
    def _weights(self) -> NDArray[np.float64]:
        return np.ones(len(self.values)) if self.weights is None else self.weights

    def interval(self, seed: int) -> tuple[float, float]:
        """Return the 2.5 % and 97.5 % quantiles of a bootstrap over clusters (1,000 resamples, seeded)."""
        names, which = np.unique(self.clusters, return_inverse=True)
        count = len(names)
        sums = np.bincount(which, self.values, count)
        totals = np.bincount(which, self._weights, count)
        drawn = Draws(seed).below("report_bootstrap", count, 0, np.arange(RESAMPLES)[:, None], np.arange(count))
        means = sums[drawn].sum(1) / totals[drawn].sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        return float(low), float(high)


def share_of_best(scores: NDArray[np.floating[Any]], allowed: NDArray[np.bool_], target: NDArray[np.int64]) -> Any:
    """Chance that an argmax which breaks ties at random picks ``target``, exactly.

    Args:
        scores: float [K, R].
        allowed: bool [K, R], False for padding; at least one True per row, the target among them.
        target: int64 [K].

    Returns:
        float64 [K]: 1 over the number of best columns where the target is one of them, otherwise 0.
    """
    masked = np.where(allowed, scores, -np.inf)
    best = masked == masked.max(1, keepdims=True)
    return best[np.arange(len(target)), target] / best.sum(1)
