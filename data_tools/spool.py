"""Tokenized texts on their way to a store: length-prefixed msgpack in a file, and arrays that say where each begins.

The texts of all parts are later written in the order of their images. Only the arrays are held in memory for that; the
texts are read by position.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import numpy as np
import xxhash
from numpy.typing import NDArray
from typing_extensions import Self

from vlscale.errors import VlscaleError

NO_IMAGE = np.iinfo(np.int64).max
"""First image of a text that refers to none: sorts last."""
MAX_RECORD = 64 << 20


@dataclass(frozen=True, eq=False)
class SpooledText:
    """One text: as :class:`data_tools.records.TextRecord`, with its word pieces and their types int32 [t]."""

    where: str
    id: str
    text: str
    images: tuple[str, ...]
    input_ids: NDArray[np.int32]
    extra: Mapping[str, Any]
    type_ids: NDArray[np.int32] | None = None


class SpoolWriter:
    """Writes ``texts.spool`` and, at the end, ``starts.npy``, ``first.npy`` and ``ids.npy`` into a folder.

    ``starts`` int64 [n], where each record begins; ``first`` int64 [n], row of the text's first image; ``ids`` uint64
    [n], hashes of the texts' ids.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = (folder / "texts.spool").open("wb")
        self._position = 0
        self._starts: list[int] = []
        self._first: list[int] = []
        self._ids: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            np.save(self.folder / "starts.npy", np.asarray(self._starts, np.int64), allow_pickle=False)
            np.save(self.folder / "first.npy", np.asarray(self._first, np.int64), allow_pickle=False)
            np.save(self.folder / "ids.npy", np.asarray(self._ids, np.uint64), allow_pickle=False)

    def write(self, text: SpooledText, first: int) -> None:
        """Append a text whose first image is row ``first``, or :data:`NO_IMAGE`."""
        ids = text.input_ids.astype("<i4").tobytes()
        extra = json.dumps(dict(text.extra), allow_nan=False)
        types = None if text.type_ids is None else text.type_ids.astype("<i4").tobytes()
        blob: bytes = msgpack.packb([text.where, text.id, text.text, list(text.images), ids, extra, types])
        self._file.write(len(blob).to_bytes(4, "little") + blob)
        self._starts.append(self._position)
        self._first.append(first)
        self._ids.append(xxhash.xxh3_64_intdigest(text.id))
        self._position += 4 + len(blob)


class SpoolReader:
    """Reads texts of a part by position."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "texts.spool"
        self._file = self.path.open("rb")
        size = self.path.stat().st_size
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ) if size else b""

    def close(self) -> None:
        """Close the file."""
        if isinstance(self._map, mmap.mmap):
            self._map.close()
        self._file.close()

    def read(self, start: int) -> SpooledText:
        """Return the text that begins at byte ``start``.

        Raises:
            VlscaleError: the file is damaged.
        """
        size = int.from_bytes(self._map[start : start + 4], "little")
        try:
            if not 0 < size <= MAX_RECORD:
                raise ValueError(f"a record of {size} bytes")
            fields = msgpack.unpackb(self._map[start + 4 : start + 4 + size])
            where, name, text, images, ids, extra, kinds = fields
            types = None if kinds is None else np.frombuffer(kinds, "<i4")
            return SpooledText(where, name, text, tuple(images), np.frombuffer(ids, "<i4"), json.loads(extra), types)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise VlscaleError(
                f"{self.path}: byte {start}: not a text ({error}); remove this part's folder and give the command again"
            ) from None


def rows_of(folder: Path, rows: Sequence[int]) -> list[tuple[str, str]]:
    """(id, where) of some texts of a part."""
    starts = np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False)
    reader = SpoolReader(folder)
    try:
        found = [reader.read(int(starts[row])) for row in rows]
    finally:
        reader.close()
    return [(text.id, text.where) for text in found]
