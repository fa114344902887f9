"""How many rows of unfinished parts have been read, over all processes of a build: what a progress bar shows of them.

A part may take hours (a ``.gz`` is a single one), so that finished parts alone would not tell whether anything happens.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Row = TypeVar("Row")
EVERY_SECONDS = 0.1
_SLOTS = 4096

_state: dict[str, Any] = {}


def shared_counts() -> Any:
    """The counters of this process and its workers: int64, one per process.

    Each process writes its own, so that no lock is needed, which a killed process might keep for ever. That two
    processes share one is unlikely, and only shows a wrong number.
    """
    if "counts" not in _state:
        _state["counts"] = multiprocessing.get_context("spawn").RawArray("q", _SLOTS)
    return _state["counts"]


def count_in(counts: Any) -> None:
    """Count in the counters of the process that started this one."""
    _state["counts"] = counts


def rows_under_way() -> int:
    """Rows read so far of the parts that are not finished."""
    return sum(_state["counts"]) if "counts" in _state else 0


def counted(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows and count them until the last one: then they are the finished part's."""
    counts, slot, last = shared_counts(), os.getpid() % _SLOTS, 0.0
    try:
        for number, row in enumerate(rows):
            now = time.monotonic()
            if now - last > EVERY_SECONDS:
                counts[slot], last = number, now
            yield row
    finally:
        counts[slot] = 0
