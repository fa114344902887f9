"""Choosing some of each row's candidates, none twice, as a pure function of what they are chosen for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlscale.data.random import Draws


def choose(
    draws: Draws, purpose: str, passes: NDArray[np.int64], examples: NDArray[np.int64], counts: NDArray[np.int64],
    wanted: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Draw ``wanted`` of each row's candidates, or all of them where there are no more; every set is equally likely.

    Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987), for all rows at once.

    Args:
        draws: random numbers of the rows' dataset.
        purpose: what for.
        passes: int64 [B]; examples: int64 [B]: they key the draws.
        counts: int64 [B], candidates of each row; may be 0.
        wanted: how many.

    Returns:
        ``(owners, places)``, int64 [K] each: the row, rising, and which of its candidates.
    """
    sizes = np.minimum(counts, wanted)
    most = int(sizes.max(initial=0))
    taken = np.full((len(counts), most), -1, np.int64)
    for turn in range(most):
        live = np.flatnonzero(turn < sizes)
        last = (counts - sizes)[live] + turn
        drawn = draws.below(purpose, last + 1, passes[live], examples[live], turn)
        twice = (taken[live, :turn] == drawn[:, None]).any(1)
        taken[live, turn] = np.where(twice, last, drawn)
    owners, turns = np.nonzero(taken >= 0)
    return owners, taken[owners, turns]
