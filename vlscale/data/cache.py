"""A folder of fetched shards that all processes of a node share and keep under a limit of bytes.

No process is in charge, and nothing is believed that a killed process may have left:

- ``KEY/STORE/shard.00000.mds`` is whole: it was fetched into a folder beside it, checked, and renamed.
- ``KEY/STORE/.part-NAME-SIZE-xxxx/`` is being fetched. Who fetches holds ``.locks/...`` (``flock``: the kernel lets go
  when the process ends); where nobody holds the lock, the folder is rubbish and is swept. SIZE is room already taken.
- Room is made under one lock for the whole cache: the shards used longest ago go first, by their modification time,
  which is set anew at each use. A shard that goes while a process has it mapped stays readable for that process, and
  its bytes on disk are free once the map is closed.
- So a process that reads closes evicted shards at each map and every half second (:mod:`vlscale.data.reader`). One that
  reads nothing any more may hold up to half of the limit beside it, all its stores together.

The limit counts shards. Indexes and side files (some bytes per row) come on top. The folder has to be on a file system
of this node that knows ``flock``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlscale.errors import VlscaleError

if TYPE_CHECKING:
    from filelock import BaseFileLock

MARKER = "vlscale-cache"
LOCKS = ".locks"
_PART = re.compile(r"\.part-(.+)-([0-9]{1,12})-[a-z0-9_]+", re.ASCII)
_SUFFIX = ".mds"


@dataclass(frozen=True)
class _Found:
    """A whole shard in the cache."""

    path: Path
    bytes: int
    used_ns: int


class ShardCache:
    """The cache in ``folder``; cheap to pickle, and every process or thread may use its own or share one.

    Args:
        folder: made if it is not there; a folder that holds anything else is refused.
        limit: most bytes of shards; None is no limit.

    Raises:
        VlscaleError: the folder cannot be made or written, or holds other things.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder = folder.resolve()
        self.limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock("folder"):
                if not (self.folder / MARKER).exists():
                    foreign = sorted(entry.name for entry in os.scandir(self.folder) if entry.name != LOCKS)
                    if foreign:
                        raise VlscaleError(
                            f"data.cache {folder}: holds {foreign[0]!r}, which is no part of a cache; give an empty "
                            f"folder, because files are deleted there"
                        )
                    (self.folder / MARKER).write_text("shards fetched by vlscale; may be deleted between runs\n")
        except OSError as error:
            raise VlscaleError(f"data.cache {folder}: cannot be used ({error.strerror or error})") from None

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold one of the cache's locks; other processes, and other threads, wait."""
        with self._file_lock(name):
            yield

    def _file_lock(self, name: str) -> BaseFileLock:
        from filelock import FileLock

        folder = self.folder / LOCKS
        folder.mkdir(exist_ok=True)
        return FileLock(folder / f"{name}.lock", thread_local=False)

    def _lock_name(self, path: Path) -> str:
        return str(path.relative_to(self.folder)).replace("/", "--")

    def use(self, path: Path, size: int) -> bool:
        """Is the shard ``path`` there, with its size? If so it counts as used just now."""
        try:
            status = path.lstat()
            if status.st_size != size:
                return False
            os.utime(path)
        except OSError:
            return False
        return True

    def get(self, path: Path, size: int, room: int, fetch: Callable[[Path], None], keep: Collection[Path] = ()) -> bool:
        """Have the shard ``path`` there, fetching it if it is not.

        Args:
            path: where it belongs.
            size: its size in bytes.
            room: most bytes on disk while it is fetched.
            fetch: called with the path to write; what it leaves there must be checked already.
            keep: shards that may not make room for it, if they must not at all; then nothing is fetched.

        Returns:
            False if there is no room beside ``keep``.

        Raises:
            VlscaleError: what ``fetch`` raises; the shard alone is larger than the limit.
        """
        if self.use(path, size):
            return True
        with self.lock(self._lock_name(path)):
            if self.use(path, size):  # somebody else has fetched it meanwhile
                return True
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = self._reserve(path, room, keep)
            if part is None:
                return False
            try:
                fetch(part / path.name)
                with self.lock("space"):  # who counts must see the shard either under way or whole
                    os.replace(part / path.name, path)
                    shutil.rmtree(part, ignore_errors=True)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return True

    def discard(self, path: Path, inode: int) -> None:
        """Remove a damaged shard, unless it has been replaced since it was seen."""
        with self.lock(self._lock_name(path)), contextlib.suppress(OSError):
            if path.lstat().st_ino == inode:
                path.unlink()

    def _reserve(self, path: Path, room: int, keep: Collection[Path]) -> Path | None:
        """Make room and return the folder to fetch into; the lock of ``path`` is held."""
        if self.limit is not None and room > self.limit:
            raise VlscaleError(
                f"data.cache_limit {self.limit} bytes is less than {path.name} alone needs, {room} bytes; raise it"
            )
        with self.lock("space"):
            for old in path.parent.glob(f".part-{path.name}-*"):
                shutil.rmtree(old, ignore_errors=True)
            if self.limit is not None and not self._make_room(room, self.limit, frozenset(keep)):
                return None
            return Path(tempfile.mkdtemp(prefix=f".part-{path.name}-{room}-", dir=path.parent))

    def _make_room(self, room: int, limit: int, keep: frozenset[Path]) -> bool:
        for path in keep:  # what is needed soon is not what was used longest ago, for other processes either
            with contextlib.suppress(OSError):
                os.utime(path)
        shards, taken = self._survey()
        free = limit - taken - sum(shard.bytes for shard in shards)
        going = []
        for shard in sorted(shards, key=lambda shard: shard.used_ns):
            if free >= room:
                break
            if shard.path not in keep:
                going.append(shard.path)
                free += shard.bytes
        # Readers must go on, even if other fetches hold the room for a moment; whoever reads ahead can wait.
        if free < room and keep:
            return False
        for path in going:
            with contextlib.suppress(OSError):
                path.unlink()
        return True

    def free(self, bytes_: int) -> None:
        """Evict shards used longest ago until about ``bytes_`` are free, because the disk is full."""
        with self.lock("space"):
            shards, _ = self._survey()
            for shard in sorted(shards, key=lambda shard: shard.used_ns):
                if bytes_ <= 0:
                    break
                with contextlib.suppress(OSError):
                    shard.path.unlink()
                bytes_ -= shard.bytes

    def size(self) -> int:
        """Bytes of whole shards in the cache."""
        return sum(shard.bytes for shard in self._survey()[0])

    def _survey(self) -> tuple[list[_Found], int]:
        """All whole shards, and the bytes that fetches under way may still take. Sweeps what killed processes left."""
        shards: list[_Found] = []
        taken = 0
        for store in self.folder.glob("*/*/"):
            if store.parent.name == LOCKS:
                continue
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(store):
                    part = _PART.fullmatch(entry.name)
                    if part:
                        taken += self._part_bytes(Path(entry.path), store / part[1], int(part[2]))
                    elif entry.name.endswith(_SUFFIX):
                        with contextlib.suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            shards.append(_Found(Path(entry.path), status.st_size, status.st_mtime_ns))
        return shards, taken

    def _part_bytes(self, part: Path, target: Path, size: int) -> int:
        from filelock import Timeout

        lock = self._file_lock(self._lock_name(target))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return size
        try:
            shutil.rmtree(part, ignore_errors=True)
        finally:
            lock.release()
        return 0
