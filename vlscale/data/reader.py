"""MdsReader: rows of a store by number, over all its memory-mapped shards.

What is open is counted over all readers of the process, because its limits are: descriptors (a map keeps one), and the
disk of a cache, where the bytes of an evicted shard stay taken until the last map is closed. Closing means that the
reader lets go; views that were handed out stay valid, and keep map and descriptor until they go too.
"""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlscale.data.index import StoreIndex
from vlscale.data.shard import TOO_MANY, DamagedShardError, Shard, ShardAccessError, cannot_open

MAX_OPEN_SHARDS = 4096
"""Shards that all readers of a process keep open at most; fewer where few files may be open, see :func:`most_open`."""

MAX_OPEN_BYTES = 8 << 30
"""Bytes of shards that a reader keeps mapped at most; they are pages of the disk cache, which processes share."""

LOOK_S = 0.5
"""Seconds after which a process that reads rows looks again for evicted shards, even if it maps no other."""

_REPAIRS = 3
_FILES_SHARE = 4


class Files(Protocol):
    """Where a reader's shards are."""

    @property
    def map_bytes(self) -> int | None:
        """Most bytes that all readers of a process with the same ``pool`` should keep mapped; None is no such bound."""
        ...

    @property
    def pool(self) -> Hashable:
        """Names the disk space that ``map_bytes`` is a part of; None for a reader's own bound."""
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
    pool: Hashable = None

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


def most_open() -> int:
    """Shards that all readers of this process may keep open now: at most a quarter of the files that it may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_SHARDS, soft // _FILES_SHARE))


@dataclass
class _Open:
    """A mapped shard of a reader: its file's inode, and when it was used last, counted over all readers."""

    shard: Shard
    inode: int
    used: int


class _Readers:
    """All readers of this process that have opened a shard. Its lock guards what each of them has open."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clock = itertools.count()
        self._known: weakref.WeakSet[MdsReader] = weakref.WeakSet()
        self._looked = time.monotonic()

    def after_fork(self) -> None:
        """Another thread of the parent may have held the lock."""
        self.lock = threading.RLock()

    def add(self, reader: MdsReader) -> None:
        """Count ``reader``'s shards from now on, until it is collected."""
        self._known.add(reader)

    def look(self) -> None:
        """Close evicted shards if the last look was a while ago."""
        if time.monotonic() - self._looked >= LOOK_S:
            self.close_gone()

    def close_gone(self) -> None:
        """Close the shards of all readers whose files have been evicted, which frees their bytes on disk."""
        with self.lock:
            self._looked = time.monotonic()
            for reader in list(self._known):
                reader._close_gone()

    def trim(self, newest: MdsReader) -> None:
        """Close the shards used longest ago until all bounds hold; the one just mapped by ``newest`` stays."""
        most = newest.files.map_bytes
        with self.lock:
            everyone = list(self._known)
            while len(newest._open) > 1 and newest._open_bytes > MAX_OPEN_BYTES:
                self._close_oldest([newest])
            sharing = [reader for reader in everyone if reader.files.pool == newest.files.pool]
            while most is not None and _count(sharing) > 1 and sum(reader._open_bytes for reader in sharing) > most:
                self._close_oldest(sharing)
            while _count(everyone) > max(1, most_open()):
                self._close_oldest(everyone)

    def close_half(self) -> bool:
        """Close the older half of all open shards, because the system opens no more. False: none is open."""
        with self.lock:
            everyone = list(self._known)
            going = (_count(everyone) + 1) // 2
            for _ in range(going):
                self._close_oldest(everyone)
        return going > 0

    def _close_oldest(self, readers: Sequence[MdsReader]) -> None:
        oldest = min((reader for reader in readers if reader._open), key=lambda reader: reader._oldest().used)
        oldest._close(next(iter(oldest._open)))


def _count(readers: Sequence[MdsReader]) -> int:
    return sum(len(reader._open) for reader in readers)


_readers = _Readers()
os.register_at_fork(after_in_child=_readers.after_fork)


class MdsReader:
    """Rows of a store by number, over all its shards. Cheap to pickle; maps are opened at first touch.

    Not safe for threads; each worker process has its own. Different readers may be used by different threads.

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
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._open_bytes = 0
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_open_bytes": 0, "_verified": set()}

    def shard(self, number: int) -> Shard:
        """Return shard ``number``, mapping it if needed.

        The least recently used of all readers are closed beyond :func:`most_open`, :data:`MAX_OPEN_BYTES` or what
        ``files`` allows; so are those whose file has been evicted, which frees their bytes on disk. A mapped file that
        has changed its size since is closed and opened anew, which says what is wrong or has it fetched again.

        Raises:
            VlscaleError: see :class:`Shard`; a damaged file of a cache is fetched again before that.
        """
        with _readers.lock:
            found = self._open.get(number)
            if found is not None and found.shard.whole():
                found.used = next(_readers.clock)
                self._open.move_to_end(number)
                return found.shard
            if found is not None:
                self._close(number)
        shard, inode = self._map(number)
        with _readers.lock:
            _readers.add(self)
            self._open[number] = _Open(shard, inode, next(_readers.clock))
            self._open_bytes += self.index.shards[number].bytes
            _readers.close_gone()  # after the fetch, which may have evicted some to make room
            _readers.trim(self)
        return shard

    def _map(self, number: int) -> tuple[Shard, int]:
        repairs = 0
        while True:
            inode = 0
            try:
                path = self.files.path(number)
                try:
                    inode = path.lstat().st_ino
                except OSError as error:
                    raise cannot_open(path, error) from None
                verify = self.verify and number not in self._verified
                shard = Shard(path.parent, self.index.shards[number], self.index.columns, verify)
            except DamagedShardError:
                # Evicted by another process since, or damaged in the cache; in the store itself it stays damaged.
                repairs += 1
                if repairs > _REPAIRS or not self.files.repair(number, inode):
                    raise
            except ShardAccessError as error:
                # Ends: each turn closes at least one shard, until none is left to close.
                if error.errno not in TOO_MANY or not _readers.close_half():
                    raise
            else:
                self._verified.add(number)
                return shard, inode

    def _oldest(self) -> _Open:
        return next(iter(self._open.values()))

    def _close_gone(self) -> None:
        for number in [number for number, each in self._open.items() if not self.files.present(number, each.inode)]:
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
        _readers.look()
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
