"""The folder of kernels compiled on this machine: ours alone, written so that nobody meets half a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CURE = "set VLSCALE_CACHE to a folder of your own"


def cache_folder() -> Path:
    """The folder of compiled kernels: ``$VLSCALE_CACHE``, else ``$XDG_CACHE_HOME/vlscale`` or ``~/.cache/vlscale``.

    It is made if need be, and refused where others may write to it: what lies in it is executed.

    Raises:
        OSError: there is no home, it cannot be made, or belongs to or can be written by others; VLSCALE_CACHE is named.
    """
    folder = _chosen()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise OSError(
            f"{folder}, the folder for compiled kernels, cannot be made ({error.strerror}); {_CURE}"
        ) from None
    if found.st_uid != os.getuid():
        raise OSError(f"{folder} belongs to another user (id {found.st_uid}), so no kernels are run from it; {_CURE}")
    if found.st_mode & 0o022:
        raise OSError(f"{folder}: others can write to it, so no kernels are run from it; chmod go-w it, or {_CURE}")
    return folder


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """Give a file to write beside ``target``, which takes its place where the block ends well.

    Processes that start together compile the same kernel; each writes a file of its own.

    Raises:
        OSError: nothing can be written there.
    """
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".writing-", suffix=target.suffix)
    except OSError as error:
        raise OSError(f"{target.parent}: no file can be written there ({error.strerror}); {_CURE}") from None
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
        raise OSError(f"no folder for compiled kernels ({error}): {_CURE}") from None
