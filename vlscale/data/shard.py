"""One MDS shard behind a memory map.

A shard is ``uint32 n | uint32 offsets[n+1] | writer's settings as JSON | rows``, all little-endian, offsets counted
from the start of the file. A row is ``uint32 size`` of each column of varying size, then the columns in sorted order.
A ragged array is ``uint8 (ndim << 2 | log2(bytes per dimension)) | dimensions | values``.

Byte ranges are resolved for many rows at once, and views into the map are handed out. Nothing in a shard is believed:
every range is checked against the row, and every row against the file.

A map keeps a descriptor of its file open for as long as there are views into it. Reading a page that a truncation has
taken away ends the process with SIGBUS, which Python cannot catch; :meth:`Shard.whole` sees it beforehand, unless the
file shrinks between that look and the read. Evicting a shard unlinks it, which leaves maps as they are.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlscale.data.codec import decode_into, shape_of
from vlscale.data.index import HASH, RESTORE, Column, ShardFile
from vlscale.errors import VlscaleError

MAX_CODED_ELEMENTS = 1 << 28
"""Most elements of a coded array that are decoded for people; batches know their sizes from elsewhere."""

TOO_MANY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of open() and mmap() that go away when other files are closed."""

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_CURES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max)",
    errno.ENOMEM: "raise the limits of memory and of maps (ulimit -v, sysctl vm.max_map_count), or lower data.workers",
    errno.EACCES: "give this user the right to read it",
    errno.EPERM: "give this user the right to read it",
    errno.EIO: "the disk or the mount fails: look into the system's log",
}


class DamagedShardError(VlscaleError):
    """The file is not there, or is not what index.json describes; another copy of it would help."""


class ShardAccessError(VlscaleError):
    """This process cannot open or map the file, whatever it holds; another copy of it would not help.

    Attributes:
        errno: the system's number of the error, 0 if unknown.
    """

    errno = 0

    @classmethod
    def of(cls, what: str, error: OSError) -> ShardAccessError:
        """``what`` cannot be done because of ``error``; the cure follows from its number."""
        number = error.errno or 0
        found = cls(f"{what} ({error.strerror or error}); {_CURES.get(number, RESTORE)}")
        found.errno = number
        return found


def cannot_open(path: Path, error: OSError) -> VlscaleError:
    """Return what to raise where a shard cannot be opened: damage if it is not there, otherwise a matter of access."""
    if error.errno in _MISSING:
        return DamagedShardError(f"{path}: cannot be opened ({error.strerror}); {RESTORE}")
    return ShardAccessError.of(f"{path}: cannot be opened", error)


