"""Files of long lines, read in byte ranges: each line belongs to the part in which it begins.

A line may have megabytes (base64 of an image's features), so nothing holds more than one. Files that end in ``.gz`` are
one part each, because gzip cannot be entered in the middle.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import MAX_LINE
from data_tools.records import BadRow
from vlscale.errors import VlscaleError

PART_BYTES = 512 << 20
"""Size of a part: some thousand images of 36 regions in base64."""
GZIP_RATIO = 256
"""A file that unpacks to more than this many times its size is a bomb: base64 of numbers reaches 2 to 10."""
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        where: file and row, or file and byte at which the row begins (in a part that does not know how many rows are
            before it); for errors.
        begin: that byte.
        data: the line with its line feed, if it has one.
        row: its number, from 1, where the part knows it.
    """

    where: str
    begin: int
    data: bytes
    row: int | None = None


def line_parts(paths: Sequence[Path], part_bytes: int = PART_BYTES) -> list[dict[str, Any]]:
    """Cut files into byte ranges for :func:`read_lines`.

    Raises:
        VlscaleError: a file is missing or empty.
    """
    parts: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        size = file_size(path)
        if path.suffix == ".gz":
            parts.append({"file": number, "begin": 0, "end": None})
            continue
        starts = range(0, size, part_bytes)
        parts += [{"file": number, "begin": start, "end": min(start + part_bytes, size)} for start in starts]
    return parts


def file_size(path: Path) -> int:
    """Return the bytes of a file that must hold something.

    Raises:
        VlscaleError: it is missing, not a file, or empty.
    """
    try:
        size = path.stat().st_size if path.is_file() else -1
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror})") from None
    if size < 0:
        raise VlscaleError(f"{path}: is not a file; name the files of the source one by one")
    if not size:
        raise VlscaleError(f"{path}: is empty, expected rows; download it again")
    return size


def read_lines(paths: Sequence[Path], part: Mapping[str, Any], max_line: int = MAX_LINE) -> Iterator[Line | BadRow]:
    """Yield the lines that begin in a part.

    Args:
        paths: the files that ``part["file"]`` counts.
        part: ``file``, ``begin``, ``end`` (None: the file's end) and perhaps ``row``, the number of the row (from 1)
            that begins exactly at ``begin``; or ``rows``, pairs of the byte at which a wanted row
            begins and its number (or None).
        max_line: bytes; longer lines are bad rows, and are skipped without being held.

    Raises:
        VlscaleError: the file cannot be read, or its compression is damaged or a bomb.
    """
    path = paths[part["file"]]
    try:
        with open_bytes(path) as stream:
            if "rows" in part:
                yield from _chosen(stream, path, part["rows"], max_line)
            else:
                yield from _range(stream, path, part, max_line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VlscaleError(f"{path}: its compression is damaged ({error}); download it again") from None
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error})") from None


def _range(stream: BinaryIO, path: Path, part: Mapping[str, Any], max_line: int) -> Iterator[Line | BadRow]:
    begin, end = part["begin"], part["end"]
    row = part.get("row", 1 if begin == 0 else None)
    position = begin
    if begin and row is None:  # the line in which the range begins is the range before's
        stream.seek(begin - 1)
        position = begin - 1 + _skip_line(stream)
    elif begin:
        stream.seek(begin)
    limit = GZIP_RATIO * path.stat().st_size + max_line if path.suffix == ".gz" else None
    while end is None or position < end:
        line = stream.readline(max_line + 1)
        if not line:
            return
        where = _where(path, position, row)
        length = len(line)
        if length > max_line:
            length += 0 if line.endswith(b"\n") else _skip_line(stream)
            yield _too_long(where, max_line)
        elif line not in (b"\n", b"\r\n"):
            yield Line(where, position, line, row)
        position += length
        row = None if row is None else row + 1
        if limit is not None and position > limit:
            raise VlscaleError(f"{path}: unpacks to more than {GZIP_RATIO} times its size; it is no feature file")


def _chosen(stream: BinaryIO, path: Path, rows: Sequence[Sequence[Any]], max_line: int) -> Iterator[Line | BadRow]:
    for begin, row in rows:
        stream.seek(begin)
        line = stream.readline(max_line + 1)
        where = _where(path, begin, row)
        yield Line(where, begin, line, row) if len(line) <= max_line else _too_long(where, max_line)


def _where(path: Path, begin: int, row: int | None) -> str:
    return f"{path}: row at byte {begin}" if row is None else f"{path}: row {row}"


def _too_long(where: str, max_line: int) -> BadRow:
    return BadRow(where, "", f"is longer than {max_line} bytes")


def _skip_line(stream: BinaryIO) -> int:
    """Read to behind the next line feed and return the number of bytes."""
    skipped = 0
    while piece := stream.readline(_BUFFER):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def read_line_index(path: Path) -> NDArray[np.int64]:
    """Read a ``.lineidx`` file: the byte at which each row begins, ascending from 0.

    Raises:
        VlscaleError: it is missing or is something else.
    """
    file_size(path)
    try:
        starts = np.array(path.read_bytes().split(), dtype=np.int64)
    except (ValueError, OverflowError, OSError) as error:
        raise VlscaleError(f"{path}: is not a list of byte positions ({error})") from None
    if starts[:1].tolist() != [0] or (np.diff(starts) <= 0).any():
        raise VlscaleError(f"{path}: its byte positions do not ascend from 0; make it again")
    return starts


def indexed_parts(paths: Sequence[Path], part_bytes: int = PART_BYTES) -> list[dict[str, Any]]:
    """Cut files like :func:`line_parts`; where a ``.lineidx`` lies beside a file, at rows whose numbers are known.

    Raises:
        VlscaleError: a file is missing or empty, or its index does not fit it.
    """
    parts: list[dict[str, Any]] = []
    for part in line_parts(paths, part_bytes):
        index = paths[part["file"]].with_suffix(".lineidx")
        if not index.exists() or part["end"] is None:
            parts.append(part)
        elif part["begin"] == 0:
            parts += _parts_at_rows(paths[part["file"]], read_line_index(index), part_bytes, part["file"])
    return parts


def _parts_at_rows(path: Path, starts: NDArray[np.int64], part_bytes: int, file: int) -> list[dict[str, Any]]:
    size = file_size(path)
    if starts[-1] >= size:
        raise VlscaleError(f"{path}: has {size} bytes, but its .lineidx has a row at byte {starts[-1]}; is it cut off?")
    firsts = np.unique(np.searchsorted(starts, np.arange(0, int(starts[-1]) + 1, part_bytes)))
    bounds = [*starts[firsts].tolist(), size]
    with open_bytes(path) as stream:
        for begin in bounds[1:-1]:
            stream.seek(begin - 1)
            if stream.read(1) != b"\n":
                raise VlscaleError(f"{path}: no row begins at byte {begin}, as its .lineidx says; make it again")
    return [
        {"file": file, "begin": begin, "end": end, "row": int(first) + 1}
        for first, begin, end in zip(firsts, bounds[:-1], bounds[1:], strict=True)
    ]


def open_bytes(path: Path) -> BinaryIO:
    """Open a plain or gzip-compressed file for reading."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb", buffering=_BUFFER)
