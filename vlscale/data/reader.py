"""MdsReader: rows of a store by number, over all its memory-mapped shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlscale.data.index import StoreIndex
from vlscale.data.shard import Shard
from vlscale.errors import VlscaleError

MAX_OPEN_SHARDS = 4096
MAX_OPEN_BYTES = 8 << 30
"""Bytes of shards that a reader keeps mapped at most; they are pages of the disk cache, which processes share."""

_REPAIRS = 3


class Files(Protocol):
    """Where a reader's shards are."""

    @property
    def map_bytes(self) -> int | None:
        """Most bytes that a reader should keep mapped; None leaves it to the reader."""
        ...

    def path(self, number: int) -> Path:
        """Return where shard ``number`` lies; raises VlscaleError if it cannot be had."""
        ...

    def present(self, number: int, inode: int) -> bool:
        """Does the file that was opened as shard ``number`` still exist?"""
        ...

    def repair(self, number: int, inode: int) -> bool:
        """Try to replace a damaged file; False: nothing can be done."""
        ...


FilesOf = Callable[[StoreIndex], Files]
"""Makes the files of a store from its index."""


class LocalFiles:
    """Shards that lie in the store's own folder."""

    map_bytes = None

    def __init__(self, index: StoreIndex) -> None:
        self._index = index

    def path(self, number: int) -> Path:
        """Return where shard ``number`` lies."""
        return self._index.folder / self._index.shards[number].basename

    def present(self, number: int, inode: int) -> bool:
        """True: nobody evicts here."""
        return True

    def repair(self, number: int, inode: int) -> bool:
        """False: there is no other copy."""
        return False


class MdsReader:
    """Rows of a store by number, over all its shards. Cheap to pickle; maps are opened at first touch.

    Not safe for threads; each worker process has its own.

    Args:
        index: the validated index.
        verify: check each shard's hash when it is first touched in this process.
        files: where the shards are; None is the index's folder.
    """

    def __init__(self, index: StoreIndex, verify: bool, files: Files | None = None) -> None:
        self.index = index
        self.verify = verify
        self.files: Files = files or LocalFiles(index)
        self.ends = index.ends
        self._open: OrderedDict[int, tuple[Shard, int]] = OrderedDict()
        self._open_bytes = 0
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_open_bytes": 0, "_verified": set()}

    def shard(self, number: int) -> Shard:
        """Return shard ``number``, mapping it if needed.

        The least recently used are closed beyond :data:`MAX_OPEN_BYTES` or what ``files`` allows; so are those whose
        file has been evicted, which frees their bytes on disk.

        Raises:
            VlscaleError: see :class:`Shard`; a damaged file of a cache is fetched again before that.
        """
        found = self._open.get(number)
        if found is None:
            self._close_gone()
            found = self._map(number)
            self._open[number] = found
            self._open_bytes += self.index.shards[number].bytes
            most = MAX_OPEN_BYTES if self.files.map_bytes is None else min(MAX_OPEN_BYTES, self.files.map_bytes)
            while len(self._open) > 1 and (len(self._open) > MAX_OPEN_SHARDS or self._open_bytes > most):
                self._close(next(iter(self._open)))
        else:
            self._open.move_to_end(number)
        return found[0]

    def _map(self, number: int) -> tuple[Shard, int]:
        for attempt in range(_REPAIRS + 1):
            path = self.files.path(number)
            inode = 0
            try:
                inode = path.lstat().st_ino
                verify = self.verify and number not in self._verified
                found = Shard(path.parent, self.index.shards[number], self.index.columns, verify)
            except (VlscaleError, OSError) as error:
                # Evicted by another process since, or damaged in the cache; in the store itself it stays damaged.
                if attempt < _REPAIRS and self.files.repair(number, inode):
                    continue
                if isinstance(error, VlscaleError):
                    raise
                raise VlscaleError(
                    f"{path}: cannot be opened ({error.strerror}); restore the file or build the store again"
                ) from None
            self._verified.add(number)
            return found, inode
        raise AssertionError("unreachable")

    def _close_gone(self) -> None:
        for number in [number for number, (_, inode) in self._open.items() if not self.files.present(number, inode)]:
            self._close(number)

    def _close(self, number: int) -> None:
        del self._open[number]
        self._open_bytes -= self.index.shards[number].bytes

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
