"""Image id -> row of an images store, as memory-mapped arrays that all processes share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlscale.data.index import StoreIndex, read_index, read_meta
from vlscale.data.schema import ImagesMeta, image_columns
from vlscale.data.shard import Shard
from vlscale.errors import VlscaleError


class ImageRows(Mapping[str, int]):
    """Image id -> row.

    Ids are looked up by hash and compared in full. 20 bytes and the id per image, of which only what is touched is in
    memory.

    Args:
        folder: as :func:`index_images` wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: NDArray[np.uint64] = np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False)
        self._rows: NDArray[np.int64] = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
        self._ends: NDArray[np.int64] = np.load(folder / "ends.npy", mmap_mode="r", allow_pickle=False)
        self._ids: NDArray[np.uint8] = np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False)
        self._last: tuple[str, int] | None = None  # texts of one image come one after the other

    def __reduce__(self) -> tuple[type[ImageRows], tuple[Path]]:
        return ImageRows, (self.folder,)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return (self.id(row) for row in range(len(self)))

    def __getitem__(self, name: str) -> int:
        if self._last is None or self._last[0] != name:
            self._last = name, self._find(name)
        return self._last[1]

    def _find(self, name: str) -> int:
        try:
            data = name.encode("utf-8")
        except UnicodeEncodeError:
            raise KeyError(name) from None
        wanted = np.uint64(xxhash.xxh3_64_intdigest(data))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._rows[place])
            if self._bytes(row) == data:
                return row
            place += 1
        raise KeyError(name)

    def id(self, row: int) -> str:
        """The id of a row."""
        return self._bytes(row).decode("utf-8")

    def _bytes(self, row: int) -> bytes:
        return self._ids[int(self._ends[row]) : int(self._ends[row + 1])].tobytes()


def index_images(images: Path, target: Path) -> ImageRows:
    """Read the ids of an images store into ``target``, unless it is there, and open it.

    Raises:
        VlscaleError: the store is missing or damaged, or two images have one id.
    """
    if not target.exists():
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(images, temporary)
        try:
            os.rename(temporary, target)
        except OSError:  # another process was faster
            shutil.rmtree(temporary)
    return ImageRows(target)


def _write(images: Path, folder: Path) -> None:
    index = read_index(images, image_columns(read_meta(ImagesMeta, images / "meta.json")))
    total = int(index.ends[-1])
    if not total:
        raise VlscaleError(f"{images}: holds no images; build it again")
    ids, sizes = bytearray(), np.empty(total, np.int64)
    hashes = np.empty(total, np.uint64)
    for row, data in enumerate(_ids(index)):
        ids += data
        sizes[row] = len(data)
        hashes[row] = xxhash.xxh3_64_intdigest(data)
    order = np.argsort(hashes, kind="stable")
    for name, array in (
        ("hashes", hashes[order]),
        ("rows", order),
        ("ends", np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])),
        ("ids", np.frombuffer(bytes(ids), np.uint8)),
    ):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def _ids(index: StoreIndex) -> Iterator[bytes]:
    """The id column, shard by shard; features are not touched."""
    for file in index.shards:
        shard = Shard(index.folder, file, index.columns, verify=False)
        ((starts, sizes),) = shard.spans(np.arange(file.samples, dtype=np.int64), ["id"])
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            name = shard.bytes[start : start + size].tobytes()
            try:
                name.decode("utf-8")
            except UnicodeDecodeError:
                raise VlscaleError(f"{shard.path}: an image's id is not UTF-8; build the store again") from None
            yield name
