"""Hashing of whole files, in pieces: a shard or a checkpoint may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22


def file_digest(path: Path, algorithm: Callable[[], Any]) -> str:
    """Digest (hex) of a file's bytes; :func:`hashlib.file_digest` for Python 3.10, and for xxhash.

    Args:
        path: the file.
        algorithm: makes the hash, for example ``hashlib.sha256`` or ``xxhash.xxh64``.

    Raises:
        OSError: it cannot be read.
    """
    digest = algorithm()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return str(digest.hexdigest())
