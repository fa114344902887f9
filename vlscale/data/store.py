"""Readers of a dataset's three stores, over memory maps: packed arrays for batches, whole rows for people.

Sizes are known from the side files before a row is read, so a caller may hand in the memory that rows are to lie in:
features are copied, or decoded, from the map straight to their place in a batch, in the stored dtype.

What comes out has been checked: ids inside the vocabulary, boxes inside 0..1, features finite and of the recorded
width. Readers can be pickled; each process opens files for itself.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.image_store import ImageStore
from vlscale.data.index import REBUILD, read_array, read_meta
from vlscale.data.lengths import rises
from vlscale.data.reader import FilesOf
from vlscale.data.schema import ClassesMeta, TextsMeta, class_columns, text_columns
from vlscale.data.store_base import Store, check_lengths, lengths_of, owner, within
from vlscale.errors import VlscaleError

__all__ = ["ClassStore", "ImageStore", "TextStore"]

_MOST_PROBABLE = 1.001


class TextStore(Store):
    """Reader of ``ROOT/texts``.

    Raises:
        VlscaleError: a file is missing or damaged, or files do not fit together.
    """

    meta: TextsMeta
    _cached = ("lengths", "image_refs", "image_ptr")

    def __init__(self, folder: Path, verify: bool = True, files: FilesOf | None = None) -> None:
        self.meta = read_meta(TextsMeta, folder / "meta.json")
        super().__init__(folder, text_columns(self.meta), verify, files)
        check_lengths(self.folder, self.lengths, "text", "tokens")
        ptr = self.image_ptr
        if ptr[-1] != len(self.image_refs) or not rises(ptr):
            raise VlscaleError(
                f"{folder / 'image_ptr.npy'}: does not rise from 0 to the {len(self.image_refs)} entries of "
                f"image_refs.npy; {REBUILD}"
            )

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], tokens of each text without [CLS] and [SEP]."""
        return read_array(self.folder / "lengths.npy", "int32", len(self))

    @cached_property
    def image_refs(self) -> NDArray[np.int64]:
        """int64, rows of the images store that the texts refer to, one text after the other."""
        return read_array(self.folder / "image_refs.npy", "int64")

    @cached_property
    def image_ptr(self) -> NDArray[np.int64]:
        """int64 [N+1]; text i refers to ``image_refs[image_ptr[i]:image_ptr[i+1]]``."""
        return read_array(self.folder / "image_ptr.npy", "int64", len(self) + 1)

    @property
    def shard_ends(self) -> NDArray[np.int64]:
        """int64 [S+1], cumulative number of texts per shard, from 0."""
        return self._reader.ends

    @property
    def tokenizer_path(self) -> Path | None:
        """Where the tokenizer lies that made the texts' ids, if it was kept."""
        path = self.folder / "tokenizer.json"
        return path if path.is_file() else None

    def input_ids(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Word pieces of int64 [B] ``rows``, packed.

        Returns:
            ``(ids, lengths)``: int64 [sum of lengths] and int32 [B]; no [CLS], no [SEP].

        Raises:
            VlscaleError: a row's length differs from lengths.npy, or an id is outside the vocabulary.
        """
        rows = np.asarray(rows, np.int64)
        lengths = self.lengths_of(rows)
        packed = np.empty(int(lengths.sum(dtype=np.int64)), np.int64)
        self.write_ids(rows, packed, np.cumsum(lengths, dtype=np.int64) - lengths)
        return packed, lengths

    def lengths_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """Number of word pieces, int32 [B], of int64 [B] ``rows``; no shard is read.

        Raises:
            IndexError: there is no such row.
        """
        return lengths_of(self.folder, self.lengths, rows)

    @property
    def num_types(self) -> int:
        """Kinds of segments; 1: texts have none."""
        return self.meta.num_types

    def write_ids(
        self,
        rows: NDArray[np.int64],
        out: NDArray[np.int64],
        places: NDArray[np.int64],
        types: NDArray[np.int64] | None = None,
    ) -> None:
        """Write the word pieces of each of int64 [B] ``rows`` into int64 ``out``, from int64 [B] ``places`` on.

        Args:
            rows: rows of this store.
            out: int64 [Nt].
            places: first place of each row in ``out``.
            types: int64 [Nt], where the types of the word pieces go; only of texts that have segments.

        Raises:
            VlscaleError: see :meth:`input_ids`; or types that do not fit the word pieces or meta.json.
        """
        names = ["input_ids"] if types is None else ["input_ids", "type_ids"]
        for shard, at, local in self._reader.by_shard(rows):
            (starts, shapes), *typed = shard.shapes(local, names, [1] * len(names))
            found, expected = shapes[:, 0], np.asarray(self.lengths[rows[at]], np.int64)
            if not np.array_equal(found, expected):
                bad = int(np.argmax(found != expected))
                self.fail(int(rows[at[bad]]), f"{found[bad]} tokens, but lengths.npy says {expected[bad]}")
            inside = within(found)
            ids = shard.elements(np.repeat(starts, found) + 4 * inside, np.dtype("<i4"))
            self._check_ids(rows[at], found, ids)
            out[np.repeat(places[at], found) + inside] = ids
            self.bytes_read += ids.nbytes
            for type_starts, type_shapes in typed:
                assert types is not None
                self._check_shapes(rows[at], type_shapes[:, 0], found)
                each = shard.elements(np.repeat(type_starts, found) + 4 * inside, np.dtype("<i4"))
                self._check_types(rows[at], found, each)
                types[np.repeat(places[at], found) + inside] = each
                self.bytes_read += each.nbytes

    def _check_ids(self, rows: NDArray[np.int64], lengths: NDArray[np.int64], ids: NDArray[np.int32]) -> None:
        size = self.meta.vocabulary.size
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            bad = int(np.argmax((ids < 0) | (ids >= size)))
            self.fail(owner(rows, lengths, bad), f"token id {ids[bad]} is outside the vocabulary of {size}")

    def _check_shapes(self, rows: NDArray[np.int64], found: NDArray[np.int64], expected: NDArray[np.int64]) -> None:
        if not np.array_equal(found, expected):
            bad = int(np.argmax(found != expected))
            self.fail(int(rows[bad]), f"{found[bad]} type_ids for {expected[bad]} tokens")

    def _check_types(self, rows: NDArray[np.int64], lengths: NDArray[np.int64], types: NDArray[np.int32]) -> None:
        if len(types) and (types.min() < 0 or types.max() >= self.num_types):
            bad = int(np.argmax((types < 0) | (types >= self.num_types)))
            row = owner(rows, lengths, bad)
            self.fail(row, f"type id {types[bad]} is outside 0..{self.num_types - 1} of meta.json")


class ClassStore(Store):
    """Reader of ``ROOT/classes``: soft labels of regions.

    Raises:
        VlscaleError: a file is missing or damaged, or files do not fit together.
    """

    meta: ClassesMeta

    def __init__(self, folder: Path, verify: bool = True, files: FilesOf | None = None) -> None:
        self.meta = read_meta(ClassesMeta, folder / "meta.json")
        super().__init__(folder, class_columns(self.meta), verify, files)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the stored probabilities."""
        return np.dtype(self.meta.dtype)

    def probs(self, region_rows: NDArray[np.int64]) -> NDArray[Any]:
        """Class probabilities, [K, C] in the stored dtype, of int64 [K] ``region_rows`` (see :class:`ImageStore`).

        Raises:
            VlscaleError: a row holds NaN, infinity, a negative number or one above 1.
        """
        rows = np.asarray(region_rows, np.int64)
        found = np.empty((len(rows), self.meta.num_classes), self.meta.dtype)
        self.write_probs(rows, found)
        return found

    def write_probs(self, region_rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Write class probabilities of int64 [K] ``region_rows`` into ``out`` [K, C] of the stored dtype.

        Raises:
            VlscaleError: see :meth:`probs`.
        """
        for shard, places, local in self._reader.by_shard(region_rows):
            out[places] = shard.table[local]
        self.bytes_read += out.nbytes
        bits = np.dtype(f"u{out.itemsize}")
        most = np.array(_MOST_PROBABLE, out.dtype).view(bits)
        # Of numbers that are not negative, the bits rise with the value; negative ones and NaN lie above.
        if out.size and out.view(bits).max() > most:
            # NaN fails both comparisons; -0.0 passes.
            bad = ~((out >= 0) & (out <= _MOST_PROBABLE)).all(1)
            if bad.any():
                self.fail(int(region_rows[int(np.argmax(bad))]), "probabilities are NaN or outside 0..1")
