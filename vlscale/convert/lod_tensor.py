"""Paddle fluid's LoDTensor record, the bytes of one variable: strictly parsed, and written as Paddle 1.8 does.

Little-endian: u32 version 0; u64 number of LoD levels, each u64 bytes and that many bytes of u64 offsets; u32 version
0; i32 length of a protobuf ``VarType.TensorDesc`` (field 1: data type, field 2: repeated int64 dims, which proto2
leaves unpacked); then the elements, row-major, without a length of their own (paddle/fluid/framework/lod_tensor.cc,
tensor_util.cc, framework.proto).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vlscale.convert.byte_files import ByteFile
from vlscale.convert.source import MOST_DIMENSIONS, TensorInfo, check_tensor
from vlscale.errors import VlscaleError

DTYPES: Mapping[int, torch.dtype] = {
    0: torch.bool,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    20: torch.uint8,
    21: torch.int8,
    22: torch.bfloat16,
    23: torch.complex64,
    24: torch.complex128,
}
"""``VarType.Type`` of the element types."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
MOST_LEVELS = 8
MOST_LOD_BYTES = 64 << 10
"""Of one record: weights have none, and the sequences of a saved batch are few."""
_MOST_DESCRIPTION = 256
_SHORT = 256
_LONG = MOST_LOD_BYTES + _MOST_DESCRIPTION + 128


@dataclass(frozen=True)
class Record:
    """One variable.

    Attributes:
        info: dtype and shape.
        levels: LoD, offsets of each level; mostly empty.
        begin: byte of the file at which its elements begin.
        end: byte after its elements.
    """

    info: TensorInfo
    levels: tuple[tuple[int, ...], ...]
    begin: int
    end: int


class _TooShortError(Exception):
    """The bytes at hand end inside the record's head."""


class _Bytes:
    """Reads numbers off the front of some bytes."""

    def __init__(self, where: str, content: bytes) -> None:
        self.where = where
        self.content = content
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.content) - self.at:
            raise _TooShortError
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def varint(self) -> int:
        """A protobuf int64: seven bits per byte, the lowest first, in two's complement."""
        value = 0
        for place in range(10):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                # Padded or overlong numbers are legal to some parsers and written by none.
                if value >= 1 << 64 or (place and byte == 0):
                    break
                return value - (1 << 64) if value >= 1 << 63 else value
        raise VlscaleError(f"{self.where}: its description holds a malformed number; the file is damaged")


def read_record(where: str, file: ByteFile, begin: int, end: int) -> Record:
    """Parse the record at byte ``begin``; its elements are not read.

    Args:
        where: file and variable, for errors.
        file: open.
        begin: first byte of the record.
        end: the byte at which it must have ended.

    Raises:
        VlscaleError: not such a record, truncated, or sizes that cannot be true.
    """
    for most in (_SHORT, _LONG):
        head = file.read(where, begin, min(most, end - begin))
        try:
            return _parse_record(where, head, begin, end)
        except _TooShortError:
            continue
    raise VlscaleError(f"{where}: ends inside the head of a LoDTensor; it is truncated, fetch it again")


def starts_record(head: bytes, size: int, whole: bool = False) -> bool:
    """Say whether ``head``, the first bytes of ``size``, begins with a record that fits (``whole``: and fills them)."""
    try:
        record = _parse_record("", head, 0, size)
    except (VlscaleError, _TooShortError):
        return False
    return record.end == size or not whole


def _parse_record(where: str, head: bytes, begin: int, end: int) -> Record:
    """Parse the head of the record that lies from byte ``begin`` of a file to ``end`` or shorter."""
    source = _Bytes(where, head)
    version = source.number(4)
    if version != 0:
        raise VlscaleError(f"{where}: is no LoDTensor of version 0 (found {version}); leave only variables there")
    levels = _levels(source)
    version = source.number(4)
    if version != 0:
        raise VlscaleError(f"{where}: its tensor has version {version}, expected 0; the file is damaged")
    length = source.number(4, signed=True)
    if not 0 <= length <= _MOST_DESCRIPTION:
        raise VlscaleError(f"{where}: its description has {length} bytes, expected 2 to {_MOST_DESCRIPTION}")
    dtype, shape = _description(where, source.take(length))
    begin += source.at
    info = check_tensor(where, dtype, shape, end - begin)
    return Record(info, levels, begin, begin + info.nbytes)


def _levels(source: _Bytes) -> tuple[tuple[int, ...], ...]:
    count = source.number(8)
    if count > MOST_LEVELS:
        raise VlscaleError(f"{source.where}: has {count} LoD levels, expected at most {MOST_LEVELS}; it is damaged")
    levels = []
    total = 0
    for _ in range(count):
        size = source.number(8)
        total += size
        if size % 8 or total > MOST_LOD_BYTES:
            raise VlscaleError(
                f"{source.where}: a LoD level has {size} bytes, expected whole u64 and at most {MOST_LOD_BYTES} in all"
            )
        levels.append(tuple(source.number(8) for _ in range(size // 8)))
    return tuple(levels)


def _description(where: str, content: bytes) -> tuple[torch.dtype, tuple[int, ...]]:
    source = _Bytes(where, content)
    code: int | None = None
    shape: list[int] = []
    packed = False
    try:
        while source.at < len(content):
            tag = source.take(1)[0]
            if tag == 0x08 and code is None:
                code = source.varint()
            elif tag == 0x10 and not packed:
                shape.append(source.varint())
            elif tag == 0x12 and not shape and not packed:
                packed = True
                length = source.varint()
                if length < 0:
                    raise _TooShortError
                inner = _Bytes(where, source.take(length))
                while inner.at < len(inner.content):
                    shape.append(inner.varint())
            else:
                raise VlscaleError(f"{where}: its description has an unexpected tag {tag:#04x}; the file is damaged")
    except _TooShortError:
        raise VlscaleError(f"{where}: its description is cut off; the file is damaged") from None
    if code is None or code not in DTYPES:
        raise VlscaleError(f"{where}: its data type is {code}, expected one of {', '.join(map(str, DTYPES))}")
    return DTYPES[code], tuple(shape)


def record_head(where: str, info: TensorInfo) -> bytes:
    """Return the bytes that stand before the elements: no LoD, dims unpacked, as Paddle 1.8 writes.

    A tensor without dimensions gets none, which Paddle 2.5 and later read; earlier ones know no such tensor.

    Raises:
        VlscaleError: Paddle has no such element type, or the shape has too many dimensions.
    """
    if info.dtype not in _CODES or len(info.shape) > MOST_DIMENSIONS:
        raise VlscaleError(f"{where}: {info.dtype} {list(info.shape)} cannot be a fluid variable; cast it with --dtype")
    description = bytes([0x08, _CODES[info.dtype]])
    for side in info.shape:
        description += b"\x10" + _varint(side)
    return bytes(16) + len(description).to_bytes(4, "little") + description


def _varint(value: int) -> bytes:
    written = b""
    while value >= 0x80:
        written += bytes([value & 0x7F | 0x80])
        value >>= 7
    return written + bytes([value])
