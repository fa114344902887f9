"""Putting a finished result under its name: nothing that is not a former result is lost, whenever it is interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vlscale.convert import fluid
from vlscale.errors import VlscaleError

RESULTS = ("config.json", "README.md", "model.pt", "provenance.json")
SUFFIXES = (".safetensors", ".safetensors.index.json")
"""What the files of a folder that a conversion wrote are called, or end in; Paddle's variables are known by content."""
_LONGEST = 255


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that cannot be written, or whose replacing would lose something that is no result.

    Raises:
        VlscaleError: it exists and may not be replaced, is no file or folder, has no name or one that is too long, or
            its folder is missing.
    """
    if target.name in ("", ".", "..") or len(os.fsencode(target.name)) > _LONGEST or "\0" in str(target):
        raise VlscaleError(f"{str(target)[:80]}: is no name for a result; give another")
    try:
        parent, present = target.absolute().parent.is_dir(), os.path.lexists(target)
    except (OSError, ValueError) as error:
        raise VlscaleError(f"{str(target)[:80]}: cannot be looked at ({error}); give another name") from None
    if not parent:
        raise VlscaleError(f"{target}: {target.absolute().parent} is no folder; make it first")
    if not present:
        return
    if not overwrite:
        raise VlscaleError(f"{target}: exists already; give another name, or --overwrite")
    if not target.is_file() and not target.is_dir():
        raise VlscaleError(f"{target}: is neither a file nor a folder; give another name")
    if target.is_dir() and not target.is_symlink():
        stray = _stray(target)
        if stray is not None:
            raise VlscaleError(f"{target}: holds {stray}, which no conversion wrote; remove it or give another name")


def check_apart(target: Path, sources: Iterable[Path]) -> None:
    """Refuse a target that is, holds or lies in the source or one of its files.

    Raises:
        VlscaleError: see above.
    """
    place = target.resolve()
    for source in sources:
        other = source.resolve()
        if place == other or place in other.parents or other in place.parents:
            raise VlscaleError(f"{target}: is, holds or lies in the source {source}; give another name")


def put_in_place(beside: Path, target: Path, overwrite: bool) -> None:
    """Rename ``beside`` to ``target``; what that held is kept until its successor stands there.

    Raises:
        VlscaleError: something has come to stand there meanwhile, and may not be replaced.
        OSError: the disk refused; the target is as it was.
    """
    _sync(beside)
    if os.path.lexists(target):
        if not overwrite:
            raise VlscaleError(f"{target}: has come into being meanwhile; give another name, or --overwrite")
        check_target(target, overwrite)
    if os.path.lexists(target) and (beside.is_dir() or (target.is_dir() and not target.is_symlink())):
        _exchange(beside, target)
    else:
        os.replace(beside, target)
    _sync_folder(target.absolute().parent)


def _exchange(beside: Path, target: Path) -> None:
    """Move the old aside, the new in; back again if that fails. The caller's folder, and the old in it, go last."""
    old = beside.parent / "old"
    try:
        os.rename(target, old)
        os.rename(beside, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise


def _stray(folder: Path) -> str | None:
    """The first entry of a folder that no conversion wrote, or None."""
    if fluid.recognise(folder):
        return None
    names = (path.name for path in sorted(folder.iterdir()) if not path.is_file() or not _is_result(path.name))
    return next(names, None)


def _is_result(name: str) -> bool:
    return name in RESULTS or name.endswith(SUFFIXES)


def _sync(path: Path) -> None:
    """Wait until a result's bytes lie on the disk: its name must not outlive them."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
