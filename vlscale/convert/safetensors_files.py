"""safetensors: one file, or a folder of shards with an index, read by our own parser and written tensor by tensor.

A file is a little-endian u64 N, N bytes of JSON (name -> dtype, shape, data_offsets; ``__metadata__``: strings), then
the elements without holes (https://github.com/huggingface/safetensors#format). The header is checked whole before any
element is read. Shards and their index follow huggingface_hub's ``split_torch_state_dict_into_shards``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.convert.byte_files import ByteFile, FreshFiles, Stamp, write_tensor
from vlscale.convert.source import TensorInfo, check_tensor
from vlscale.errors import VlscaleError
from vlscale.models.shards import read_index
from vlscale.untrusted import MOST_TENSORS, check_count, is_sane_name, shown, strict_json

FORMAT = "safetensors"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MOST_HEADER = 100_000_000
"""Bytes: the format's own limit."""
# The rank by which the format's own writer sorts a file, last ones first: so wide elements lie aligned.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""Element types that are read and written."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class _Place:
    path: Path
    stamp: Stamp
    begin: int


@dataclass(frozen=True)
class _Header:
    tensors: dict[str, tuple[TensorInfo, _Place]]
    metadata: dict[str, str]


class SafetensorsSource:
    """A :class:`vlscale.convert.source.TensorSource`.

    ``extra`` holds ``metadata`` (of the file; of shards the union, the first shard's word counts) and, for shards,
    ``index_metadata``. Files are opened for each tensor anew, so that many shards need no more than one handle.
    """

    format = FORMAT
    aliases: Mapping[str, str] = {}

    def __init__(self, path: Path, files: tuple[Path, ...], headers: Sequence[_Header], extra: dict[str, Any]) -> None:
        self.path = path
        self.files = files
        self._places = {name: place for header in headers for name, (_, place) in header.tensors.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for header in headers for name, (info, _) in header.tensors.items()
        }
        union: dict[str, str] = {}
        for header in headers:
            union = {**header.metadata, **union}
        self.extra: Mapping[str, Any] = {"metadata": union, **extra}

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; only its own bytes are read.

        Raises:
            VlscaleError: the file is damaged, or has been changed since it was opened.
        """
        place = self._places[name]
        with ByteFile(place.path, expected=place.stamp) as file:
            return file.tensor(f"{place.path}: tensor {shown(name)}", self.tensors[name], place.begin)

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing stays open between reads."""


def recognise(path: Path) -> bool:
    """Say whether ``path`` is a safetensors file, an index of shards, or a folder that holds one as usual."""
    if path.is_dir():
        return any(recognise(path / name) for name in (INDEX_FILE, WEIGHTS_FILE))
    try:
        with ByteFile(path) as file:
            if path.name == INDEX_FILE and file.size <= MOST_HEADER:
                return b'"weight_map"' in file.read(str(path), 0, file.size)
            head = file.read(str(path), 0, min(9, file.size))
    except VlscaleError:
        return False
    return len(head) == 9 and int.from_bytes(head[:8], "little") <= min(MOST_HEADER, file.size - 8) and head[8:] == b"{"


def open_source(path: Path) -> SafetensorsSource:
    """Read the header of a file, or the index and all headers of a folder (or of its index file).

    Raises:
        VlscaleError: what cannot be read, lies, names files outside the folder, or holds both forms at once.
    """
    if path.is_dir():
        both = [path / name for name in (INDEX_FILE, WEIGHTS_FILE) if (path / name).is_file()]
        if len(both) != 1:
            found = "both" if both else "neither"
            raise VlscaleError(f"{path}: holds {found} of {INDEX_FILE} and {WEIGHTS_FILE}; name the file that you mean")
        inside = both[0]
    else:
        inside = path
    if inside.name == INDEX_FILE:
        return _open_shards(path, inside)
    return SafetensorsSource(path, (inside,), [_read_header(inside)], {})


def _open_shards(path: Path, file: Path) -> SafetensorsSource:
    index = read_index(file, ".safetensors")
    headers = []
    for shard in index.files:
        header = _read_header(shard)
        index.check_shard(shard, header.tensors)
        headers.append(header)
    return SafetensorsSource(path, (file, *index.files), headers, {"index_metadata": index.metadata})


def _read_header(path: Path) -> _Header:
    with ByteFile(path) as file:
        if file.size < 8:
            raise VlscaleError(f"{path}: has {file.size} bytes, too few for a safetensors file; fetch it again")
        length = int.from_bytes(file.read(str(path), 0, 8), "little")
        if length > min(MOST_HEADER, file.size - 8):
            raise VlscaleError(
                f"{path}: claims a header of {length} bytes, expected at most {MOST_HEADER} and within its {file.size} "
                "bytes; it is truncated, or no safetensors file"
            )
        raw = file.read(str(path), 8, length)
    if not raw.startswith(b"{"):
        raise VlscaleError(f"{path}: its header does not begin with '{{'; it is damaged, or no safetensors file")
    # One object around, one for the metadata, one for each tensor.
    entries = strict_json(f"{path}: header", raw, MOST_TENSORS + 2)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not _are_strings(metadata):
        raise VlscaleError(f"{path}: its __metadata__ is no object of strings; the file is damaged")
    check_count(path, len(entries))
    begin = 8 + length
    claims = {name: _claim(f"{path}: tensor {shown(name)}", name, entry) for name, entry in entries.items()}
    ordered = sorted(claims, key=lambda name: claims[name][1:])
    _check_order(path, [(name, *claims[name][1:]) for name in ordered], file.size - begin)
    places = {name: (claims[name][0], _Place(path, file.stamp, begin + claims[name][1])) for name in ordered}
    return _Header(places, metadata)


