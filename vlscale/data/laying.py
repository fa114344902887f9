"""Laying groups of examples into bins: the two rules behind dealing, and why they keep under a ceiling."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray

FEW_BINS = 32
"""From here on, whole rounds of NumPy are faster than a heap."""


def lay_evenly(costs: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Lay groups into bins so that the bins' loads are even: largest first, into the lightest (LPT, Graham 1969).

    With many bins it goes in rounds: the next ``bins`` groups at once, the largest to the lightest bin. Either way no
    two loads ever differ by more than the largest group. (One group: into the lightest bin. A round: two bins come
    closer, or apart by at most the difference of two groups of the round.) Hence, for n bins,

        heaviest <= total / n + largest * (1 - 1 / n).

    Args:
        costs: int64 [G], positive.
        bins: their number.

    Returns:
        int64 [G], the bin of each group.
    """
    falling = np.argsort(-costs, kind="stable")
    found = np.empty(len(costs), np.int64)
    if bins == 1:
        found[:] = 0
    elif bins <= FEW_BINS:
        found[falling] = _one_by_one(costs[falling], bins)
    else:
        loads = np.zeros(bins, np.int64)
        for begin in range(0, len(costs), bins):
            part = falling[begin : begin + bins]
            lightest = np.argsort(loads, kind="stable")[: len(part)]
            found[part] = lightest
            loads[lightest] += costs[part]
    return found


def _one_by_one(falling: NDArray[np.int64], bins: int) -> list[int]:
    # Load and bin share one integer: comparing integers is several times faster than comparing tuples.
    shift = bins.bit_length()
    mask = (1 << shift) - 1
    heap = list(range(bins))
    chosen = []
    take = heapq.heapreplace
    for cost in [int(cost) << shift for cost in falling.tolist()]:
        lightest = heap[0]
        chosen.append(lightest & mask)
        take(heap, lightest + cost)
    return chosen


def lay_in_runs(longest: NDArray[np.int64], sizes: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Lay groups into bins so that the largest ``longest example x examples`` of a bin is as small as it can be.

    Groups are sorted, longest first, and cut into runs: the smallest capacity under which greedily filled runs are
    enough is found by bisection. (Runs of the sorted groups are optimal where all groups are of one size.)

    Args:
        longest: int64 [G], length of each group's longest example.
        sizes: int64 [G], examples of each group.
        bins: their number.

    Returns:
        int64 [G], the bin of each group; bins may stay empty.
    """
    falling = np.argsort(-longest, kind="stable")
    lengths, ends = longest[falling], np.cumsum(sizes[falling])
    low, high = int((lengths * sizes[falling]).max()), int(lengths[0] * ends[-1])
    while low < high:
        middle = (low + high) // 2
        if len(runs_under(lengths, ends, middle, bins + 1)) <= bins:
            high = middle
        else:
            low = middle + 1
    begins = runs_under(lengths, ends, low, bins)
    found = np.empty(len(longest), np.int64)
    found[falling] = np.repeat(np.arange(len(begins)), np.diff([*begins, len(longest)]))
    return found


def runs_under(lengths: NDArray[np.int64], ends: NDArray[np.int64], capacity: int, most: int) -> list[int]:
    """Where greedily filled runs begin; no more than ``most`` of them are looked for.

    Args:
        lengths: int64 [G], falling, length of each group's longest example.
        ends: int64 [G], running number of examples.
        capacity: most ``longest x examples`` of a run; at least that of any one group.
        most: their number.
    """
    begins, begin, done = [0], 0, 0
    while len(begins) < most:
        fits = done + capacity // int(lengths[begin])
        begin = int(np.searchsorted(ends, fits, side="right"))
        if begin >= len(lengths):
            break
        done = int(ends[begin - 1])
        begins.append(begin)
    return begins
