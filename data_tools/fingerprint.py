"""What a build was begun with: options and the files they name, so that it is only ever continued with the same."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from vlscale.errors import VlscaleError

_EDGE = 1 << 16
_MOST_EDGES = 64
_NOT_SOURCE = {"lock.mdb"}
"""LMDB rewrites its lock file whenever somebody opens the database."""

NOT_PART_OF_RESULT = frozenset({"out", "workers", "shard", "merge", "on_error", "device", "batch"})
"""Options that change how a build runs, not what comes out. ``on_error`` may turn to ``skip`` after a bad row; shares
of one extraction run on different devices, whose results differ by rounding alone."""


def describe_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as JSON types; files and folders are replaced by what tells them apart: sizes and digests.

    Raises:
        VlscaleError: a file is missing or cannot be read.
    """
    kept = {name: value for name, value in vars(options).items() if name not in NOT_PART_OF_RESULT}
    for name, value in kept.items():
        _require_files(name, value)
    return {name: _describe(kept[name]) for name in sorted(kept)}


def _require_files(name: str, value: Any) -> None:
    """Raise for a mistyped name now, before hours of reading, or a network that is built, lead to it."""
    for path in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(path, Path) and not path.exists():
            option = "" if name == "sources" else f"--{name.replace('_', '-')} "
            raise VlscaleError(f"{option}{path}: no such file or folder; is the name mistyped?")


def _describe(value: Any) -> Any:
    if isinstance(value, Path):
        return describe_path(value)
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def describe_path(path: Path) -> dict[str, Any]:
    """Return ``name``, ``bytes`` and a ``digest`` of a file (size, first and last 64 KiB) or of a folder (its files).

    The digest does not depend on where the file lies or when it was copied there, and never reads it whole.

    Raises:
        VlscaleError: it cannot be read.
    """
    digest, total = hashlib.sha256(), 0
    try:
        files = list(_files(path))
        for name, file in files:
            size = file.stat().st_size
            total += size
            edges = _edges(file, size) if len(files) <= _MOST_EDGES else ""
            digest.update(json.dumps([name, size, edges]).encode())
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror})") from None
    return {"name": path.name, "bytes": total, "digest": digest.hexdigest()[:32]}


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        yield "", path
        return
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            if name not in _NOT_SOURCE and file.is_file():
                yield file.relative_to(path).as_posix(), file


def _edges(file: Path, size: int) -> str:
    with file.open("rb") as data:
        found = xxhash.xxh64(data.read(_EDGE))
        data.seek(max(0, size - _EDGE))
        found.update(data.read(_EDGE))
    return found.hexdigest()


def bytes_of(described: Mapping[str, Any]) -> int:
    """Sum of the bytes of the source's files among described options."""
    return sum(item["bytes"] for item in described.get("sources") or [] if isinstance(item, dict))


def first_difference(old: Any, new: Any, name: str = "") -> str:
    """Name the first place where two JSON values differ, with both values; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (one, other) in enumerate(zip(old, new, strict=True)):
            found = first_difference(one, other, f"{name}[{place}]")
            if found:
                return found
        return ""
    return "" if old == new else f"{name} was {_short(old)}, now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
