"""Everything about a store that is known before a shard is opened, parsed as if an enemy had written it.

``index.json`` decides which files are opened and how their bytes are read. So names must stay inside the folder, sizes
must agree with the disk, columns and encodings must be the ones of the schema (never ``pkl``), and JSON is bounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlscale.data.schema import CODED, Meta, first_problem
from vlscale.errors import VlscaleError
from vlscale.hashing import file_digest

INDEX_NAME = "index.json"
HASH = "xxh64"
MAX_JSON_BYTES = 64 << 20
REBUILD = "build the store again"
"""The cure where a store's content is wrong."""

RESTORE = "restore the file or build the store again"
"""The cure where one file of it is damaged."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", re.ASCII)
_COMPRESSION = re.compile(r"(br|bz2|gz|snappy|zstd)(:[0-9]{1,2})?", re.ASCII)
_ENCODING = re.compile(r"(str|int|json)|ndarray:(float16|float32|int32)(?::([1-9][0-9]{0,7}))?", re.ASCII)
_CODED = re.compile(CODED + r":(lossless|uint8):(float16|float32)", re.ASCII)
AnyMeta = TypeVar("AnyMeta", bound=Meta)


@dataclass(frozen=True)
class Column:
    """One column of a shard.

    Attributes:
        name: its name.
        encoding: as index.json spells it.
        kind: ``str``, ``int``, ``json``, ``ndarray`` or ``coded`` (an array that :mod:`vlscale.data.codec` has coded).
        dtype: element type of an array, coded or not, little-endian; None for other kinds.
        shape: fixed shape of an array; None if it is ragged.
        size: bytes per row, or None where it varies.
    """

    name: str
    encoding: str
    kind: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None
    size: int | None

    @classmethod
    def parse(cls, name: str, encoding: str) -> Column:
        """Read an encoding such as ``ndarray:float16`` or ``ndarray:float32:1601``.

        Raises:
            VlscaleError: the encoding is none that vlscale's stores use.
        """
        coded = _CODED.fullmatch(encoding)
        if coded:
            return cls(name, encoding, "coded", np.dtype(coded[2]).newbyteorder("<"), None, None)
        match = _ENCODING.fullmatch(encoding)
        if not match:
            raise VlscaleError(f"column {name!r} has the encoding {encoding!r}, which is not read here")
        scalar, element, width = match.groups()
        if scalar:
            return cls(name, encoding, scalar, None, None, 8 if scalar == "int" else None)
        dtype = np.dtype(element).newbyteorder("<")
        shape = (int(width),) if width else None
        return cls(name, encoding, "ndarray", dtype, shape, int(width) * dtype.itemsize if width else None)


@dataclass(frozen=True)
class ZipFile:
    """The compressed form of a shard: file name, size in bytes, xxh64 (hex) if recorded, and algorithm (``zstd:3``)."""

    basename: str
    bytes: int
    xxh64: str | None
    algorithm: str


@dataclass(frozen=True)
class ShardFile:
    """One shard as index.json promises it: its name, size in bytes, number of rows, and xxh64 (hex) if recorded.

    ``zip`` is its compressed form, if the store was written with compression.
    """

    basename: str
    bytes: int
    samples: int
    xxh64: str | None
    zip: ZipFile | None = None


@dataclass(frozen=True)
class StoreIndex:
    """A validated index.json.

    Attributes:
        folder: the store's folder.
        columns: in the order in which a row holds them (sorted by name).
        shards: in order.
        digest: sha256 (hex) of the content of index.json in canonical form; it covers the shards' hashes.
        side_files: name -> xxh64 (hex) of meta.json and the arrays beside it; empty if they were not recorded.
    """

    folder: Path
    columns: tuple[Column, ...]
    shards: tuple[ShardFile, ...]
    digest: str
    side_files: Mapping[str, str] = field(default_factory=dict)

    def check_side_files(self) -> None:
        """Compare what stands beside the shards with the recorded hashes; a flipped bit there pairs the wrong rows.

        Raises:
            VlscaleError: a file is missing or differs.
        """
        for name, expected in self.side_files.items():
            path = self.folder / name
            found = file_hash(path)
            if found != expected:
                raise VlscaleError(
                    f"{path}: xxh64 is {found}, {INDEX_NAME} records {expected}: it is damaged or was changed; restore "
                    f"it, delete it if it was fetched (it comes again), or build the store again"
                )

    @property
    def ends(self) -> NDArray[np.int64]:
        """int64 [S+1], cumulative number of rows per shard, from 0."""
        return np.cumsum([0, *(shard.samples for shard in self.shards)], dtype=np.int64)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _File(_Model):
    basename: str
    bytes: int = Field(ge=1, lt=1 << 32)
    hashes: dict[str, str]


class _Shard(_Model):
    version: Literal[2]
    format: Literal["mds"]
    compression: str | None
    zip_data: _File | None
    raw_data: _File
    samples: int = Field(ge=0, lt=1 << 30)
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]


_SideName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+\.(npy|json)$", max_length=80)]
_Xxh64 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class _Index(_Model):
    version: Literal[2]
    shards: list[_Shard]
    side_files: dict[_SideName, _Xxh64] = Field(default_factory=dict, max_length=16)


def read_index(folder: Path, columns: Mapping[str, str], on_disk: bool = True) -> StoreIndex:
    """Read and validate ``folder/index.json``; no shard is opened, but each is looked at on disk.

    Args:
        folder: the store's folder.
        columns: the columns it must have, name -> MDS encoding.
        on_disk: the shards lie in ``folder``, uncompressed; False where they are fetched into it when needed.

    Raises:
        VlscaleError: the index is missing, damaged, of another format, lists other columns, or a shard that is missing,
            of another size, compressed, or outside the folder.
    """
    path = folder / INDEX_NAME
    raw = read_bytes(path)
    try:
        index = _Index.model_validate_json(raw)
        content = json.loads(raw)
    except ValidationError as error:
        raise VlscaleError(f"{path}: {first_problem(error)}; {RESTORE}") from None
    except (ValueError, RecursionError) as error:
        raise VlscaleError(f"{path}: not valid JSON ({error}); {RESTORE}") from None
    expected = tuple(Column.parse(name, columns[name]) for name in sorted(columns))
    seen: set[str] = set()
    for shard in index.shards:
        _check_columns(path, shard, expected)
        _check_shard(path, shard, seen)
        if on_disk:
            _check_on_disk(path, shard)
    shards = tuple(_shard_file(shard) for shard in index.shards)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return StoreIndex(folder, expected, shards, digest, index.side_files)


def record_side_files(folder: Path) -> None:
    """Write the hashes of all files beside the shards into index.json; the last thing that a writer does.

    mosaicml-streaming does not look at the key.
    """
    path = folder / INDEX_NAME
    content = json.loads(path.read_bytes())
    names = sorted(one.name for one in folder.iterdir() if one.suffix in (".npy", ".json") and one.name != INDEX_NAME)
    content["side_files"] = {name: file_hash(folder / name) for name in names}
    path.write_text(json.dumps(content, sort_keys=True), encoding="utf-8")


def file_hash(path: Path) -> str:
    """xxh64 (hex) of a file.

    Raises:
        VlscaleError: it cannot be read.
    """
    try:
        return file_digest(path, xxhash.xxh64)
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); {RESTORE}") from None


def _shard_file(shard: _Shard) -> ShardFile:
    raw, packed = shard.raw_data, shard.zip_data
    zipped = None
    if packed is not None and shard.compression is not None:
        zipped = ZipFile(packed.basename, packed.bytes, packed.hashes.get(HASH), shard.compression)
    return ShardFile(raw.basename, raw.bytes, shard.samples, raw.hashes.get(HASH), zipped)


def _check_columns(path: Path, shard: _Shard, expected: tuple[Column, ...]) -> None:
    where = f"{path}: shard {shard.raw_data.basename!r}"
    if not len(shard.column_names) == len(shard.column_encodings) == len(shard.column_sizes):
        raise VlscaleError(f"{where}: column_names, column_encodings and column_sizes differ in length; {RESTORE}")
    names = [column.name for column in expected]
    if shard.column_names != names:
        raise VlscaleError(f"{where}: columns {shard.column_names}, expected {names}; {RESTORE}")
    for column, encoding, size in zip(expected, shard.column_encodings, shard.column_sizes, strict=True):
        if encoding != column.encoding:
            raise VlscaleError(
                f"{where}: column {column.name!r} has the encoding {encoding!r}, expected {column.encoding!r} "
                f"by the schema and meta.json; build the store again"
            )
        if size != column.size:
            raise VlscaleError(f"{where}: column {column.name!r} has size {size}, expected {column.size}; {RESTORE}")


def _check_shard(path: Path, shard: _Shard, seen: set[str]) -> None:
    files = [shard.raw_data] if shard.zip_data is None else [shard.raw_data, shard.zip_data]
    for name in (file.basename for file in files):
        if not _SHARD_NAME.fullmatch(name):
            raise VlscaleError(f"{path}: shard name {name!r} is not a plain file name inside the folder; {RESTORE}")
        if name in seen:
            raise VlscaleError(f"{path}: shard {name!r} is listed twice; {RESTORE}")
        seen.add(name)
    name = shard.raw_data.basename
    if (shard.compression is None) != (shard.zip_data is None):
        raise VlscaleError(f"{path}: shard {name!r}: compression and zip_data do not go together; {RESTORE}")
    if shard.compression is not None and not _COMPRESSION.fullmatch(shard.compression):
        raise VlscaleError(
            f"{path}: shard {name!r} has the compression {shard.compression!r}, which is not read here; {RESTORE}"
        )
    if 4 * (shard.samples + 2) > shard.raw_data.bytes:
        raise VlscaleError(f"{path}: shard {name!r} cannot hold {shard.samples} rows in its size; {RESTORE}")


def _check_on_disk(path: Path, shard: _Shard) -> None:
    name = shard.raw_data.basename
    if shard.zip_data is not None and not os.path.lexists(path.parent / name):
        raise VlscaleError(
            f"{path.parent / name}: only the compressed {shard.zip_data.basename} is there; set data.cache to a folder "
            f"to decompress into, or decompress the store"
        )
    size = file_size(path.parent / name, "which index.json lists")
    if size != shard.raw_data.bytes:
        raise VlscaleError(
            f"{path.parent / name}: {size} bytes, expected {shard.raw_data.bytes} by index.json; {RESTORE}"
        )


def file_size(path: Path, note: str = "") -> int:
    """Return the size in bytes of a regular file that lies in its folder itself, not behind a link that leaves it.

    Raises:
        VlscaleError: it is missing, not a regular file, or a link to somewhere else.
    """
    try:
        status = path.stat()
        inside = path.resolve(strict=True).parent == path.parent.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        note = f" {note}," if note else ""
        raise VlscaleError(f"{path}:{note} is missing; restore it or build the store again") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise VlscaleError(f"{path}: cannot be read ({error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise VlscaleError(f"{path}: not a regular file; {RESTORE}")
    if not inside:
        raise VlscaleError(f"{path}: a link that leaves its folder; copy the file, or link the whole folder")
    return status.st_size


def read_bytes(path: Path) -> bytes:
    """Return the content of a small file.

    Raises:
        VlscaleError: it is missing, larger than 64 MiB, or cannot be read.
    """
    size = file_size(path)
    if size > MAX_JSON_BYTES:
        raise VlscaleError(f"{path}: {size} bytes, more than {MAX_JSON_BYTES}; {RESTORE}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error})") from None


def read_meta(model: type[AnyMeta], path: Path) -> AnyMeta:
    """Read and validate a meta.json as ``model``.

    Raises:
        VlscaleError: it is missing, not JSON, or a key is missing, unknown or out of range.
    """
    try:
        return model.model_validate_json(read_bytes(path))
    except ValidationError as error:
        raise VlscaleError(f"{path}: {first_problem(error)}; {RESTORE}") from None


def read_array(path: Path, dtype: str, length: int | None = None) -> NDArray[Any]:
    """Memory-map a one-dimensional .npy side file, without pickle.

    Args:
        path: the file.
        dtype: the dtype it must have, for example ``int32``.
        length: the number of elements it must have; None takes any.

    Raises:
        VlscaleError: it is missing, damaged, pickled, or of another dtype or length.
    """
    file_size(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        OSError,
        ValueError,
        EOFError,
        SyntaxError,
        TypeError,
        KeyError,
        OverflowError,
        MemoryError,
        RecursionError,
        tokenize.TokenError,
    ) as error:
        detail = " ".join(str(error).split())[:200]
        raise VlscaleError(f"{path}: not a plain .npy array ({detail}); {RESTORE}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != np.dtype(dtype).newbyteorder("<"):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise VlscaleError(f"{path}: found {found}, expected one dimension of {dtype}; {RESTORE}")
    if length is not None and len(array) != length:
        raise VlscaleError(f"{path}: {len(array)} entries, expected {length}; {RESTORE}")
    return array
