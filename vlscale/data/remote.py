"""Datasets that lie elsewhere: small files are fetched first, shards when they are needed, into a cache on this node.

A root is a URL that mosaicml-streaming can download from (``s3://``, ``gs://``, ``azure://``, ``azure-dl://``,
``oci://``, ``hf://``, ``sftp://``, ``dbfs:/``, ``alipan://``), or a folder: a slow network mount, or one whose shards
are compressed. Its files go to ``CACHE/KEY/{texts,images,classes}``, where KEY is a digest of the index.json and
meta.json that the remote has now. So another dataset, or a newer version of this one, never meets the files of an older
one; those are evicted in time.

Every start of training asks the remote for its indexes again, once per node: what another process has fetched since
this one started is as good as fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from vlscale.config import DataSection
from vlscale.data.cache import ShardCache
from vlscale.data.companion_schema import SIDE_FILES
from vlscale.data.fetch import Fetcher, NotThereError, size_and_hash
from vlscale.data.index import INDEX_NAME, MAX_JSON_BYTES, ShardFile, StoreIndex, read_bytes
from vlscale.data.shard import TOO_MANY, ShardAccessError
from vlscale.errors import VlscaleError
from vlscale.hashing import file_digest

META_NAME = "meta.json"
TOKENIZER_NAME = "tokenizer.json"
SIDE_NAME = "side.json"
STORES: dict[str, tuple[str, ...]] = {
    "texts": ("lengths.npy", "image_ptr.npy", "image_refs.npy"),
    "images": ("lengths.npy",),
    "classes": (),
    **SIDE_FILES,
}
"""Store -> its side files. Each may be missing, but texts or images have to be there."""

_STARTED = time.time()
_opened: dict[str, float] = {}


@dataclass(frozen=True)
class CacheSettings:
    """Where fetched files go, and how they are fetched (``data.cache`` and its neighbours in a recipe).

    Attributes:
        folder: on a local disk of the node; shared by its processes, and by other runs.
        limit: most bytes of shards there; None is no limit.
        retries: further attempts after a failed one.
        timeout_s: seconds without any byte arriving after which an attempt is given up.
    """

    folder: Path
    limit: int | None = None
    retries: int = 2
    timeout_s: float = 60.0

    @classmethod
    def from_section(cls, data: DataSection) -> CacheSettings | None:
        """Read a recipe's settings; None if its data are read where they are."""
        if data.cache is None:
            return None
        return cls(data.cache, data.cache_limit, data.download_retries, data.download_timeout_s)