def _claim(where: str, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Check what a header says of one tensor by itself; returns what it is, and its bytes from and to."""
    if not is_sane_name(name):
        raise VlscaleError(f"{where}: is no name of a tensor; the file is damaged or hostile")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise VlscaleError(f"{where}: expected dtype, shape and data_offsets and nothing else; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype.startswith("F8"):
        raise VlscaleError(f"{where}: is {shown(dtype)}, which means nothing without its scales; store it as BF16")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise VlscaleError(f"{where}: its dtype is {shown(str(dtype))}, expected one of {', '.join(DTYPES)}")
    if not _is_numbers(shape):
        raise VlscaleError(f"{where}: its shape is {shown(str(shape)[:200])}, expected a list of sizes; it is damaged")
    if not _is_numbers(offsets) or len(offsets) != 2:
        raise VlscaleError(f"{where}: its data_offsets are {shown(str(offsets)[:200])}, expected [begin, end]")
    info = check_tensor(where, DTYPES[dtype], tuple(shape))
    begin, end = offsets
    if begin < 0 or end - begin != info.nbytes:
        raise VlscaleError(
            f"{where}: is {dtype} {list(shape)}, {info.nbytes} bytes, but lies at {str(offsets)[:80]}; the header lies"
        )
    return info, begin, end


def _are_strings(metadata: Mapping[str, Any]) -> bool:
    """Also say no to lone surrogates, which JSON can escape and UTF-8 cannot write."""
    parts = [*metadata, *metadata.values()]
    return all(isinstance(part, str) and not _SURROGATE.search(part) for part in parts)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int for part in value)


def _check_order(path: Path, spans: list[tuple[str, int, int]], room: int) -> None:
    """Refuse holes and overlaps: ``spans`` (name, begin, end), sorted, must cover the bytes after the header."""
    position = 0
    for name, begin, end in spans:
        if begin != position:
            kind = "overlaps the one before" if begin < position else "leaves a hole before it"
            raise VlscaleError(
                f"{path}: tensor {shown(name)}: {kind}: begins at byte {begin}, expected {position}; the header lies"
            )
        position = end
    if position != room:
        raise VlscaleError(
            f"{path}: its tensors need {position} bytes after the header, the file has {room}; fetch it again"
        )


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, TensorInfo]],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Write ``model.safetensors``, or shards and their index where it would exceed ``max_shard_bytes``.

    Args:
        folder: made if it is missing; files that it holds are not replaced.
        tensors: names and what :data:`read` will return, in the order in which they fill the shards.
        read: called once for each name; one tensor is held at a time.
        max_shard_bytes: of elements; a larger tensor gets a file of its own.
        metadata: strings for the header, ``{"format": "pt"}`` by default, which transformers asks for.

    Returns:
        The files written; the index last.

    Raises:
        VlscaleError: a name or a type that the format cannot hold, a file exists, or the disk refused; whatever has
            been written is deleted then.
        ValueError: a name comes twice, or :data:`read` returns something else than promised.
    """
    listed: dict[str, TensorInfo] = {}
    for name, info in tensors:
        if name in listed:
            raise ValueError(f"{name}: given twice")
        if not is_sane_name(name) or name == "__metadata__":
            raise VlscaleError(f"{folder}: {shown(name)} cannot be the name of a tensor; rename it")
        if info.dtype not in _NAMES:
            raise VlscaleError(f"{folder}: tensor {shown(name)}: {info.dtype} cannot be stored; cast it with --dtype")
        listed[name] = info
    if not _are_strings(metadata or {}):
        raise VlscaleError(f"{folder}: metadata must be strings of valid Unicode; leave out what is not")
    shards = _shards(listed, max_shard_bytes)
    count = len(shards)
    files = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with FreshFiles(folder) as fresh:
        for file, names in zip(files, shards, strict=True):
            with fresh.create(file) as stream:
                ordered = sorted(names, key=lambda name: (-_RANK[listed[name].dtype], name))
                stream.write(_header({name: listed[name] for name in ordered}, metadata or {"format": "pt"}))
                for name in ordered:
                    write_tensor(stream, name, read(name), listed[name])
        if count > 1:
            with fresh.create(INDEX_FILE) as stream:
                stream.write(_index(listed, dict(zip(files, shards, strict=True))))
    return tuple(fresh.paths)


def _index(tensors: Mapping[str, TensorInfo], shards: Mapping[str, list[str]]) -> bytes:
    """Which file holds which tensor, in the form of Hugging Face's index."""
    total = sum(info.nbytes for info in tensors.values())
    shard_of = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": shard_of}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _shards(tensors: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    """Fill shards in order; what exceeds a shard alone gets its own and does not close the open one."""
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, info in tensors.items():
        if info.nbytes > most:
            shards.append([name])
            continue
        if size + info.nbytes > most:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += info.nbytes
    if current or not shards:
        shards.append(current)
    return shards


def _header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, info in tensors.items():
        end = begin + info.nbytes
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
