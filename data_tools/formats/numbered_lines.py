"""Text files whose rows have numbers that matter, and files that map one name to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.formats.arrays import FieldError, sentence, word
from data_tools.formats.lines import file_size, read_lines
from data_tools.records import BadRow
from vlscale.errors import VlscaleError

ROWS_PER_PART = 1 << 18
MAX_ROW = 1 << 20
_BUFFER = 4 << 20


def row_starts(path: Path, every: int = ROWS_PER_PART) -> tuple[list[int], int]:
    """Return the bytes at which the rows 0, ``every``, 2 * ``every``, ... begin, and the number of rows.

    The file is read once, for its line feeds.

    Raises:
        VlscaleError: it is missing, empty or compressed.
    """
    size = file_size(path)
    if path.suffix == ".gz":
        raise VlscaleError(f"{path}: its rows have to be counted; unpack it first (gunzip)")
    starts, rows, position, last = [0], 0, 0, b"\n"
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_BUFFER):
                ends = np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n"))
                numbers = rows + 1 + np.arange(len(ends))  # of the row that begins behind each line feed
                starts += (position + 1 + ends[numbers % every == 0]).tolist()
                rows += len(ends)
                position += len(piece)
                last = piece[-1:]
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror})") from None
    rows += last != b"\n"
    return [start for start in starts if start < size], rows


def numbered_parts(paths: Sequence[Path], every: int = ROWS_PER_PART) -> list[dict[str, Any]]:
    """Cut files into parts of ``every`` rows for :func:`data_tools.formats.lines.read_lines`, which then numbers all.

    Raises:
        VlscaleError: a file is missing, empty or compressed.
    """
    parts: list[dict[str, Any]] = []
    for number, path in enumerate(paths):
        starts, _ = row_starts(path, every)
        bounds = [*starts, file_size(path)]
        for place, (begin, end) in enumerate(pairwise(bounds)):
            parts.append({"file": number, "begin": begin, "end": end, "row": 1 + place * every})
    return parts


def tab_fields(data: bytes, names: Sequence[str]) -> list[bytes]:
    """Split a row at its tabs into as many fields as there are names.

    Raises:
        FieldError: there are more or fewer.
    """
    fields = data.rstrip(b"\r\n").split(b"\t")
    if len(fields) != len(names):
        raise FieldError("", f"has {len(fields)} fields, expected {len(names)} ({', '.join(names)})")
    return fields


class NameMap:
    """A file of rows ``name <tab> image id``, looked up by name: 16 bytes of memory a row.

    Raises:
        VlscaleError: a row is not of this form, or a name stands twice with different images.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        hashes, begins = [], []
        for _, begin, name, _ in self._rows():
            hashes.append(xxhash.xxh3_64_intdigest(name))
            begins.append(begin)
        found = np.array(hashes, np.uint64)
        order = np.argsort(found, kind="stable")
        self._hashes, self._begins = found[order], np.array(begins, np.int64)[order]
        self._file = path.open("rb")
        self._refuse_repeated()

    def get(self, name: str) -> str | None:
        """The image id of a name; None if it is not there."""
        wanted = name.encode("utf-8", "surrogatepass")
        place = int(np.searchsorted(self._hashes, np.uint64(xxhash.xxh3_64_intdigest(wanted))))
        while place < len(self._hashes) and self._hashes[place] == xxhash.xxh3_64_intdigest(wanted):
            found, image = self._at(int(self._begins[place]))
            if found == wanted:
                return image
            place += 1
        return None

    def _rows(self) -> Iterator[tuple[str, int, bytes, str]]:
        part = {"file": 0, "begin": 0, "end": None}
        for line in read_lines([self.path], part, MAX_ROW):
            if isinstance(line, BadRow):
                raise VlscaleError(str(line))
            try:
                name, image = tab_fields(line.data, ("name", "image id"))
                yield line.where, line.begin, sentence("name", name).strip().encode(), word("image id", image)
            except FieldError as error:
                raise VlscaleError(str(error.at(line.where))) from None

    def _at(self, begin: int) -> tuple[bytes, str]:
        self._file.seek(begin)
        name, image = tab_fields(self._file.readline(MAX_ROW), ("name", "image id"))
        return name.strip(), word("image id", image)

    def _refuse_repeated(self) -> None:
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            one, other = self._at(int(self._begins[place])), self._at(int(self._begins[place + 1]))
            if one[0] == other[0] and one[1] != other[1]:
                raise VlscaleError(f"{self.path}: {one[0].decode()!r} stands there for {one[1]!r} and {other[1]!r}")
