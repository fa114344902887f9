"""The edge to mosaicml-streaming: the one module that imports it, and only when something is written or fetched.

Reading needs none of it: see ``shard.py`` and ``reader.py``. What is fetched from a remote goes through streaming's own
downloaders (S3, GCS, Azure, OCI, Hugging Face, SFTP, Databricks, Alipan), which read credentials from the environment
as streaming documents. They are tested here up to the point where they would open a connection, not against a cloud.
"""

from __future__ import annotations

import bz2
import gzip
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import xxhash

from vlscale.data.codec import decode_into, encode, shape_of
from vlscale.data.index import HASH
from vlscale.data.schema import CODED
from vlscale.errors import VlscaleError

if TYPE_CHECKING:
    from streaming import MDSWriter as _Base
else:
    _Base = object  # streaming is imported late: open_writer puts its MDSWriter beneath these classes

MAX_SHARD_BYTES = 1 << 31


def open_writer(folder: Path, columns: Mapping[str, str], shard_bytes: int, compression: str | None = None) -> Any:
    """Return a ``streaming.MDSWriter`` into ``folder``: shards of about ``shard_bytes``, xxh64 hashes.

    Args:
        folder: is made.
        columns: name -> MDS encoding.
        shard_bytes: uncompressed.
        compression: of whole shards, as streaming spells it (``zstd:3``), for stores that are read from afar.

    Raises:
        VlscaleError: mosaicml-streaming is not installed, ``shard_bytes`` is out of range, or there is no such
            compression.
    """
    if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
        raise VlscaleError(f"{folder}: shard_bytes is {shard_bytes}, expected 1..{MAX_SHARD_BYTES}")
    try:
        from streaming import MDSWriter
        from streaming.base.format.mds.encodings import mds_encode
    except ImportError as error:
        raise VlscaleError(
            f"{folder}: writing needs mosaicml-streaming ({error}); pip install 'vlscale[train]'"
        ) from None

    register_encodings()

    changed = _Writer if compression is None else _PlainWriter
    kind: Any = type("Writer", (changed, MDSWriter), {"encode_value": staticmethod(mds_encode)})
    try:
        return kind(
            out=str(folder),
            columns=dict(columns),
            compression=compression,
            hashes=[HASH],
            size_limit=shard_bytes,
        )
    except ValueError as error:
        raise VlscaleError(f"{folder}: compression {compression!r}: {' '.join(str(error).split())}") from None


class _PlainWriter(_Base):
    """What every writer changes: whole rows as bytes, shards that end early, and no empty shard before a large row."""

    def flush_shard(self) -> None:
        """Write the shard that is under way, unless it has no rows: one row may be larger than a shard."""
        if self.new_samples:
            super().flush_shard()

    def end_shard(self, least: int) -> None:
        """Begin a new shard, if this one has ``least`` bytes."""
        if self.new_shard_size >= least:
            self.flush_shard()
            self._reset_cache()

    def write_encoded(self, rows: Sequence[bytes | memoryview]) -> None:
        """Append rows of one column of fixed size, whose bytes are their encoding."""
        for row in rows:
            size = len(row) + self.extra_bytes_per_sample
            if self.size_limit and self.size_limit < self.new_shard_size + size:
                self.flush_shard()
                self._reset_cache()
            self.new_samples.append(row)  # type: ignore[arg-type]  # written as it is
            self.new_shard_size += size


