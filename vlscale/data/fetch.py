"""Fetching one file, from a URL or a plain folder: watched, checked, and tried again a bounded number of times."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import xxhash

from vlscale.config import is_url
from vlscale.errors import VlscaleError

_CHUNK = 1 << 22
_LOOK_S = 0.1
_PAUSE_S = 0.5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_MISSING = re.compile(r"\b404\b|NoSuchKey|not ?found|does not exist|no such file", re.IGNORECASE)

Check = Callable[[Path], "str | None"]
"""Says what is wrong with a fetched file, if anything is."""


def shown(source: Path | str, text: str | None = None) -> str:
    """``text``, or the source itself, without the password that a URL may hold."""
    text = str(source) if text is None else text
    password = urlsplit(source).password if isinstance(source, str) else None
    return text.replace(f":{password}@", ":***@") if password else text


class _AttemptError(Exception):
    """One attempt has failed; the message says how, and ``cure`` what may help."""

    def __init__(self, message: str, cure: str, missing: bool = False, full: bool = False) -> None:
        super().__init__(message)
        self.cure, self.missing, self.full = cure, missing, full


class NotThereError(VlscaleError):
    """The file does not exist at the remote, as far as its answer can be understood."""


@dataclass(frozen=True)
class Fetcher:
    """Fetches files; the same for all of a recipe's remotes.

    Attributes:
        retries: further attempts after a failed one.
        timeout_s: seconds without any byte arriving after which an attempt is given up.
    """

    retries: int = 2
    timeout_s: float = 60.0

    def fetch(
        self,
        source: Path | str,
        target: Path,
        most: int,
        check: Check = lambda path: None,
        make_room: Callable[[], None] = lambda: None,
        optional: bool = False,
    ) -> None:
        """Fetch ``source`` to ``target``, which appears whole and checked, or not at all.

        Args:
            source: URL or path of the file.
            target: where it goes; its folder exists and is private to the caller until it is done.
            most: bytes after which the file is taken for something else.
            check: see :data:`Check`.
            make_room: called when the disk is full, before the next attempt.
            optional: a file that is not there is not asked for again.

        Raises:
            NotThereError: the file does not exist.
            VlscaleError: the attempts are used up; or something is not installed.
        """
        attempt = 0
        while True:
            try:
                self._try(source, target, most, check)
                return
            except _AttemptError as problem:
                attempt += 1
                if attempt > self.retries or (optional and problem.missing):
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    kind = NotThereError if problem.missing else VlscaleError
                    raise kind(f"{shown(source)}: {shown(source, str(problem))}{tried}; {problem.cure}") from None
                if problem.full:
                    make_room()
                time.sleep(_PAUSE_S * 2 ** (attempt - 1))

    def _try(self, source: Path | str, target: Path, most: int, check: Check) -> None:
        # A folder of its own: an attempt that was given up may still write into it, and downloaders keep parts there.
        try:
            folder = Path(tempfile.mkdtemp(prefix=".try-", dir=target.parent))
        except OSError as error:
            raise _explained(error, target) from None
        try:
            fetched = folder / target.name
            self._watch(source, fetched, most)
            try:
                status = fetched.lstat()
                if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                    raise _AttemptError(f"{status.st_size} bytes, expected at most {most}", _RESTORE)
                problem = check(fetched)
                if problem:
                    raise _AttemptError(problem, _RESTORE)
                os.replace(fetched, target)
            except OSError as error:
                raise _explained(error, target) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, source: Path | str, target: Path, most: int) -> None:
        """Run the transfer in a thread, and leave it behind when nothing arrives any more or far too much does."""
        failures: list[BaseException] = []

        def transfer() -> None:
            try:
                _transfer(source, target, self.timeout_s)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=transfer, name=f"fetch {target.name}", daemon=True)
        thread.start()
        seen, since = -1, time.monotonic()
        while True:
            thread.join(_LOOK_S)
            if not thread.is_alive():
                break
            arrived = _folder_bytes(target.parent)
            if arrived > most:
                raise _AttemptError(f"more than the expected {most} bytes arrive", _RESTORE)
            if arrived != seen:
                seen, since = arrived, time.monotonic()
            elif time.monotonic() - since > self.timeout_s:
                raise _AttemptError(
                    f"nothing has arrived for {self.timeout_s:g} s",
                    "check the network, or raise data.download_timeout_s",
                )
        if failures:
            raise _explained(failures[0], target) from None


_RESTORE = "restore the file there, or build the store again"


def _transfer(source: Path | str, target: Path, timeout_s: float) -> None:
    if is_url(source):
        from vlscale.data.mds import download

        download(str(source), target, timeout_s)
        return
    with open(source, "rb") as reader, open(target, "xb") as writer:
        if not stat.S_ISREG(os.fstat(reader.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        shutil.copyfileobj(reader, writer, _CHUNK)


def _explained(error: BaseException, target: Path) -> Exception:
    if isinstance(error, VlscaleError):
        return error
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return _AttemptError(
            f"the disk under {target.parent} is full ({error.strerror})",
            "free space there, set data.cache to a larger disk, or lower data.cache_limit",
            full=True,
        )
    text = " ".join(str(error).split())[:300]
    missing = isinstance(error, FileNotFoundError) or bool(_MISSING.search(text))
    return _AttemptError(
        f"cannot be fetched ({type(error).__name__}: {text})",
        "check that it is there and may be read, the credentials and the network",
        missing=missing,
    )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def hash_of(path: Path) -> str:
    """xxh64 (hex) of a file's bytes."""
    found = xxhash.xxh64()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def size_and_hash(bytes_: int, xxh64: str | None) -> Check:
    """Return a check against a size and, if it is known, a hash."""

    def check(path: Path) -> str | None:
        size = path.stat().st_size
        if size != bytes_:
            return f"{size} bytes, expected {bytes_} by index.json"
        found = None if xxh64 is None else hash_of(path)
        return None if found == xxh64 else f"damaged: its xxh64 is {found}, expected {xxh64} by index.json"

    return check
