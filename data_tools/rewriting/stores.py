"""Writers of two stores beside ``texts``, ``units`` and ``rewrites``, and what the tools read of them.

The readers are :mod:`vlscale.data.companions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.merge import merge_stores
from data_tools.rewriting.graph import Analysis, from_json
from vlscale.data.companion_base import meta_of
from vlscale.data.companion_schema import (
    REWRITE_COLUMNS,
    SIDE_FILES,
    UNIT_COLUMNS,
    Rewrite,
    RewritesMeta,
    UnitsMeta,
)
from vlscale.data.companions import UnitStore
from vlscale.data.index import read_array, record_side_files
from vlscale.data.store import TextStore
from vlscale.data.writer_base import StoreWriter, make_meta

SHARD_BYTES = 16 << 20


class UnitWriter(StoreWriter):
    """Writes ``ROOT/units``.

    Args:
        root: the dataset's folder.
        texts: the texts that are parsed, all of them.
        parser: what found the units.
    """

    def __init__(self, root: Path, texts: TextStore, parser: str) -> None:
        meta = make_meta(UnitsMeta, **meta_of(texts), parser=parser)
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
        texts: the captions, all of them; word pieces are of their vocabulary.
        seed: of the draws.
    """

    def __init__(self, root: Path, texts: TextStore, seed: int) -> None:
        meta = make_meta(RewritesMeta, **meta_of(texts), vocabulary_size=texts.meta.vocabulary.size, seed=seed)
        super().__init__(root, "rewrites", meta, REWRITE_COLUMNS, SHARD_BYTES, None)
        self._lengths: list[int] = []
        self._tokens: list[int] = []
        self._positive: list[bool] = []

    def write(self, name: str, rewrites: Sequence[tuple[Rewrite, Sequence[int]]]) -> None:
        """Append the rewrites of a text with their word pieces (no [CLS], no [SEP])."""
        views = [[r.text, r.positive, r.kind, r.old, r.new, len(ids)] for r, ids in rewrites]
        packed = np.asarray([one for _, ids in rewrites for one in ids] or [-1], "<i4")
        self._append({"id": name, "input_ids": packed, "views": views})
        self._lengths.append(len(views))
        self._tokens += [len(ids) for _, ids in rewrites]
        self._positive += [rewrite.positive for rewrite, _ in rewrites]

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {
            "lengths.npy": np.asarray(self._lengths, "<i4"),
            "view_tokens.npy": np.asarray(self._tokens, "<i4"),
            "view_positive.npy": np.asarray(self._positive, "u1"),
        }


def merge_companion(kind: str, columns: dict[str, str], folders: Sequence[Path], target: Path) -> None:
    """Make one companion of several, with all its side files; see :func:`data_tools.merge.merge_stores`.

    Raises:
        VlscaleError: a store is damaged, or they do not fit together.
    """
    merge_stores(folders, columns, target)
    for name in SIDE_FILES[kind]:
        dtype = "uint8" if name == "view_positive.npy" else "int32"
        arrays = [read_array(folder / name, dtype) for folder in folders]
        np.save(target / name, np.concatenate(arrays), allow_pickle=False)
    record_side_files(target)


def analysis_of(store: UnitStore, row: int, found: Mapping[str, Any], name: str, text: str) -> Analysis:
    """The words and the graph of a text.

    Args:
        store: the units.
        row: of the text.
        found: that row of the store, decoded.
        name: id of the text.
        text: the text.

    Raises:
        VlscaleError: the row is of another text, or damaged.
    """
    if found["id"] != name:
        store.fail(row, f"is of text {found['id']!r}, expected {name!r}")
    try:
        return from_json(text, found["graph"])
    except ValueError as error:
        store.fail(row, str(error))
