"""A folder that a demo corpus is built into: complete under its name, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlscale.errors import VlscaleError


@contextmanager
def fresh_folder(out: Path, overwrite: bool, kind: str) -> Iterator[Path]:
    """Give a new folder beside ``out``, and rename it to ``out`` at the end of the block.

    Args:
        out: what the folder is to be called.
        overwrite: replace what is there, if its ``manifest.json`` names ``kind``.
        kind: of corpus.

    Raises:
        VlscaleError: ``out`` exists and may not be replaced, or it cannot be written.
    """
    refuse(out, overwrite, kind)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        refuse(out, overwrite, kind)
        if out.exists():
            old = out.parent / f".{out.name}.old-{os.getpid()}"
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except OSError as error:
        raise VlscaleError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse(out: Path, overwrite: bool, kind: str) -> None:
    """Refuse to touch what is there, unless it is a corpus of this kind and the user said so.

    Raises:
        VlscaleError: it is not, or they did not.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise VlscaleError(f"{out}: exists already; choose another --out, or say --overwrite")
    manifest = out / "manifest.json"
    if out.is_symlink() or not manifest.is_file() or f'"{kind}"' not in manifest.read_text(encoding="utf-8"):
        raise VlscaleError(f"{out}: is no demo corpus (no manifest.json of one), so --overwrite leaves it alone")
