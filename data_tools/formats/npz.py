"""npz files in memory, read without numpy's and zipfile's own readers of what is inside.

These evaluate a header as Python, and unpack whatever method a member names; crafted files make them raise nearly
anything. Here a member is stored or deflated, a header is what numpy writes for plain arrays, and nothing is believed
beyond the bytes that are there. A deflated array is unpacked in one piece, of which the array is a view.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import MAX_ARRAY_BYTES, FieldError, plain_dtype, show

MAX_MEMBERS = 64
_ENCRYPTED = 1
_LOCAL = struct.Struct("<4s22xHH")
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?)\), ?\} *\n?"
)
_MAX_HEADER = 4096
_MAX_DIMENSIONS = 8
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    ValueError,
    OverflowError,
    IndexError,
)


def load_npz(
    field: str, blob: bytes, names: Iterable[str] | None = None, max_bytes: int = MAX_ARRAY_BYTES
) -> dict[str, NDArray[Any]]:
    """Read the arrays of an npz file in memory; they are read-only.

    Args:
        field: name for errors.
        blob: the file's bytes.
        names: arrays to read, of which any may be missing; default: all.
        max_bytes: what all of them may unpack to.

    Raises:
        FieldError: the file is damaged or a bomb, or holds something else than plain arrays.
    """
    wanted = None if names is None else set(names)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise FieldError(field, f"is an npz of {len(members)} members, at most {MAX_MEMBERS} are allowed")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if wanted is not None and name not in wanted:
                continue
            if name in arrays:
                raise FieldError(field, f"{show(name)} stands twice in the npz")
            max_bytes -= member.file_size
            if max_bytes < 0:
                raise FieldError(field, f"unpacks to more than is allowed for one record, at {show(name)}")
            arrays[name] = _parse_npy(f"{field}.{name[:64]}", _unpack(blob, member))
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:100]
        raise FieldError(field, f"is not an intact npz file ({reason or type(error).__name__})") from None
    return arrays


def _unpack(blob: bytes, member: zipfile.ZipInfo) -> bytes | memoryview:
    """Return a member's bytes, of which there are as many as the directory says, with its checksum.

    Raises:
        ValueError: not so; or the member is neither stored nor deflated.
    """
    name, method = show(member.filename), member.compress_type
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name} is packed with method {method}, or encrypted; numpy only stores and deflates")
    start = member.header_offset
    if start < 0:
        raise ValueError(f"{name} begins before the file")
    signature, name_bytes, extra_bytes = _LOCAL.unpack_from(blob, start)
    begin = start + _LOCAL.size + name_bytes + extra_bytes
    local = blob[start + _LOCAL.size : start + _LOCAL.size + name_bytes]
    spelled = member.orig_filename.encode("utf-8" if member.flag_bits & 0x800 else "cp437")
    packed = memoryview(blob)[begin : begin + member.compress_size]
    if signature != b"PK\x03\x04" or local != spelled or len(packed) != member.compress_size:
        raise ValueError(f"{name} is not where the directory says")
    data: bytes | memoryview = packed
    if method == zipfile.ZIP_DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflate.decompress(packed, member.file_size + 1)  # one more than it may have: bombs stop there
        if not inflate.eof:
            raise ValueError(f"{name} unpacks to more or less than the {member.file_size} bytes of the directory")
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise ValueError(f"{name} is damaged: its length or checksum is wrong")
    return data


def _parse_npy(field: str, data: bytes | memoryview) -> NDArray[Any]:
    """View the array in an npy file whose header is spelled as numpy spells it."""
    version = bytes(data[6:8])
    size = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}.get(version)
    if bytes(data[:6]) != b"\x93NUMPY" or size is None or len(data) < 8 + size:
        raise FieldError(field, f"is not an npy array: it begins with {show(bytes(data[:8]))}")
    length = int.from_bytes(data[8 : 8 + size], "little")
    begin = 8 + size + length
    if length > _MAX_HEADER or begin > len(data):
        raise FieldError(field, f"is not an npy array: its header has {length} bytes")
    header = bytes(data[8 + size : begin])
    found = _HEADER.fullmatch(header)
    if not found:
        raise FieldError(field, f"is not an npy array of plain dtype and shape: {show(header, 80)}")
    dtype = plain_dtype(field, found[1].decode("latin-1"))
    shape = [int(side) for side in found[3].split(b",") if side.strip()]
    if len(shape) > _MAX_DIMENSIONS:
        raise FieldError(field, f"has {len(shape)} dimensions, at most {_MAX_DIMENSIONS} are allowed")
    expected = dtype.itemsize * math.prod(shape)
    if len(data) - begin != expected:
        raise FieldError(field, f"has {len(data) - begin} bytes, expected {expected} for {dtype} {shape}")
    flat = np.frombuffer(data, dtype, offset=begin, count=math.prod(shape)) if expected else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if found[2] == b"True" else "C")