class _Writer(_PlainWriter):
    """Writes the same bytes with fewer copies of them; streaming's compression needs them in one piece.

    Attributes:
        encode_value: streaming's ``mds_encode``: encoding and value to bytes.
    """

    encode_value: Callable[[str, Any], bytes]

    def encode_sample(self, sample: dict[str, Any]) -> bytes:
        """Encode a row: uint32 sizes of the columns that vary, then the columns.

        Raises:
            KeyError: a column is missing, or not of its fixed size.
        """
        pieces: list[Any] = []
        sizes: list[int] = []
        for name, encoding, fixed in zip(self.column_names, self.column_encodings, self.column_sizes, strict=True):
            piece = _array(encoding, sample[name]) or [self.encode_value(encoding, sample[name])]
            size = sum(map(len, piece))
            if fixed is None:
                sizes.append(size)
            elif size != fixed:
                raise KeyError(f"column {name} has {size} bytes, expected {fixed}")
            pieces += piece
        return b"".join([np.array(sizes, np.uint32).tobytes(), *pieces])

    def encode_joint_shard(self) -> Any:
        """Return the pieces of a shard, in order: number of rows and offsets, configuration, rows."""
        offsets = np.cumsum([0, *map(len, self.new_samples)]) + 4 * (len(self.new_samples) + 2)
        head = np.array([len(self.new_samples), *(offsets + len(self.config_data))], np.uint32)
        return [head.tobytes(), self.config_data, *self.new_samples]

    def _process_file(self, raw_data: Any, raw_basename: str, zip_basename: str | None) -> tuple[Any, Any]:
        digest = xxhash.xxh64()
        with Path(self.local, raw_basename).open("wb") as file:
            for piece in raw_data:
                digest.update(piece)
                file.write(piece)
            size = file.tell()
        return {"basename": raw_basename, "bytes": size, "hashes": {HASH: digest.hexdigest()}}, None


def register_encodings() -> None:
    """Teach mosaicml-streaming the encoding of coded features, so that a plain StreamingDataset decodes our rows."""
    from streaming.base.format.mds import encodings

    class CodedFeatures(encodings.Encoding):
        """``vlscale_features:<codec>:<dtype>``; see :mod:`vlscale.data.codec`."""

        def __init__(self, codec: str, dtype: str) -> None:
            self.codec, self.dtype = codec, np.dtype(dtype).newbyteorder("<")

        @classmethod
        def from_str(cls, config: str) -> CodedFeatures:
            """Read ``<codec>:<dtype>``."""
            codec, _, dtype = config.partition(":")
            return cls(codec, dtype)

        def encode(self, obj: Any) -> bytes:
            """Code features [R, D]."""
            return encode(self.codec, np.asarray(obj, self.dtype))

        def decode(self, data: bytes) -> Any:
            """Return the features [R, D] that ``data`` codes."""
            blob = np.frombuffer(data, np.uint8)
            found: Any = np.empty(shape_of(blob), self.dtype)
            decode_into(self.codec, blob, found)
            return found

    known: dict[str, Any] = encodings._encodings
    known.setdefault(CODED, CodedFeatures)


def _array(encoding: str, value: Any) -> list[Any] | None:
    """An array in streaming's encoding, its values uncopied; None leaves the value, or its fault, to streaming."""
    known = _array_type(encoding)
    if known is None or not isinstance(value, np.ndarray) or value.dtype != known[0]:
        return None
    if not (value.size and value.ndim and value.dtype.isnative and value.flags.c_contiguous):
        return None
    data = value.reshape(-1).view(np.uint8).data
    if known[1] is not None:
        return [data] if value.shape == (known[1],) else None
    width = next(width for width in range(4) if max(value.shape) < 1 << (8 << width))
    return [bytes([value.ndim << 2 | width]) + np.array(value.shape, f"<u{1 << width}").tobytes(), data]


@cache
def _array_type(encoding: str) -> tuple[np.dtype[Any], int | None] | None:
    """dtype and fixed length of ``ndarray:float16`` or ``ndarray:float16:1601``; None for other encodings."""
    kind, _, rest = encoding.partition(":")
    name, _, length = rest.partition(":")
    if kind != "ndarray" or name not in ("float16", "float32", "int32") or not (length.isdigit() or not length):
        return None
    return np.dtype(name), int(length) if length else None


_idle: dict[tuple[str, str], list[Any]] = {}
"""Downloaders that are not in use, with their open connections, by scheme and host."""