class Shard:
    """One memory-mapped shard whose offsets have been checked.

    Args:
        folder: the store's folder.
        file: what index.json says about the shard.
        columns: the columns of a row, in order.
        verify: compare the file's hash with index.json.

    Raises:
        DamagedShardError: the file is missing; or its size, hash, number of rows or offsets are wrong.
        ShardAccessError: it cannot be opened or mapped by this process.
        VlscaleError: its hash is to be checked, but index.json records none.
    """

    def __init__(self, folder: Path, file: ShardFile, columns: Sequence[Column], verify: bool) -> None:
        self.path = folder / file.basename
        self.columns = tuple(columns)
        self.bytes = self._map(file)
        if verify:
            self._verify(file)
        self.offsets = self._read_offsets(file.samples)
        self._varying = [place for place, column in enumerate(self.columns) if column.size is None]
        self._places = {column.name: place for place, column in enumerate(self.columns)}

    def _map(self, file: ShardFile) -> NDArray[np.uint8]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise cannot_open(self.path, error) from None
        try:
            size = os.fstat(descriptor).st_size
            if size != file.bytes:
                raise DamagedShardError(f"{self.path}: {size} bytes, expected {file.bytes} by index.json; {RESTORE}")
            self._mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            return np.frombuffer(self._mapped, np.uint8)
        except OSError as error:
            raise ShardAccessError.of(f"{self.path}: cannot be memory-mapped", error) from None
        except ValueError as error:
            raise VlscaleError(f"{self.path}: cannot be memory-mapped ({error}); {RESTORE}") from None
        finally:
            os.close(descriptor)

    def whole(self) -> bool:
        """Has the mapped file still its size? One system call; see the module's text for what it cannot see."""
        try:
            return self._mapped.size() == len(self.bytes)
        except OSError:  # the network mount that it was on has dropped it
            return False

    def _verify(self, file: ShardFile) -> None:
        if file.xxh64 is None:
            raise VlscaleError(
                f"{self.path}: index.json records no {HASH} for it; write the store with hashes, or set "
                f"data.verify: false"
            )
        found = xxhash.xxh64_hexdigest(self.bytes.data)
        if found != file.xxh64:
            raise DamagedShardError(
                f"{self.path}: damaged: its {HASH} is {found}, expected {file.xxh64} by index.json; {RESTORE}"
            )

    def _read_offsets(self, samples: int) -> NDArray[np.int64]:
        found = int(self.bytes[:4].view("<u4")[0])
        if found != samples:
            raise DamagedShardError(f"{self.path}: holds {found} rows, expected {samples} by index.json; {RESTORE}")
        header = 4 * (samples + 2)
        offsets = self.bytes[4:header].view("<u4").astype(np.int64)
        if offsets[0] < header or offsets[-1] != len(self.bytes) or np.any(offsets[1:] <= offsets[:-1]):
            raise DamagedShardError(f"{self.path}: the row offsets do not rise inside the file; {RESTORE}")
        return offsets

    def spans(self, rows: NDArray[np.int64], names: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Byte ranges of some columns.

        Args:
            rows: int64 [B], rows within the shard.
            names: columns.

        Returns:
            For each name ``(start, size)``, int64 [B] each, in bytes from the start of the file.

        Raises:
            VlscaleError: the columns of a row do not fill the row.
        """
        begin, end = self.offsets[rows], self.offsets[rows + 1]
        head = 4 * len(self._varying)
        self._require(end - begin >= head, rows, "is shorter than the sizes of its columns")
        sizes = np.empty((len(rows), len(self.columns)), np.int64)
        for place, column in enumerate(self.columns):
            if column.size is not None:
                sizes[:, place] = column.size
        if head:
            sizes[:, self._varying] = self.bytes[begin[:, None] + np.arange(head)].view("<u4")
        stops = (begin + head)[:, None] + np.cumsum(sizes, axis=1)
        self._require(stops[:, -1] == end, rows, "has columns that do not fill it")
        places = [self._places[name] for name in names]
        return [(stops[:, place] - sizes[:, place], sizes[:, place]) for place in places]

    def arrays(self, rows: NDArray[np.int64], names: Sequence[str], ndims: Sequence[int]) -> list[list[NDArray[Any]]]:
        """Views of array columns, unaligned and read-only.

        Args:
            rows: int64 [B], rows within the shard.
            names: array columns.
            ndims: the number of dimensions each must have.

        Returns:
            One list per name, of B arrays in the order of ``rows``.

        Raises:
            VlscaleError: a row's bytes are not such an array.
        """
        found: list[list[NDArray[Any]]] = []
        for name, (start, dimensions) in zip(names, self.shapes(rows, names, ndims), strict=True):
            dtype = self.columns[self._places[name]].dtype
            shapes = zip(*dimensions.T.tolist(), strict=True) if dimensions.size else []
            found.append([np.ndarray(s, dtype, self.bytes, at) for s, at in zip(shapes, start.tolist(), strict=True)])
        return found

    def shapes(
        self, rows: NDArray[np.int64], names: Sequence[str], ndims: Sequence[int]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Where the values of array columns lie, and their shapes: what a batch needs to copy them in one go.

        Args:
            rows: int64 [B], rows within the shard.
            names: array columns.
            ndims: the number of dimensions each must have.

        Returns:
            For each name ``(start, dimensions)``: int64 [B], the byte of the first value from the start of the file,
            and int64 [B, ndim]. The values follow each other without gaps, and all lie inside the file.

        Raises:
            VlscaleError: a row's bytes are not such an array.
        """
        found = []
        for name, ndim, (start, size) in zip(names, ndims, self.spans(rows, names), strict=True):
            column = self.columns[self._places[name]]
            assert column.dtype is not None, name
            if column.shape is not None:
                found.append((start, np.tile(np.array(column.shape, np.int64), (len(rows), 1))))
            else:
                found.append(self._dimensions(rows, column, start, size, ndim))
        return found

    def elements(self, starts: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Gather one value of ``dtype`` from each byte position, aligned or not.

        Args:
            starts: int64 [K], each at least ``dtype.itemsize`` bytes before the end of the file.
            dtype: of any size, also a void type for several values together.

        Returns:
            A copy, [K].
        """
        # A view in which an element begins at every byte; only the elements asked for are ever read.
        window: NDArray[Any] = np.ndarray((len(self.bytes) - dtype.itemsize + 1,), dtype, self.bytes, 0, (1,))
        return window[starts]

    def _dimensions(
        self, rows: NDArray[np.int64], column: Column, start: NDArray[np.int64], size: NDArray[np.int64], ndim: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Start of the values, int64 [B], and dimensions, int64 [B, ndim], of a ragged column."""
        assert column.dtype is not None
        problem = f"column {column.name!r} is not an array of {ndim} dimensions"
        self._require(size > 1 + ndim, rows, problem)
        first = self.bytes[start]
        self._require(first >> 2 == ndim, rows, problem)
        widths = np.left_shift(1, first & 3).astype(np.int64)
        values = start + 1 + ndim * widths
        payload = start + size - values
        self._require(payload > 0, rows, problem)
        dimensions = np.empty((len(rows), ndim), np.int64)
        for width in np.unique(widths).tolist():
            where = np.flatnonzero(widths == width)
            raw = self.bytes[start[where, None] + np.arange(1, 1 + ndim * width)].view(f"<u{width}")
            dimensions[where] = raw.astype(np.int64)  # 2**63 and more become negative, and are refused below
        # By division, because a product of dimensions could overflow to the right number.
        rest, fits = payload // column.dtype.itemsize, payload % column.dtype.itemsize == 0
        for place in range(ndim):
            dimension = np.maximum(dimensions[:, place], 1)
            fits &= (dimensions[:, place] >= 1) & (rest % dimension == 0)
            rest = rest // dimension
        self._require(fits & (rest == 1), rows, f"column {column.name!r} has a shape that does not fit its bytes")
        return values, dimensions

    @cached_property
    def table(self) -> NDArray[Any]:
        """View [n, width] of all rows of a shard whose only column is an array of fixed size.

        Raises:
            VlscaleError: a row has another size.
        """
        (column,) = self.columns
        assert column.dtype is not None
        assert column.shape is not None
        rows = len(self.offsets) - 1
        self._require(np.diff(self.offsets) == column.size, np.arange(rows), f"is not of {column.size} bytes")
        return np.ndarray((rows, *column.shape), column.dtype, self.bytes, int(self.offsets[0]))

    def row(self, row: int) -> dict[str, Any]:
        """Decode all columns of one row (arrays are copied).

        Raises:
            VlscaleError: a column's bytes are not what its encoding says.
        """
        index = np.array([row])
        spans = self.spans(index, [column.name for column in self.columns])
        return {
            column.name: self._decode(index, column, start, size)
            for column, (start, size) in zip(self.columns, spans, strict=True)
        }

    def _decode(self, row: NDArray[np.int64], column: Column, start: NDArray[np.int64], size: NDArray[np.int64]) -> Any:
        raw = self.bytes[int(start[0]) : int(start[0] + size[0])].tobytes()
        try:
            if column.kind == "str":
                return raw.decode("utf-8")
            if column.kind == "json":
                return json.loads(raw)
        except (ValueError, RecursionError) as error:
            self._fail(row[0], f"column {column.name!r} is not valid {column.kind} ({error})")
        if column.kind == "int":
            return int(np.frombuffer(raw, "<i8")[0])
        if column.kind == "coded":
            return self._decode_features(row, column, raw)
        ndim = raw[0] >> 2 if column.shape is None and raw else 1
        self._require(np.array([1 <= ndim <= 8]), row, f"column {column.name!r} has no sensible shape")
        return self.arrays(row, [column.name], [ndim])[0][0].copy()

    def _decode_features(self, row: NDArray[np.int64], column: Column, raw: bytes) -> NDArray[Any]:
        assert column.dtype is not None
        blob = np.frombuffer(raw, np.uint8)
        try:
            rows, width = shape_of(blob)
            if rows * width > MAX_CODED_ELEMENTS:
                raise ValueError(f"claims {rows} x {width} elements")
            found: NDArray[Any] = np.empty((rows, width), column.dtype)
            decode_into(column.encoding.split(":")[1], blob, found)
        except ValueError as error:
            self._fail(row[0], f"column {column.name!r} cannot be decoded ({error})")
        return found

    def _require(self, holds: NDArray[np.bool_], rows: NDArray[np.int64], problem: str) -> None:
        if not holds.all():
            self._fail(rows[int(np.argmin(holds))], problem)

    def _fail(self, row: Any, problem: str) -> None:
        raise VlscaleError(f"{self.path}: row {int(row)} of the shard {problem}; {RESTORE}")
