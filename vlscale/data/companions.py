"""Readers of what may stand beside the texts of a dataset, with one row per text in the same order.

``units`` (what is masked together), ``rewrites`` (captions with a word or a phrase replaced) and ``retrieved`` (images
and texts of other rows that are like this one). The tools of ``data_tools`` write them; all of them are optional.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlscale.data.companion_base import (
    Companion,
    check_values,
    pieces_of,
    read_companion_meta,
    require_same_texts,
)
from vlscale.data.companion_schema import (
    RETRIEVED_COLUMNS,
    REWRITE_COLUMNS,
    SIDE_FILES,
    UNIT_COLUMNS,
    Collection,
    RetrievedMeta,
    Rewrite,
    RewritesMeta,
    UnitsMeta,
    view_problem,
)
from vlscale.data.index import read_array
from vlscale.data.offsets import Offsets
from vlscale.data.reader import FilesOf
from vlscale.data.store import TextStore
from vlscale.data.store_base import lengths_of, owner, within
from vlscale.errors import VlscaleError

__all__ = ["SIDE_FILES", "RetrievedStore", "RewriteStore", "UnitStore", "open_companion", "require_same_texts"]

Kind = Literal["images", "texts"]
_KINDS = 4


class UnitStore(Companion):
    """Reader of ``ROOT/units``: the word pieces of a text that are masked together.

    Raises:
        VlscaleError: a file is missing or damaged.
    """

    meta: UnitsMeta
    _cached = ("lengths",)

    def __init__(self, folder: Path, verify: bool = True, files: FilesOf | None = None) -> None:
        self.meta = read_companion_meta(UnitsMeta, folder)
        super().__init__(folder, UNIT_COLUMNS, verify, files)
        check_values(folder / "lengths.npy", self.lengths, 1)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], units of each text."""
        return read_array(self.folder / "lengths.npy", "int32", len(self))

    def packed(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Units of int64 [B] ``rows``, one text after the other.

        Returns:
            ``(units, counts)``: int32 [sum of counts, 3], each (first token, token behind the last, kind) counted in
            word pieces without [CLS], covering the text without gaps; and int32 [B].

        Raises:
            VlscaleError: units that leave a gap, overlap, or are of no known kind, or another number of them than
                lengths.npy says.
            IndexError: there is no such row.
        """
        rows = np.asarray(rows, np.int64)
        counts = lengths_of(self.folder, self.lengths, rows)
        firsts = np.cumsum(counts, dtype=np.int64) - counts
        found = np.empty((int(counts.sum(dtype=np.int64)), 3), np.int32)
        for shard, at, local in self._reader.by_shard(rows):
            ((starts, shapes),) = shard.shapes(local, ["units"], [2])
            expected = np.asarray(counts[at], np.int64)
            good = (shapes[:, 0] == expected) & (shapes[:, 1] == 3)
            if not good.all():
                bad = int(np.argmin(good))
                self.fail(int(rows[at[bad]]), f"units {shapes[bad].tolist()}, expected [{expected[bad]}, 3]")
            inside = within(expected)
            units = shard.elements(np.repeat(starts, expected) + 12 * inside, np.dtype("V12"))
            found[np.repeat(firsts[at], expected) + inside] = units.view("<i4").reshape(-1, 3)
            self.bytes_read += units.nbytes
        self._check(rows, counts, firsts, found)
        return found, counts

    def _check(
        self, rows: NDArray[np.int64], counts: NDArray[np.int32], firsts: NDArray[np.int64], units: NDArray[np.int32]
    ) -> None:
        begins = np.concatenate([np.zeros(1, np.int32), units[:-1, 1]])[: len(units)]
        begins[firsts] = 0
        good = (units[:, 0] == begins) & (units[:, 1] > units[:, 0]) & (units[:, 2] >= 0) & (units[:, 2] < _KINDS)
        if not good.all():
            bad = int(np.argmin(good))
            self.fail(owner(rows, counts, bad), f"unit {units[bad].tolist()} does not go on at {begins[bad]}")

    def units_of(self, rows: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        """Units of each of int64 [B] ``rows``: B arrays int32 [U, 3]; see :meth:`packed`."""
        units, counts = self.packed(rows)
        return np.split(units, np.cumsum(counts[:-1])) if len(counts) else []


class RewriteStore(Companion):
    """Reader of ``ROOT/rewrites``: rewritten captions, called views, numbered over all texts.

    Raises:
        VlscaleError: a file is missing or damaged, files do not fit together, or the layout is an older one.
    """

    meta: RewritesMeta
    _cached = ("lengths", "view_tokens", "view_positive")
    _derived = ("ptr",)

    def __init__(self, folder: Path, verify: bool = True, files: FilesOf | None = None) -> None:
        self.meta = read_companion_meta(RewritesMeta, folder)
        super().__init__(folder, REWRITE_COLUMNS, verify, files)
        check_values(folder / "lengths.npy", self.lengths, 0)
        check_values(folder / "view_tokens.npy", self.view_tokens, 1)
        check_values(folder / "view_positive.npy", self.view_positive, 0, 1)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], views of each text; may be 0."""
        return read_array(self.folder / "lengths.npy", "int32", len(self))

    @cached_property
    def ptr(self) -> Offsets:
        """[N+1], int64 when indexed; the views of text i are ``ptr[i]..ptr[i+1]``."""
        return Offsets(self.lengths)

    @cached_property
    def view_tokens(self) -> NDArray[np.int32]:
        """int32 [V], word pieces of each view, without [CLS] and [SEP]; at least 1."""
        return read_array(self.folder / "view_tokens.npy", "int32", self.ptr.total)

    @cached_property
    def view_positive(self) -> NDArray[np.uint8]:
        """uint8 [V], 1: the view says the same as the caption; 0: it is false of the image."""
        return read_array(self.folder / "view_positive.npy", "uint8", self.ptr.total)

    def write_ids(
        self,
        texts: NDArray[np.int64],
        views: NDArray[np.int64],
        out: NDArray[np.int64],
        starts: NDArray[np.int64],
    ) -> None:
        """Write the word pieces of views into int64 ``out`` [Nt], without [CLS] and [SEP].

        Args:
            texts: int64 [B], rows of this store.
            views: int64 [B], flat numbers, each one of its text's.
            out: int64 [Nt].
            starts: int64 [B], first place of each view in ``out``.

        Raises:
            VlscaleError: word pieces that do not fit view_tokens.npy or the vocabulary.
            IndexError: there is no such text, or the view is not one of it.
        """
        texts, views = np.asarray(texts, np.int64), np.asarray(views, np.int64)
        counts = lengths_of(self.folder, self.lengths, texts)
        firsts = self.ptr[texts]
        if ((views < firsts) | (views >= firsts + counts)).any():
            bad = int(np.argmax((views < firsts) | (views >= firsts + counts)))
            raise IndexError(f"{self.folder}: view {views[bad]} is not one of text {texts[bad]}")
        before, totals = self._places(firsts, counts, views)
        sizes = np.asarray(self.view_tokens[views], np.int64)
        for shard, at, local in self._reader.by_shard(texts):
            ((begins, shapes),) = shard.shapes(local, ["input_ids"], [1])
            if not np.array_equal(shapes[:, 0], totals[at]):
                bad = int(np.argmax(shapes[:, 0] != totals[at]))
                self.fail(
                    int(texts[at[bad]]), f"{shapes[bad, 0]} word pieces, but view_tokens.npy says {totals[at[bad]]}"
                )
            ids = pieces_of(shard, begins + 4 * before[at], sizes[at])
            self._check_ids(texts[at], sizes[at], ids)
            out[np.repeat(starts[at], sizes[at]) + within(sizes[at])] = ids
            self.bytes_read += ids.nbytes

    def _places(
        self, firsts: NDArray[np.int64], counts: NDArray[np.int32], views: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Word pieces, int64 [B], that stand before each view in its row, and of the whole row."""
        numbers = np.repeat(firsts, counts) + within(counts)
        of = np.repeat(np.arange(len(views)), counts)
        tokens = np.asarray(self.view_tokens[numbers], np.int64)
        earlier = np.where(numbers < views[of], tokens, 0)
        before, totals = (np.bincount(of, each, len(views)).astype(np.int64) for each in (earlier, tokens))
        return before, totals

    def _check_ids(self, rows: NDArray[np.int64], sizes: NDArray[np.int64], ids: NDArray[np.int32]) -> None:
        size = self.meta.vocabulary_size
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            bad = int(np.argmax((ids < 0) | (ids >= size)))
            self.fail(owner(rows, sizes, bad), f"token id {ids[bad]} is outside the vocabulary of {size}")

    def rewrites(self, row: int) -> list[tuple[Rewrite, NDArray[np.int32]]]:
        """The views of text ``row`` with their word pieces; for people and tools, not for batches.

        Raises:
            VlscaleError: the row is damaged.
        """
        found, first = self.row(row), int(self.ptr[row])
        numbers = slice(first, first + int(self.lengths[row]))
        problem = view_problem(found["views"], self.view_tokens[numbers], self.view_positive[numbers])
        if problem:
            self.fail(row, problem)
        ids, place, rewrites = found["input_ids"], 0, []
        for text, positive, kind, old, new, count in found["views"]:
            rewrites.append((Rewrite(text, positive, kind, old, new), ids[place : place + count]))
            place += count
        if place != len(ids) and rewrites:
            self.fail(row, f"{len(ids)} word pieces, but its views have {place}")
        return rewrites


class RetrievedStore(Companion):
    """Reader of ``ROOT/retrieved``: the images and the texts, of other rows, that are most like each text's own.

    Raises:
        VlscaleError: a file is missing or damaged.
    """

    meta: RetrievedMeta
    _cached = ("image_counts", "text_counts")

    def __init__(self, folder: Path, verify: bool = True, files: FilesOf | None = None) -> None:
        self.meta = read_companion_meta(RetrievedMeta, folder)
        super().__init__(folder, RETRIEVED_COLUMNS, verify, files)
        for kind in ("images", "texts"):
            collection = self.collection(kind)
            most = collection.rows if collection else 0
            check_values(folder / f"{kind[:-1]}_counts.npy", self.counts(kind), 0, most)

    @cached_property
    def image_counts(self) -> NDArray[np.int32]:
        """int32 [N], images retrieved for each text; may be 0."""
        return read_array(self.folder / "image_counts.npy", "int32", len(self))

    @cached_property
    def text_counts(self) -> NDArray[np.int32]:
        """int32 [N], texts retrieved for each text; may be 0."""
        return read_array(self.folder / "text_counts.npy", "int32", len(self))

    def collection(self, kind: Kind) -> Collection | None:
        """What the retrieved rows of a kind are rows of; None where none were asked for."""
        return self.meta.image_collection if kind == "images" else self.meta.text_collection

    def counts(self, kind: Kind) -> NDArray[np.int32]:
        """int32 [N], retrieved rows of a kind for each text."""
        return self.image_counts if kind == "images" else self.text_counts

    def images_of(self, row: int) -> NDArray[np.int32]:
        """Rows of the image collection, int32 [k], best first; see :meth:`packed`."""
        return self.packed("images", np.array([row]))[0]

    def texts_of(self, row: int) -> NDArray[np.int32]:
        """Rows of the text collection, int32 [k], best first; see :meth:`packed`."""
        return self.packed("texts", np.array([row]))[0]

    def packed(self, kind: Kind, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The candidates of int64 [B] ``rows``, one row after the other, best first.

        Returns:
            ``(candidates, counts)``: int32 [sum of counts], rows of the collection, different from each other within
            a row; and int32 [B].

        Raises:
            VlscaleError: a candidate outside the collection, one twice, or another number of them than recorded.
            IndexError: there is no such row.
        """
        rows = np.asarray(rows, np.int64)
        counts = lengths_of(self.folder, self.counts(kind), rows)
        firsts = np.cumsum(counts, dtype=np.int64) - counts
        found = np.empty(int(counts.sum(dtype=np.int64)), np.int32)
        for shard, at, local in self._reader.by_shard(rows):
            ((starts, shapes),) = shard.shapes(local, [kind], [1])
            sizes = np.asarray(counts[at], np.int64)
            good = shapes[:, 0] == np.maximum(sizes, 1)  # an empty list is stored as one -1
            if not good.all():
                bad = int(np.argmin(good))
                self.fail(int(rows[at[bad]]), f"{shapes[bad, 0]} {kind}, expected {sizes[bad]}")
            ids = pieces_of(shard, starts, sizes)
            found[np.repeat(firsts[at], sizes) + within(sizes)] = ids
            self.bytes_read += ids.nbytes
        self._check(kind, rows, counts, found)
        return found, counts

    def _check(self, kind: Kind, rows: NDArray[np.int64], counts: NDArray[np.int32], found: NDArray[np.int32]) -> None:
        if not len(found):
            return
        collection = self.collection(kind)
        assert collection is not None  # without one all counts are 0
        outside = (found < 0) | (found >= collection.rows)
        if outside.any():
            bad = int(np.argmax(outside))
            self.fail(owner(rows, counts, bad), f"{kind} name row {found[bad]} of {collection.rows}")
        keys = np.repeat(np.arange(len(rows)), counts) * collection.rows + found
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            bad = int(order[twice[0] + 1])
            self.fail(owner(rows, counts, bad), f"{kind} name row {found[bad]} twice")

    def check_original(self, kind: Kind, row: int, candidates: NDArray[Any], own: NDArray[Any]) -> None:
        """Refuse candidates that contain the original: it would be contrasted with itself.

        Args:
            kind: of the candidates.
            row: the text that they were retrieved for.
            candidates: int [k], from this store.
            own: int, rows of the collection that are the text's own: its images; itself and the texts of its images.
                Empty where the collection is another dataset's.

        Raises:
            VlscaleError: a candidate is one of ``own``.
        """
        both = np.intersect1d(candidates, own)
        if len(both):
            raise VlscaleError(
                f"{self.folder}: row {row}: {kind} name row {both[0]}, which is the original; remove the folder and "
                f"run python -m data_tools.build_retrieval again"
            )


AnyCompanion = TypeVar("AnyCompanion", UnitStore, RewriteStore, RetrievedStore)


def open_companion(
    kind: type[AnyCompanion], folder: Path, texts: TextStore, verify: bool = True, files: FilesOf | None = None
) -> AnyCompanion | None:
    """Open ``folder`` as a companion of ``texts``; None if there is no such folder.

    Raises:
        VlscaleError: it is damaged, of an older layout, or of other texts.
    """
    if not folder.exists():
        return None
    store = kind(folder, verify, files)
    require_same_texts(store, texts)
    return store
