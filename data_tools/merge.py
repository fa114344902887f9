"""Putting complete parts together into stores, and stores and reports into their places.

Shards are linked, not copied, so a merge costs little time and no room. Whatever moment a merge is killed at, the next
one ends with the same bytes: everything is put together beside the parts, appears by one rename, and is then moved
piece by piece, the store itself last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.parts import Work
from vlscale.data.index import INDEX_NAME, read_array, read_bytes, read_index, record_side_files
from vlscale.errors import VlscaleError

_LAST = ("classes", "images", "texts")


def merge_stores(folders: Sequence[Path], columns: Mapping[str, str], target: Path) -> None:
    """Make one store of several: shards linked and renumbered, side files concatenated.

    Args:
        folders: the stores, in order; their meta.json are equal.
        columns: the columns they have, name -> MDS encoding.
        target: folder to create.

    Raises:
        VlscaleError: a store is damaged, or they do not fit together.
    """
    target.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    for folder in folders:
        for name in ("meta.json", "tokenizer.json"):
            _require_same(folders[0] / name, folder / name)
        read_index(folder, columns)  # names, sizes and columns are right
        for shard in json.loads(read_bytes(folder / INDEX_NAME))["shards"]:
            basename = f"shard.{len(shards):05}.mds"
            _link(folder / shard["raw_data"]["basename"], target / basename)
            shard["raw_data"]["basename"] = basename
            shards.append(shard)
    for name in ("meta.json", "tokenizer.json"):
        if (folders[0] / name).exists():
            shutil.copyfile(folders[0] / name, target / name)
    if (folders[0] / "lengths.npy").exists():
        lengths = [read_array(folder / "lengths.npy", "int32") for folder in folders]
        np.save(target / "lengths.npy", np.concatenate(lengths), allow_pickle=False)
        if (folders[0] / "image_ptr.npy").exists():  # texts that refer to no image
            np.save(target / "image_refs.npy", np.empty(0, "<i8"), allow_pickle=False)
            rows = sum(len(part) for part in lengths)
            np.save(target / "image_ptr.npy", np.zeros(rows + 1, "<i8"), allow_pickle=False)
    with (target / INDEX_NAME).open("w", encoding="utf-8") as file:
        json.dump({"version": 2, "shards": shards}, file, sort_keys=True)
    record_side_files(target)


def _require_same(one: Path, other: Path) -> None:
    if one.exists() != other.exists() or (one.exists() and one.read_bytes() != other.read_bytes()):
        raise VlscaleError(f"{other}: differs from {one}; remove the folder of this part and give the command again")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def load_hashes(work: Work, parts: int) -> list[NDArray[np.uint64]]:
    """uint64 hashes of the ids of every part."""
    return [np.load(work.part(number) / "ids.npy", allow_pickle=False) for number in range(parts)]


def require_complete(work: Work, parts: int) -> list[dict[str, Any]]:
    """Return the results of all parts.

    Raises:
        VlscaleError: some are not complete.
    """
    results = [work.result(number) for number in range(parts)]
    missing = [number for number, result in enumerate(results) if result is None]
    if missing:
        raise VlscaleError(
            f"{work.part(missing[0])}: this part and {len(missing) - 1} more of {parts} are not built yet; give the "
            f"command with every --shard i/n before --merge"
        )
    return [result for result in results if result is not None]


def publish(work: Work, fill: Callable[[Path], None]) -> None:
    """Put everything together and into place.

    Args:
        work: the build, whose lock ``merge`` is held.
        fill: puts stores, report and list of dropped rows into an empty folder; not called when an earlier run, which
            was killed, got past it.

    Raises:
        VlscaleError: a store of this name is there already, or something cannot be written.
    """
    try:
        if not work.merged.exists():
            temporary = work.folder / f".{work.kind}-merged.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            fill(temporary)
            shutil.copyfile(work.manifest, temporary / "manifest.json")
            os.rename(temporary, work.merged)
        names = [path.name for path in work.merged.iterdir() if path.name != "manifest.json"]
        for name in sorted(names, key=lambda name: (_LAST.index(name) if name in _LAST else -1, name)):
            if name in _LAST:
                refuse_existing(work.root / name)
                os.rename(work.merged / name, work.root / name)
            else:
                os.replace(work.merged / name, work.root / name)
    except OSError as error:
        raise VlscaleError(f"{work.folder}: cannot be merged ({error})") from None
    clean(work)


def clean(work: Work) -> None:
    """Remove a finished build's work folder; the record that it is finished goes last."""
    for path in sorted([*work.folder.glob(f".{work.kind}[.-]*"), *work.folder.glob(f"{work.kind}[.-]*")]):
        if path.is_dir() and path != work.merged:
            shutil.rmtree(path)
        elif not path.is_dir() and path != work.manifest:
            path.unlink(missing_ok=True)
    work.manifest.unlink(missing_ok=True)
    shutil.rmtree(work.merged, ignore_errors=True)
    with suppress(OSError):  # the other kind is being built
        work.folder.rmdir()


def refuse_existing(target: Path, cure: str = "remove it or choose another --out") -> None:
    """Raise if there is something under a store's name.

    Raises:
        VlscaleError: there is.
    """
    if os.path.lexists(target):
        raise VlscaleError(f"{target}: exists already and is not overwritten; {cure}")
