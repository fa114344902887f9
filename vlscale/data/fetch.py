"""Fetching one file, from a URL or a plain folder: watched, checked, and tried again a bounded number of times."""

from __future__ import annotations

import errno
import os
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

from vlscale.config_values import is_url
from vlscale.errors import VlscaleError
from vlscale.hashing import file_digest

_CHUNK = 1 << 22
_LOOK_S = 0.1
_PAUSE_S = 0.5
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_SURE = 2
"""Attempts that must find an optional file missing before that is believed."""

_MISSING_CODES = ("404", "NoSuchKey", "ObjectNotFound")
_MISSING_CLASSES = (("google", "NotFound"), ("databricks", "NotFound"), ("azure", "ResourceNotFoundError"))
_ELSEWHERE = ("LocalEntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError")
"""Of huggingface_hub: the network is down, or all of the dataset is missing or private. No word on the one file."""

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
            optional: a file that two attempts in a row find missing is not asked for again.

        Raises:
            NotThereError: the file does not exist.
            VlscaleError: the attempts are used up; or something is not installed.
        """
        attempt, missing = 0, 0
        while True:
            try:
                self._try(source, target, most, check)
                return
            except _AttemptError as problem:
                attempt += 1
                missing = missing + 1 if problem.missing else 0
                if attempt > self.retries or (optional and missing >= _SURE):
                    tried = f" ({attempt} attempts)" if attempt > 1 else ""
                    kind = NotThereError if missing >= min(_SURE, attempt) else VlscaleError
                    raise kind(f"{shown(source)}: {shown(source, str(problem))}{tried}; {problem.cure}") from None
                if problem.full:
                    make_room()
                time.sleep(_PAUSE_S * 2 ** (attempt - 1))

    def _try(self, source: Path | str, target: Path, most: int, check: Check) -> None:
        # A folder of its own: an attempt that was given up may still write into it, and downloaders keep parts there.
        try:
            folder = Path(tempfile.mkdtemp(prefix=".try-", dir=target.parent))
        except OSError as error:
            raise _explained(error, source, target) from None
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
                raise _explained(error, source, target) from None
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
            raise _explained(failures[0], source, target) from None


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


def _explained(error: BaseException, source: Path | str, target: Path) -> Exception:
    if isinstance(error, VlscaleError):
        return error
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return _AttemptError(
            f"the disk under {target.parent} is full ({error.strerror})",
            "free space there, set data.cache to a larger disk, or lower data.cache_limit",
            full=True,
        )
    text = " ".join(str(error).split())[:300]
    cure = "check that it is there and may be read, the credentials and the network"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        cure = "raise the limit of open files (ulimit -n)"
    elif _code(error) == "403":
        cure += "; without the right to list, S3 answers 403 for what is not there"
    return _AttemptError(f"cannot be fetched ({type(error).__name__}: {text})", cure, missing=is_missing(error, source))


def is_missing(error: BaseException, source: Path | str) -> bool:
    """Does a downloader say by ``error`` that ``source`` does not exist? Texts are not looked at, they say anything.

    Known are a missing local file, botocore's and OCI's codes, the classes of google, azure and databricks,
    huggingface_hub's EntryNotFoundError, and an HTTP response of status 404.
    """
    if error.__cause__ is not None and _code(error.__cause__):
        error = error.__cause__  # streaming raises FileNotFoundError for botocore's 403, too
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(error).__mro__}
    names = {name for _, name in kinds}
    if names & set(_ELSEWHERE):
        return False
    if _code(error):
        return _code(error) in _MISSING_CODES
    if isinstance(error, FileNotFoundError):
        # A named file other than the source is one of this machine: credentials, settings, the target's folder.
        return error.filename is None or str(error.filename) == str(source)
    if "EntryNotFoundError" in names or not kinds.isdisjoint(_MISSING_CLASSES):
        return True
    return getattr(getattr(error, "response", None), "status_code", None) == 404


def _code(error: BaseException) -> str:
    """The code of botocore's ClientError (``{"Error": {"Code": ..}}``) or of OCI's ServiceError; "" for others."""
    for kind in type(error).__mro__:
        if kind.__name__ == "ClientError":
            response = getattr(error, "response", None)
            found = response.get("Error", {}) if isinstance(response, dict) else {}
            return str(found.get("Code", "")) if isinstance(found, dict) else ""
        if kind.__name__ == "ServiceError":
            return str(getattr(error, "code", ""))
    return ""


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def size_and_hash(bytes_: int, xxh64: str | None) -> Check:
    """Return a check against a size and, if it is known, a hash."""

    def check(path: Path) -> str | None:
        size = path.stat().st_size
        if size != bytes_:
            return f"{size} bytes, expected {bytes_} by index.json"
        found = None if xxh64 is None else file_digest(path, xxhash.xxh64)
        return None if found == xxh64 else f"damaged: its xxh64 is {found}, expected {xxh64} by index.json"

    return check
