"""Side files are read a chunk at a time, so that a billion rows need no billion-row temporary."""

from __future__ import annotations

from collections.abc import Iterator

ROWS = 1 << 20
"""Rows per chunk: some megabytes per array, and long enough that NumPy's own cost per call does not count."""


def slices(count: int, size: int = ROWS) -> Iterator[slice]:
    """Yield the slices of at most ``size`` rows that cover ``count`` rows, in order."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))
