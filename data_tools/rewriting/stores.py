"""The two stores beside ``texts``, with one row per text in the same order: ``units`` and ``rewrites``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_tools.rewriting.graph import Analysis, from_json
from data_tools.rewriting.replacing import Rewrite
from vlscale.data.index import read_array, read_meta
from vlscale.data.schema import Meta
from vlscale.data.store_base import Store
from vlscale.data.writer_base import StoreWriter, make_meta
from vlscale.errors import VlscaleError

SHARD_BYTES = 16 << 20
UNIT_COLUMNS = {"id": "str", "units": "ndarray:int32", "graph": "json"}
REWRITE_COLUMNS = {"id": "str", "input_ids": "ndarray:int32", "views": "json"}


class UnitsMeta(Meta):
    """units/meta.json: the vocabulary whose tokens the units count, and what found them."""

    kind: Literal["units"] = "units"
    version: Literal[1] = 1
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    parser: str


class RewritesMeta(Meta):
    """rewrites/meta.json: the vocabulary of the ids, and the seed of the draws."""

    kind: Literal["rewrites"] = "rewrites"
    version: Literal[1] = 1
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    seed: int


class UnitWriter(StoreWriter):
    """Writes ``ROOT/units``.

    Args:
        root: the dataset's folder.
        fingerprint: of the vocabulary.
        parser: what found the units.
    """

    def __init__(self, root: Path, fingerprint: str, parser: str) -> None:
        meta = make_meta(UnitsMeta, fingerprint=fingerprint, parser=parser)
        super().__init__(root, "units", meta, UNIT_COLUMNS, SHARD_BYTES, None)
        self._lengths: list[int] = []

    def write(self, name: str, units: NDArray[np.int32], analysis: Analysis) -> None:
        """Append a text's units, int32 [U, 3], and its graph."""
        self._append({"id": name, "units": units.astype("<i4"), "graph": analysis.to_json()})
        self._lengths.append(len(units))

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {"lengths.npy": np.asarray(self._lengths, "<i4")}


class RewriteWriter(StoreWriter):
    """Writes ``ROOT/rewrites``.

    Args:
        root: the dataset's folder.
        fingerprint: of the vocabulary.
        seed: of the draws.
    """

    def __init__(self, root: Path, fingerprint: str, seed: int) -> None:
        meta = make_meta(RewritesMeta, fingerprint=fingerprint, seed=seed)
        super().__init__(root, "rewrites", meta, REWRITE_COLUMNS, SHARD_BYTES, None)
        self._lengths: list[int] = []

    def write(self, name: str, rewrites: Sequence[tuple[Rewrite, Sequence[int]]]) -> None:
        """Append the rewrites of a text with their word pieces (no [CLS], no [SEP])."""
        views = [[r.text, r.positive, r.kind, r.old, r.new, len(ids)] for r, ids in rewrites]
        packed = np.asarray([one for _, ids in rewrites for one in ids] or [-1], "<i4")
        self._append({"id": name, "input_ids": packed, "views": views})
        self._lengths.append(len(views))

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {"lengths.npy": np.asarray(self._lengths, "<i4")}


class UnitStore(Store):
    """Reader of ``ROOT/units``.

    Raises:
        VlscaleError: a file is missing or damaged.
    """

    meta: UnitsMeta
    _cached = ("lengths",)

    def __init__(self, folder: Path) -> None:
        self.meta = read_meta(UnitsMeta, folder / "meta.json")
        super().__init__(folder, UNIT_COLUMNS, True, None)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], units of each text."""
        return read_array(self.folder / "lengths.npy", "int32", len(self))

    def analysis(self, row: int, name: str, text: str) -> Analysis:
        """The words and the graph of a text.

        Raises:
            VlscaleError: the row is of another text.
        """
        found = self.row(row)
        if found["id"] != name:
            self.fail(row, f"is of text {found['id']!r}, expected {name!r}")
        try:
            return from_json(text, found["graph"])
        except ValueError as error:
            self.fail(row, str(error))


class RewriteStore(Store):
    """Reader of ``ROOT/rewrites``.

    Raises:
        VlscaleError: a file is missing or damaged.
    """

    meta: RewritesMeta
    _cached = ("lengths",)

    def __init__(self, folder: Path) -> None:
        self.meta = read_meta(RewritesMeta, folder / "meta.json")
        super().__init__(folder, REWRITE_COLUMNS, True, None)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], rewrites of each text; may be 0."""
        return read_array(self.folder / "lengths.npy", "int32", len(self))

    def rewrites(self, row: int) -> list[tuple[Rewrite, NDArray[np.int32]]]:
        """The rewrites of text ``row`` with their word pieces.

        Raises:
            VlscaleError: the row is damaged.
        """
        found = self.row(row)
        ids, place, rewrites = found["input_ids"], 0, []
        for text, positive, kind, old, new, count in _views(self, row, found):
            rewrites.append((Rewrite(text, positive, kind, old, new), ids[place : place + count]))
            place += count
        if place != len(ids) and rewrites:
            self.fail(row, f"{len(ids)} word pieces, but its views have {place}")
        return rewrites


def _views(store: RewriteStore, row: int, found: Mapping[str, Any]) -> list[list[Any]]:
    views = found["views"]
    good = isinstance(views, list) and all(
        isinstance(view, list)
        and [type(item) for item in view] == [str, bool, str, str, str, int]
        and view[2] in ("object", "attribute", "relation", "sentence")
        and view[5] > 0
        for view in views
    )
    if not good or len(views) != store.lengths[row]:
        store.fail(row, f"views are not {store.lengths[row]} rewrites: {json.dumps(views)[:80]}")
    return list(views)


def require_same_texts(store: Store, texts: Store, fingerprint: str) -> None:
    """Raise unless ``store`` stands beside ``texts``.

    Raises:
        VlscaleError: another number of rows, or another vocabulary.
    """
    if len(store) != len(texts) or store.meta.fingerprint != fingerprint:
        raise VlscaleError(
            f"{store.folder}: {len(store)} rows of vocabulary {store.meta.fingerprint[:12]}, but {texts.folder} has "
            f"{len(texts)} of {fingerprint[:12]}; remove it and build it again"
        )