class CachedFiles:
    """The shards of one store of a remote, in the cache. Cheap to pickle.

    Args:
        index: the store's index; its folder is the store's place in the cache.
        source: the store at the remote.
        cache: the cache.
        fetcher: how files are fetched.
    """

    def __init__(self, index: StoreIndex, source: Path | str, cache: ShardCache, fetcher: Fetcher) -> None:
        self.index, self.source, self.cache, self.fetcher = index, source, cache, fetcher

    @property
    def map_bytes(self) -> int | None:
        """Most bytes that all readers of a process keep mapped: half of the cache, which holds what a window needs."""
        return None if self.cache.limit is None else self.cache.limit // 2

    @property
    def pool(self) -> Hashable:
        """The cache's folder: all stores in it share ``map_bytes``."""
        return self.cache.folder

    def place(self, number: int) -> Path:
        """Where shard ``number`` is, or would be."""
        return self.index.folder / self.index.shards[number].basename

    def path(self, number: int) -> Path:
        """Return shard ``number``'s path, after fetching it if it is not there.

        Raises:
            VlscaleError: it cannot be fetched, or comes damaged each time.
        """
        self.prefetch(number)
        return self.place(number)

    def prefetch(self, number: int, keep: Collection[Path] = ()) -> bool:
        """Have shard ``number`` in the cache. False: there is no room for it beside ``keep``.

        Raises:
            VlscaleError: see :meth:`path`.
        """
        file = self.index.shards[number]
        fetch = partial(self._fetch, file)
        try:
            return self.cache.get(self.place(number), file.bytes, disk_bytes(file), fetch, keep)
        except OSError as error:
            if error.errno in TOO_MANY:
                raise ShardAccessError.of(f"{self.place(number)}: cannot be opened", error) from None
            raise VlscaleError(
                f"data.cache {self.cache.folder}: {file.basename} cannot be placed there ({error.strerror or error}); "
                f"free space, or set data.cache to another folder"
            ) from None

    def present(self, number: int, inode: int) -> bool:
        """Is the file that was opened as shard ``number`` still the one in the cache?"""
        try:
            return self.place(number).lstat().st_ino == inode
        except OSError:
            return False

    def repair(self, number: int, inode: int) -> bool:
        """Forget a file that proved damaged, so that :meth:`path` fetches it again."""
        self.cache.discard(self.place(number), inode)
        return True

    def _fetch(self, file: ShardFile, target: Path) -> None:
        make_room = partial(self.cache.free, disk_bytes(file))
        if file.zip is None:
            check = size_and_hash(file.bytes, file.xxh64)
            self.fetcher.fetch(_join(self.source, file.basename), target, file.bytes, check, make_room)
            return
        packed = target.with_name(file.zip.basename)
        check = partial(_unpack, file, target)
        self.fetcher.fetch(_join(self.source, file.zip.basename), packed, file.zip.bytes, check, make_room)
        packed.unlink()


def disk_bytes(file: ShardFile) -> int:
    """Most bytes that a shard needs on disk while it is fetched."""
    return file.bytes + (file.zip.bytes if file.zip else 0)


def _unpack(file: ShardFile, target: Path, packed: Path) -> str | None:
    """Check a compressed shard and decompress it to ``target``."""
    from vlscale.data.mds import decompress

    assert file.zip is not None
    problem = size_and_hash(file.zip.bytes, file.zip.xxh64)(packed)
    if problem:
        return problem
    try:
        target.write_bytes(decompress(file.zip.algorithm, packed.read_bytes(), file.bytes))
    except ValueError as error:
        return f"cannot be decompressed: {error}"
    return size_and_hash(file.bytes, file.xxh64)(target)


@dataclass(frozen=True)
class CachedRoot:
    """A remote dataset whose small files are here.

    Attributes:
        source: its root.
        folder: its place in the cache.
        cache, fetcher: for its shards.
    """

    source: Path | str
    folder: Path
    cache: ShardCache
    fetcher: Fetcher

    def files(self, store: str, index: StoreIndex) -> CachedFiles:
        """Return the shards of a store."""
        return CachedFiles(index, _join(self.source, store), self.cache, self.fetcher)


