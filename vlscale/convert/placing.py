"""Putting a finished result under its name: nothing that is not a former result is lost, whenever it is interrupted."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vlscale.convert import fluid
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, PROVENANCE_FILE

RESULTS = (CONFIG_FILE, "README.md", "model.pt", PROVENANCE_FILE)
SUFFIXES = (".safetensors", ".safetensors.index.json")
"""What the files of a folder that a conversion wrote are called, or end in; Paddle's variables are known by content."""
_LONGEST = 255
_NEW, _FORMER = "new", "former"
"""In a workplace: the folder of the new result, and what the target was while the two are exchanged."""


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


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Yield a path of the target's name, in a folder beside the target that goes with the block.

    What conversions to the same target have left there when they were killed goes first, unless it is the only copy of
    what the target was.

    Raises:
        OSError: the folder cannot be made.
    """
    parent = target.absolute().parent
    # Of this host alone: another's may be at work, and not every network file system tells of its locks.
    whose = hashlib.sha256(f"{socket.gethostname()}/{target.name}".encode(errors="surrogateescape")).hexdigest()
    prefix = f".vlscale-convert-{whose[:16]}-"
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            _remove_leftover(folder, target)
    with ExitStack() as afterwards, tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        descriptor = os.open(name, os.O_RDONLY)
        afterwards.callback(os.close, descriptor)
        with suppress(OSError):  # a file system without locks: nobody gets one there, and leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        (Path(name) / _NEW).mkdir()
        yield Path(name) / _NEW / target.name


def _remove_leftover(folder: Path, target: Path) -> None:
    """Remove a workplace of this target's, unless somebody is at work in it.

    Raises:
        OSError: somebody is, it is no folder, or it has vanished.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its process holds it as long as that lives
        used = (folder / _NEW).is_dir()
        only_copy = os.path.lexists(folder / _FORMER) and not os.path.lexists(target)
        if os.fstat(descriptor).st_uid == os.getuid() and used and not only_copy:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def put_in_place(beside: Path, target: Path, overwrite: bool) -> None:
    """Rename ``beside``, in a :func:`workplace`, to ``target``; what that held is kept until its successor stands.

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
    old = beside.parent.with_name(_FORMER)
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
