"""The folder of kernels compiled on this machine: ours alone, written so that nobody meets half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """The folder of compiled kernels: ``$VLSCALE_CACHE``, else ``$XDG_CACHE_HOME/vlscale`` or ``~/.cache/vlscale``.

    It is made if need be, and refused where others may write to it: what lies in it is executed.

    Raises:
        OSError: there is no home, it cannot be made, or belongs to or can be written by others.
    """
    folder = _chosen()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OSError(f"{folder}: others can write to it, so compiled kernels are not read from it; set VLSCALE_CACHE")
    return folder


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """Give a file to write beside ``target``, which takes its place where the block ends well.

    Processes that start together compile the same kernel; each writes a file of its own.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".writing-", suffix=target.suffix)
    os.close(handle)
    path = Path(name)
    try:
        yield path
        os.replace(path, target)
    finally:
        path.unlink(missing_ok=True)


def _chosen() -> Path:
    chosen = os.environ.get("VLSCALE_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlscale" / "kernels"
    except RuntimeError as error:  # no home
        raise OSError(f"no folder for compiled kernels ({error}): set VLSCALE_CACHE") from None
