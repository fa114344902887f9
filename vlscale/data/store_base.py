"""What the readers of the three stores share."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vlscale.data.chunks import slices
from vlscale.data.index import REBUILD, read_index
from vlscale.data.reader import FilesOf, MdsReader
from vlscale.errors import VlscaleError


class Store:
    """What the three readers share. Cached arrays are left out of pickles and read again from the side files.

    Attributes:
        bytes_read: bytes of shards that batches have been made of, in this process.
    """

    meta: Any
    _cached: tuple[str, ...] = ()

    def __init__(self, folder: Path, columns: dict[str, str], verify: bool, files: FilesOf | None) -> None:
        self.folder = folder
        index = read_index(folder, columns, on_disk=files is None)
        self._reader = MdsReader(index, verify, files(index) if files else None)
        self.bytes_read = 0

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def reader(self) -> MdsReader:
        """The rows, and the shards that they are in."""
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self._cached}

    def row(self, row: int) -> dict[str, Any]:
        """Decode one row (all columns, arrays in the stored dtype); for people and tools, not for batches.

        Raises:
            VlscaleError: the row is damaged.
            IndexError: there is no such row.
        """
        return self._reader.row(row)

    def digests(self) -> list[str]:
        """Hex digests of everything that the dataset's fingerprint covers, in a fixed order."""
        found = [self._reader.index.digest, hashlib.sha256(self.meta.model_dump_json().encode()).hexdigest()]
        for name in self._cached:
            array: NDArray[Any] = getattr(self, name)
            found.append(hashlib.sha256(np.ascontiguousarray(array).data).hexdigest())
        return found

    def fail(self, row: int, problem: str) -> NoReturn:
        """Raise a VlscaleError that names the store and the row."""
        raise VlscaleError(f"{self.folder}: row {row}: {problem}; {REBUILD}")


def check_lengths(folder: Path, lengths: NDArray[np.int32], what: str, of: str) -> None:
    """Refuse int [N] ``lengths`` below 1, naming the first such row.

    Raises:
        VlscaleError: there is one.
    """
    for part in slices(len(lengths)):
        if lengths[part].min() < 1:
            row = part.start + int(np.argmax(lengths[part] < 1))
            raise VlscaleError(
                f"{folder / 'lengths.npy'}: {what} row {row} has {lengths[row]} {of}, expected at least 1; "
                f"leave it out and build the store again"
            )


def lengths_of(folder: Path, lengths: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [B], the lengths of int64 [B] ``rows``.

    Raises:
        IndexError: there is no such row.
    """
    if len(rows) and (rows.min() < 0 or rows.max() >= len(lengths)):
        raise IndexError(f"{folder}: rows {rows.min()}..{rows.max()} are not all in 0..{len(lengths) - 1}")
    return np.asarray(lengths[rows], np.int32)


def within(counts: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [sum of counts]: 0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, and so on."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - counts, counts)


def owner(rows: NDArray[np.int64], counts: NDArray[Any], position: int) -> int:
    """The row that a position of the packed array comes from."""
    return int(rows[int(np.searchsorted(np.cumsum(counts), position, side="right"))])
