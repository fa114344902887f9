"""Rows by the hash of something they have: which rows of a collection are a pair's own, and so are never retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.rewriting.replacing import normalised
from vlscale.data.index import read_array


def hash_of(name: str) -> int:
    """Of an image's id or a detected class."""
    return xxhash.xxh3_64_intdigest(name)


def hash_of_text(text: str) -> int:
    """Equal for texts that differ in case, blanks and final marks alone."""
    return xxhash.xxh3_64_intdigest(normalised(text))


def write_rows(folder: Path, name: str, hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> None:
    """Write ``NAME_hashes.npy`` uint64 [n], sorted, and ``NAME_rows.npy`` int32 [n] for :class:`HashRows`."""
    order = np.lexsort((rows, hashes))
    np.save(folder / f"{name}_hashes.npy", hashes[order], allow_pickle=False)
    np.save(folder / f"{name}_rows.npy", rows[order].astype(np.int32), allow_pickle=False)


class HashRows:
    """Rows by hash, memory-mapped.

    Args:
        folder: where :func:`write_rows` wrote.
        name: of the files.

    Raises:
        VlscaleError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._hashes = np.asarray(read_array(folder / f"{name}_hashes.npy", "uint64"))
        self._rows = np.asarray(read_array(folder / f"{name}_rows.npy", "int32", len(self._hashes)))

    def of(self, hashes: Sequence[int]) -> NDArray[np.int32]:
        """All rows that have one of these, int32, sorted."""
        wanted = np.asarray(hashes, np.uint64)
        begins, ends = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        parts = [self._rows[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int32)
