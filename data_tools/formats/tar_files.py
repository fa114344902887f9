"""Tar files from strangers: members are found one after another and none is believed.

Only plain files are handed out. Names that leave the folder, links, devices and unpacked sizes beyond the file are
refused here, without unpacking anything. (``tarfile`` would follow sparse maps and read headers of any size.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_tools.formats.arrays import FieldError, show
from data_tools.formats.lines import file_size
from data_tools.records import BadRow
from vlscale.errors import VlscaleError

BLOCK = 512
MAX_HEADER = 64 << 10
"""Bytes of a long name or a PAX header."""
MAX_NAME = 1024
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_ABOUT_NEXT = (b"L", b"K", b"x", b"g")
"""Headers that say something of the next member, or of all."""
_PLAIN = (b"0", b"\0", b"7")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class Member:
    """A plain file in a tar.

    Attributes:
        where: tar and name, for errors.
        name: relative path, ``/`` between folders, checked.
        begin: byte at which its content begins.
        size: bytes of its content.
    """

    where: str
    name: str
    begin: int
    size: int


def read_members(path: Path, stream: BinaryIO) -> Iterator[Member | BadRow]:
    """Yield the members of an open tar file; what is no plain file with a sane name is a bad row.

    Raises:
        VlscaleError: it is compressed, damaged or cut off.
    """
    size, position, long_name, pax = file_size(path), 0, b"", dict[bytes, bytes]()
    stream.seek(0)
    if stream.read(6).startswith(_COMPRESSED):
        raise VlscaleError(f"{path}: is compressed; unpack it to a plain .tar first")
    while position + BLOCK <= size:
        stream.seek(position)
        header = stream.read(BLOCK)
        if not header.strip(b"\0"):
            return
        _check(path, header, position)
        begin, kind = position + BLOCK, header[156:157]
        told = pax.get(b"size") if kind not in _ABOUT_NEXT else None
        length = _number(path, header[124:136] if told is None else told, position, told is not None)
        position = begin + -(-length // BLOCK) * BLOCK
        if begin + length > size:
            raise VlscaleError(f"{path}: is cut off: the member at byte {begin - BLOCK} has {length} bytes")
        if kind in _ABOUT_NEXT:
            if length > MAX_HEADER:
                raise VlscaleError(f"{path}: the header at byte {begin - BLOCK} has {length} bytes, too many")
            content = stream.read(length)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                pax = _pax(path, content, begin)
            continue
        name = pax.get(b"path") or long_name or _name(header)
        yield from _member(path, name, kind, begin, length, b"GNU.sparse.major" in pax)
        long_name, pax = b"", {}
    raise VlscaleError(f"{path}: ends without a tar's end mark; it is cut off, or is no tar file: download it again")


def read_member(stream: BinaryIO, member: Member, limit: int) -> bytes:
    """Read a member's content.

    Raises:
        FieldError: it is larger than ``limit``.
    """
    if member.size > limit:
        raise FieldError("", f"has {member.size} bytes, at most {limit} are allowed")
    stream.seek(member.begin)
    return stream.read(member.size)


def _member(path: Path, raw: bytes, kind: bytes, begin: int, size: int, sparse: bool) -> Iterator[Member | BadRow]:
    where = f"{path}: member {show(raw, 200)}"
    if kind == b"5":
        return
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        yield BadRow(where, "name", "is not UTF-8")
        return
    where = f"{path}: member {show(name, 200)}"
    pieces = name.removeprefix("./").split("/")
    if kind not in _PLAIN or sparse:
        yield BadRow(where, "", f"is {_KINDS.get(kind, 'of a special kind')}, expected a plain file")
    elif name.startswith("/") or "\\" in name or ":" in pieces[0]:
        yield BadRow(where, "name", "is not a relative path")
    elif not all(pieces) or {".", ".."} & set(pieces) or not name.isprintable() or len(name) > MAX_NAME:
        yield BadRow(where, "name", "is not a plain path inside the folder")
    else:
        yield Member(where, "/".join(pieces), begin, size)


def _check(path: Path, header: bytes, position: int) -> None:
    expected = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        found = int(header[148:156].strip(b" \0") or b"-1", 8)
    except ValueError:
        found = -1
    if found != expected:
        raise VlscaleError(f"{path}: no tar header at byte {position}; it is damaged, or no tar file")


def _number(path: Path, field: bytes, position: int, decimal: bool) -> int:
    try:
        if field[:1] == b"\x80":
            number = int.from_bytes(field[1:], "big")
        else:
            number = int(field.strip(b" \0") or b"0", 10 if decimal else 8)
        if number < 0 or number >= 1 << 62:
            raise ValueError
    except ValueError:
        raise VlscaleError(f"{path}: the member at byte {position} has no sane size; it is damaged") from None
    return number


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(path: Path, content: bytes, begin: int) -> dict[bytes, bytes]:
    """Records ``LENGTH KEY=VALUE\\n`` of a PAX header."""
    found = {}
    while content.strip(b"\0"):
        digits, blank, _ = content[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, mark, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not blank or not mark or length > len(content) or content[length - 1 : length] != b"\n":
            raise VlscaleError(f"{path}: the PAX header at byte {begin} is damaged")
        found[key] = value
        content = content[length:]
    return found