def open_root(root: Path | str, settings: CacheSettings) -> CachedRoot:
    """Fetch the small files of a dataset, unless another process of this node just has.

    Raises:
        VlscaleError: the remote does not answer, lacks a file, or the cache's folder cannot be used.
    """
    cache = ShardCache(settings.folder, settings.limit)
    fetcher = Fetcher(settings.retries, settings.timeout_s)
    name = hashlib.sha256(str(root).encode()).hexdigest()[:24]
    stamp = cache.folder / f"root-{name}.json"
    with _no_os_errors(cache), cache.lock(f"root-{name}"):
        key = _fresh(stamp, max(_STARTED, _opened.get(name, 0.0)))
        if key is None or not (cache.folder / key).is_dir():
            for left in cache.folder.glob(f"new-{name}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f"new-{name}-", dir=cache.folder))
            part.chmod(0o755)
            try:
                key = _refresh(root, part, fetcher)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            _write(stamp, json.dumps({"key": key, "at": time.time()}).encode())
        _opened[name] = time.time()
    return CachedRoot(root, cache.folder / key, cache, fetcher)


@contextmanager
def _no_os_errors(cache: ShardCache) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VlscaleError(
            f"data.cache {cache.folder}: cannot be written ({error.strerror or error}); free space, or set data.cache "
            f"to another folder"
        ) from None


def _fresh(stamp: Path, since: float) -> str | None:
    """The key that a process has found at the remote, if that was after ``since``."""
    try:
        found = json.loads(stamp.read_text())
        key, at = str(found["key"]), float(found["at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if at >= since and key.isalnum() else None


def _refresh(root: Path | str, part: Path, fetcher: Fetcher) -> str:
    """Ask the remote for its indexes, and fetch the side files that go with them if they are not here yet.

    Returns:
        The key: the name of the dataset's folder beside ``part``.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(len(STORES)) as pool:  # what is not there is asked for twice, with a pause
        found = pool.map(lambda store: _fetch_index(root, store, part / store, fetcher), STORES)
        missing = {store: error for store, error in zip(STORES, found, strict=True) if error is not None}
    if "texts" in missing and "images" in missing:
        raise missing["images"]
    stores = [store for store in STORES if store not in missing]
    for store in stores:
        for name in (INDEX_NAME, META_NAME):
            digest.update(f"{store}/{name}\n".encode() + hashlib.sha256((part / store / name).read_bytes()).digest())
    key = digest.hexdigest()[:24]
    place = part.with_name(key)
    for store in stores:
        _side_files(root, store, part, place, fetcher)
    if not place.is_dir():
        os.rename(part, place)
    return key


def _fetch_index(root: Path | str, store: str, folder: Path, fetcher: Fetcher) -> NotThereError | None:
    """Fetch index.json and meta.json of a store into ``folder``; says so if there is no such store."""
    folder.mkdir()
    try:
        for name in (INDEX_NAME, META_NAME):
            fetcher.fetch(_join(root, f"{store}/{name}"), folder / name, MAX_JSON_BYTES, optional=name == INDEX_NAME)
    except NotThereError as error:
        if any(folder.iterdir()):
            raise
        folder.rmdir()
        return error
    return None


def _side_files(root: Path | str, store: str, part: Path, place: Path, fetcher: Fetcher) -> None:
    """Complete ``place/store``, or ``part/store`` if there is no ``place`` yet; replace changed files."""
    folder = part / store
    if place.is_dir():
        (place / store).mkdir(exist_ok=True)
        for name in (INDEX_NAME, META_NAME):
            os.replace(folder / name, place / store / name)
        folder = place / store
    known = _known(folder)
    names = [*STORES[store], *([TOKENIZER_NAME] if store == "texts" else [])]
    for name in names:
        target = folder / name
        if name in known and known[name] == _identity(target):
            continue
        try:
            most = MAX_JSON_BYTES if name == TOKENIZER_NAME else _most(folder)
            fetcher.fetch(_join(root, f"{store}/{name}"), target, most, optional=name == TOKENIZER_NAME)
        except NotThereError:
            if name != TOKENIZER_NAME:
                raise
        known[name] = _identity(target)
    _write(folder / SIDE_NAME, json.dumps(known).encode())


def _known(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / SIDE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _identity(path: Path) -> str | None:
    """Size and hash of a file; None if there is none."""
    return f"{path.stat().st_size} {file_digest(path, xxhash.xxh64)}" if path.is_file() else None


def _most(folder: Path) -> int:
    """Most bytes of a side file: eight for each byte of the shards is more than any row's share."""
    try:
        shards = json.loads(read_bytes(folder / INDEX_NAME))["shards"]
        total = sum(int(shard["raw_data"]["bytes"]) for shard in shards)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        total = 0  # read_index says what is wrong with it
    return MAX_JSON_BYTES + 8 * max(total, 0)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _join(root: Path | str, name: str) -> Path | str:
    return root / name if isinstance(root, Path) else f"{root.rstrip('/')}/{name}"
