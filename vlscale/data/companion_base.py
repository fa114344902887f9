"""What the readers of the stores beside the texts share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlscale.data.chunks import slices
from vlscale.data.companion_schema import SIDE_FILES, CompanionMeta, RewritesMeta
from vlscale.data.index import REBUILD, read_bytes, read_meta
from vlscale.data.reader import FilesOf
from vlscale.data.shard import Shard
from vlscale.data.store import TextStore
from vlscale.data.store_base import Store, within
from vlscale.errors import VlscaleError

AnyMeta = TypeVar("AnyMeta", bound=CompanionMeta)

CURE = "remove {folder} and run python -m data_tools.{tool} again"
TOOLS = {"units": "find_units", "rewrites": "rewrite_captions", "retrieved": "build_retrieval"}
"""Store -> the tool that writes it."""


class Companion(Store):
    """A store with one row per text, in the texts' order. ``meta`` says which texts: see :func:`require_same_texts`.

    Where its files are fetched, only those that training reads come (:data:`SIDE_FILES`), and only those are checked.
    """

    meta: CompanionMeta
    _derived: tuple[str, ...] = ()

    def __init__(self, folder: Path, columns: dict[str, str], verify: bool, files: FilesOf | None) -> None:
        super().__init__(folder, columns, verify, files)
        if files is not None:
            index = self._reader.index
            wanted = ("meta.json", *SIDE_FILES[self.meta.kind])
            kept = {name: value for name, value in index.side_files.items() if name in wanted}
            self._reader.index = dataclasses.replace(index, side_files=kept)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key not in self._derived}


def read_companion_meta(model: type[AnyMeta], folder: Path) -> AnyMeta:
    """Read ``folder/meta.json``; an older layout is refused with the tool that writes the present one.

    Raises:
        VlscaleError: it is missing, damaged, or of another layout.
    """
    path, present = folder / "meta.json", model.model_fields["version"].default
    cure = CURE.format(folder=folder, tool=TOOLS[model.model_fields["kind"].default])
    try:
        content = json.loads(read_bytes(path))
        found = content.get("version") if isinstance(content, dict) else None
    except (ValueError, RecursionError):
        found = None  # read_meta says what is wrong
    if isinstance(found, int) and found != present:
        raise VlscaleError(f"{path}: version {found} of the layout, but {present} is read here; {cure}")
    if isinstance(found, int) and "texts_digest" not in content:
        raise VlscaleError(f"{path}: an older layout, without texts_digest: the texts it is of are not known; {cure}")
    return read_meta(model, path)


def meta_of(texts: TextStore) -> dict[str, str]:
    """What the meta.json of a store beside ``texts`` says of them."""
    return {"fingerprint": texts.meta.vocabulary.fingerprint, "texts_digest": texts.reader.index.digest}


def require_same_texts(store: Companion, texts: TextStore) -> None:
    """Raise unless ``store`` was made beside ``texts``.

    Raises:
        VlscaleError: it was made of other texts, or of another vocabulary.
    """
    meta, expected = store.meta, texts.meta.vocabulary
    cure = CURE.format(folder=store.folder, tool=TOOLS[meta.kind])
    if len(store) != len(texts) or meta.fingerprint != expected.fingerprint:
        raise VlscaleError(
            f"{store.folder}: {len(store)} rows of vocabulary {meta.fingerprint[:12]}, but {texts.folder} has "
            f"{len(texts)} of {expected.fingerprint[:12]}; {cure}"
        )
    digest = texts.reader.index.digest
    if meta.texts_digest != digest:
        raise VlscaleError(
            f"{store.folder}: was made of other texts (index {meta.texts_digest[:12]}) than those in {texts.folder} "
            f"(index {digest[:12]}); {cure}"
        )
    if isinstance(meta, RewritesMeta) and meta.vocabulary_size != expected.size:
        raise VlscaleError(
            f"{store.folder}: ids of {meta.vocabulary_size} word pieces, but the vocabulary of {texts.folder} has "
            f"{expected.size}; {cure}"
        )


def check_values(path: Path, values: NDArray[Any], least: int, most: int | None = None) -> None:
    """Refuse values of a side file outside ``least..most``, naming the first.

    Raises:
        VlscaleError: there is one.
    """
    for part in slices(len(values)):
        piece = values[part]
        bad = piece < least if most is None else (piece < least) | (piece > most)
        if bad.any():
            at = int(np.argmax(bad))
            expected = f"at least {least}" if most is None else f"{least}..{most}"
            raise VlscaleError(f"{path}: entry {part.start + at} is {piece[at]}, expected {expected}; {REBUILD}")


def pieces_of(shard: Shard, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [sum of counts]: ``counts`` int32 values from each of the byte positions ``starts``."""
    return shard.elements(np.repeat(starts, counts) + 4 * within(counts), np.dtype("<i4")).astype(np.int32, copy=False)
