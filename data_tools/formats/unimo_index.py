"""What is kept in memory while UNIMO's files are searched for the first row of each image: arrays, no Python objects.

About 60 bytes per image in all: 24 to 48 of :class:`SeenImages`, 16 of a first row's position and number, and the 22 of
these as text, which goes into the build's manifest.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Iterable

import numpy as np
import xxhash
from numpy.typing import NDArray

_FIRST_SLOTS = 1 << 10


class SeenImages:
    """A hash table from names to digests, of 64 bits each: of a million names, two have one hash once in 30 million."""

    def __init__(self) -> None:
        self._table: NDArray[np.uint64] = np.zeros((_FIRST_SLOTS, 2), np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, name: bytes, content: bytes) -> bool | None:
        """Return None for a new name, which is added; else whether its content is that of the first time."""
        key, digest = xxhash.xxh3_64_intdigest(name) or 1, xxhash.xxh3_64_intdigest(content)
        place = self._place(self._table, key)
        if self._table[place, 0]:
            return int(self._table[place, 1]) == digest
        self._table[place] = key, digest
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            self._grow()
        return None

    def _grow(self) -> None:
        larger = np.zeros((2 * len(self._table), 2), np.uint64)
        for row in self._table:
            if row[0]:
                larger[self._place(larger, int(row[0]))] = row
        self._table = larger

    @staticmethod
    def _place(table: NDArray[np.uint64], key: int) -> int:
        """Where a key stands, or would."""
        place = key % len(table)
        while table[place, 0] and int(table[place, 0]) != key:
            place = (place + 1) % len(table)
        return place


class FirstRows:
    """Bytes at which rows begin, and their numbers (-1: not known)."""

    def __init__(self) -> None:
        self._flat = array("q")

    def __len__(self) -> int:
        return len(self._flat) // 2

    def add(self, begin: int, row: int | None) -> None:
        """Append a row."""
        self._flat.extend((begin, -1 if row is None else row))

    def spell(self, size: int) -> Iterable[str]:
        """Yield the rows, ``size`` at a time, as text for :func:`read_rows`; one empty text if there is none."""
        for first in range(0, max(len(self), 1), size):
            piece = np.frombuffer(self._flat, np.int64)[2 * first : 2 * (first + size)] if self._flat else np.zeros(0)
            yield base64.b64encode(piece.astype("<i8").tobytes()).decode("ascii")


def read_rows(spelled: str) -> list[tuple[int, int | None]]:
    """Read what :meth:`FirstRows.spell` wrote."""
    pairs = np.frombuffer(base64.b64decode(spelled), "<i8").reshape(-1, 2).tolist()
    return [(begin, None if row < 0 else row) for begin, row in pairs]
