"""LMDB databases, read in ranges of keys."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_tools.formats.lmdb_pages import page_problem
from vlscale.errors import VlscaleError

_opened: dict[Path, tuple[tuple[int, ...], Any]] = {}
"""Open databases by path, with what tells whether the file is still the same. LMDB refuses to open one twice."""


def open_lmdb(path: Path) -> Any:
    """Open a database for reading: a folder with ``data.mdb``, or that file itself. It stays open in this
    process until it is closed or has changed.

    Raises:
        VlscaleError: it is missing, no LMDB, shorter than it says or with a page of the wrong type (reading on would
            kill the process); or the package ``lmdb`` is missing.
    """
    try:
        import lmdb
    except ImportError as error:
        raise VlscaleError(f"{path}: reading LMDB needs a package ({error}); pip install 'vlscale[import]'") from None
    data = path / "data.mdb" if path.is_dir() else path
    if not data.is_file():
        raise VlscaleError(f"{data}: is missing; give the folder that holds data.mdb")
    status, key = data.stat(), data.resolve()
    state = (os.getpid(), status.st_ino, status.st_size, status.st_mtime_ns)
    known, env = _opened.pop(key, (None, None))
    if known != state or not _is_open(env):
        if env is not None and known is not None and known[0] == os.getpid():
            env.close()
        try:
            env = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
            page_size = env.stat()["psize"]
            expected = (env.info()["last_pgno"] + 1) * page_size
        except lmdb.Error as error:
            raise VlscaleError(f"{data}: no LMDB database, or damaged ({error}); download it again") from None
        if status.st_size < expected:
            env.close()
            raise VlscaleError(
                f"{data}: truncated: {status.st_size} bytes, expected {expected} by its header; download it again"
            )
        problem = page_problem(data, page_size)
        if problem:
            env.close()
            raise VlscaleError(f"{data}: damaged ({problem}); download it again")
    _opened[key] = state, env
    return env


def _is_open(env: Any) -> bool:
    """False for a database that somebody has closed."""
    import lmdb

    try:
        env.stat()
    except lmdb.Error:
        return False
    return True


@contextmanager
def _one_line_damage(path: Path) -> Iterator[None]:
    """Turn what LMDB says about a damaged page, which it notices only when it comes to it, into one line."""
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise VlscaleError(f"{path}: damaged ({error}); download it again") from None


def key_parts(path: Path, size: int) -> list[dict[str, Any]]:
    """Cut the keys, in their order, into ranges of ``size``: ``{"first": key, "count": keys}``; values are not read.

    Raises:
        VlscaleError: see :func:`open_lmdb`; or the database is damaged.
    """
    parts: list[dict[str, Any]] = []
    env = open_lmdb(path)
    with _one_line_damage(path), env.begin() as transaction, transaction.cursor() as cursor:
        for number, key in enumerate(cursor.iternext(keys=True, values=False)):
            if number % size == 0:
                parts.append({"first": key.decode("latin-1"), "count": 0})
            parts[-1]["count"] += 1
    return parts


def lmdb_parts(paths: Sequence[Path], size: int, name: str = "file") -> list[dict[str, Any]]:
    """Cut several databases into ranges of keys (see :func:`key_parts`); ``name`` holds the number of the database."""
    return [{name: number, **part} for number, path in enumerate(paths) for part in key_parts(path, size)]


def first_part(path: Path, count: int) -> dict[str, Any]:
    """Return the range of the first ``count`` keys, without looking at all keys.

    Raises:
        VlscaleError: there is none; see :func:`key_parts`.
    """
    env = open_lmdb(path)
    with _one_line_damage(path), env.begin() as transaction, transaction.cursor() as cursor:
        if not cursor.first():
            raise VlscaleError(f"{path}: has no records")
        return {"first": cursor.key().decode("latin-1"), "count": count}


def read_value(path: Path, key: bytes) -> bytes | None:
    """Return the value of one key; None if there is no such key.

    Raises:
        VlscaleError: the database is damaged.
    """
    env = open_lmdb(path)
    with _one_line_damage(path), env.begin() as transaction:
        found: bytes | None = transaction.get(key) if key else None
        return found


def read_range(part: Mapping[str, Any], path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a range.

    Raises:
        VlscaleError: the range is not there, or the database is damaged.
    """
    env = open_lmdb(path)
    with _one_line_damage(path), env.begin() as transaction, transaction.cursor() as cursor:
        if not cursor.set_key(part["first"].encode("latin-1")):
            raise VlscaleError(f"{path}: key {part['first']!r} is gone; the database has changed since the start")
        for number, item in enumerate(cursor.iternext()):
            if number == part["count"]:
                return
            yield item
