from __future__ import annotations

import numpy as np
import pytest

from vlscale.report.outcome import Outcome, share_of_best


def test_mean_and_ratio() -> None:
    values, clusters = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 2])
    assert Outcome(values, clusters, 0.5).mean == 0.75
    assert Outcome(values, clusters, 0.5, weights=np.array([2.0, 2.0, 1.0, 1.0])).mean == 0.5


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        values = (rng.random(150) < 0.3).astype(float)
        low, high = Outcome(values, np.arange(150), 0.0).interval(seed=1)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 100 <= 0.99


def test_interval_draws_whole_clusters() -> None:
    values = np.repeat(np.arange(20) % 2, 50).astype(float)
    narrow = Outcome(values, np.arange(1000), 0.0).interval(seed=1)
    wide = Outcome(values, np.repeat(np.arange(20), 50), 0.0).interval(seed=1)
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])
    assert wide == Outcome(values, np.repeat(np.arange(20), 50), 0.0).interval(seed=1)


@pytest.mark.parametrize(("target", "expected"), [(0, 0.0), (1, 0.5), (2, 0.5), (3, 0.0)])
def test_share_of_best_counts_ties_and_ignores_padding(target: int, expected: float) -> None:
    scores, allowed = np.array([[0.1, 0.4, 0.4, 9.0]]), np.array([[True, True, True, False]])
    assert share_of_best(scores, allowed, np.array([target])) == [expected]
