"""MdsReader: rows of a store by number, over all its memory-mapped shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.index import StoreIndex
from vlscale.data.shard import Shard

MAX_OPEN_SHARDS = 128


class MdsReader:
    """Rows of a store by number, over all its shards. Cheap to pickle; maps are opened at first touch.

    Not safe for threads; each worker process has its own.

    Args:
        index: the validated index.
        verify: check each shard's hash when it is first touched in this process.
    """

    def __init__(self, index: StoreIndex, verify: bool) -> None:
        self.index = index
        self.verify = verify
        self.ends = index.ends
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_verified": set()}

    def shard(self, number: int) -> Shard:
        """Return shard ``number``, mapping it if needed; the least recently used beyond 128 are closed.

        Raises:
            VlscaleError: see :class:`Shard`.
        """
        found = self._open.get(number)
        if found is None:
            verify = self.verify and number not in self._verified
            found = Shard(self.index.folder, self.index.shards[number], self.index.columns, verify)
            self._verified.add(number)
            self._open[number] = found
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return found

    def by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Group rows by shard: yields ``(shard, places in rows, rows within the shard)``.

        Raises:
            IndexError: a row is outside the store.
        """
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"{self.index.folder}: rows {rows.min()}..{rows.max()} are not all in 0..{len(self) - 1}")
        numbers = np.searchsorted(self.ends, rows, side="right") - 1
        if numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
            yield self.shard(int(numbers[0])), np.arange(len(rows)), rows - self.ends[numbers[0]]
            return
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield self.shard(number), places, rows[places] - self.ends[number]

    def arrays(self, rows: NDArray[np.int64], names: Sequence[str], ndims: Sequence[int]) -> list[list[NDArray[Any]]]:
        """Views of array columns for int64 [B] ``rows``: one list per name, of B arrays in the order of ``rows``.

        Raises:
            VlscaleError: see :meth:`Shard.arrays`.
        """
        found: list[list[Any]] = [[None] * len(rows) for _ in names]
        for shard, places, local in self.by_shard(rows):
            order = places.tolist()
            for target, views in zip(found, shard.arrays(local, names, ndims), strict=True):
                for place, view in zip(order, views, strict=True):
                    target[place] = view
        return found

    def row(self, row: int) -> dict[str, Any]:
        """Decode one row.

        Raises:
            VlscaleError: see :meth:`Shard.row`.
        """
        for shard, _, local in self.by_shard(np.array([row], np.int64)):
            return shard.row(int(local[0]))
        raise AssertionError("unreachable")
