"""What the readers of the stores beside the texts share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlscale.data.chunks import slices
from vlscale.data.companion_schema import SIDE_FILES
from vlscale.data.index import REBUILD, read_bytes, read_meta
from vlscale.data.reader import FilesOf
from vlscale.data.schema import Meta
from vlscale.data.shard import Shard
from vlscale.data.store_base import Store, within
from vlscale.errors import VlscaleError

AnyMeta = TypeVar("AnyMeta", bound=Meta)


class Companion(Store):
    """A store with one row per text, in the texts' order. ``meta.fingerprint`` is that of the texts' vocabulary.

    Where its files are fetched, only those that training reads come (:data:`SIDE_FILES`), and only those are checked.
    """

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


def checked_version(model: type[AnyMeta], folder: Path, tool: str) -> AnyMeta:
    """Read ``folder/meta.json``; an older layout is refused with the tool that writes the present one.

    Raises:
        VlscaleError: it is missing, damaged, or of another layout.
    """
    path, present = folder / "meta.json", model.model_fields["version"].default
    try:
        content = json.loads(read_bytes(path))
        found = content.get("version") if isinstance(content, dict) else None
    except (ValueError, RecursionError):
        found = None  # read_meta says what is wrong
    if isinstance(found, int) and found != present:
        raise VlscaleError(
            f"{path}: version {found} of the layout, but {present} is read here; remove {folder} and run "
            f"python -m data_tools.{tool} again"
        )
    return read_meta(model, path)


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