def download(url: str, target: Path, timeout_s: float) -> None:
    """Download one file with streaming's downloader for the URL's scheme.

    Args:
        url: the file.
        target: where it goes; must not exist. The folder may also receive the downloader's temporary files.
        timeout_s: handed to the downloader; not all of them heed it.

    Raises:
        VlscaleError: no downloader is known for the scheme, or it cannot be imported.
        Exception: whatever the downloader raises; they have no common base.
    """
    parts = urlsplit(url)
    idle = _idle.setdefault((parts.scheme, parts.netloc), [])
    try:
        downloader = idle.pop()
    except IndexError:
        downloader = _downloader(url)
    downloader.download(url, str(target), timeout_s)
    idle.append(downloader)  # only after success: a connection that failed is not used again


def _downloader(url: str) -> Any:
    scheme = urlsplit(url).scheme
    try:
        from streaming.base.storage import download as theirs
    except ImportError as error:
        raise VlscaleError(
            f"{scheme}://...: fetching needs mosaicml-streaming ({error}); pip install 'vlscale[train]'"
        ) from None
    try:
        return theirs.CloudDownloader.get(url)
    except ValueError:
        known = ", ".join(sorted(name for name in theirs.DOWNLOADER_MAPPINGS if name))
        raise VlscaleError(f"{scheme}://...: no downloader is known for this scheme (known: {known})") from None
    except ImportError as error:
        raise VlscaleError(
            f"{scheme}://...: a package is missing ({error}); pip install 'mosaicml-streaming[all]'"
        ) from None


def decompress(algorithm: str, data: bytes, size: int) -> bytes:
    """Decompress a shard whose size is known beforehand; never allocates much more than that.

    Args:
        algorithm: as index.json spells it, for example ``zstd:3``.
        data: the compressed bytes.
        size: bytes that have to come out.

    Raises:
        ValueError: the data are damaged, or more or fewer bytes come out.
        VlscaleError: streaming, which knows the algorithms, is not installed.
    """
    family = algorithm.partition(":")[0]
    try:
        if family == "gz":
            found = gzip.GzipFile(fileobj=io.BytesIO(data)).read(size + 1)
        elif family == "bz2":
            found = bz2.BZ2File(io.BytesIO(data)).read(size + 1)
        else:
            _require_promise(family, data, size)
            found = _streaming_decompress(family, data, size)
    except (VlscaleError, MemoryError):
        raise
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"not valid {family} ({' '.join(str(error).split())[:100]})") from None
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes come out of {family}, expected {size}")
    return found


def _streaming_decompress(family: str, data: bytes, size: int) -> bytes:
    try:
        from streaming.base.compression import decompress as theirs
    except ImportError as error:
        raise VlscaleError(
            f"decompressing {family} needs mosaicml-streaming ({error}); pip install 'vlscale[train]'"
        ) from None
    if family == "br":
        import brotli

        stream = brotli.Decompressor()
        found = stream.process(data, output_buffer_limit=size + 1)
        while len(found) <= size and not stream.is_finished():
            more = stream.process(b"", output_buffer_limit=size + 1 - len(found))
            if not more:
                break
            found += more
        return bytes(found)
    return bytes(theirs(family, data))


def _require_promise(family: str, data: bytes, size: int) -> None:
    """The size that a zstd or snappy header promises is allocated unseen: it has to be the right one."""
    if family == "zstd":
        if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
            raise ValueError("no zstd frame")
        flags = data[4]
        single, width = bool(flags & 32), (0, 2, 4, 8)[flags >> 6]
        width = width or int(single)
        at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
        promised = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
        if not width:
            raise ValueError("the frame does not say its size")
    elif family == "snappy":
        promised = sum((byte & 127) << 7 * place for place, byte in enumerate(_varint(data)))
    else:
        return
    if promised != size:
        raise ValueError(f"it promises {promised} bytes")


def _varint(data: bytes) -> bytes:
    for end, byte in enumerate(data[:5], 1):
        if byte < 128:
            return data[:end]
    raise ValueError("no length")
