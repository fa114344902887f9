"""Tar archives of strangers: where their plain files lie, and nothing that is not a plain file with a plain name.

Headers (ustar, GNU long names, PAX) are parsed here and not by ``tarfile``, which follows sparse maps and believes
sizes. Nothing is unpacked to a path that an archive names. A gzip stream is unpacked once into a file without a name.
"""

from __future__ import annotations

import gzip
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from vlscale.convert.byte_files import ByteFile
from vlscale.errors import VlscaleError
from vlscale.untrusted import MOST_NAME, shown

BLOCK = 512
MOST_MEMBERS = 100_000
"""Headers of any kind; also the bound of tensors, each of which is a member."""
MOST_UNPACKED = 64 << 30
"""Bytes out of one gzip file: fifteen times UNIMO-large with its optimiser state."""
MOST_RATIO = 200
"""Unpacked to packed bytes. Floats shrink by less than 1.5, a checkpoint whose Adam moments are still zero by about 4;
deflate itself ends at 1,032, which is where bombs are."""
SMALL = 64 << 20
"""Bytes unpacked whatever the ratio: a tiny archive is mostly padding, and does no harm."""
_MOST_EXTENDED = 64 << 10
_MOST_TAIL = 16 << 20
_PIECE = 1 << 20
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_KINDS |= {b"S": "a sparse file", b"K": "a link"}
_PLAIN = (b"0", b"\0", b"7")
_OCTAL = re.compile(rb"[ \0]*([0-7]{1,12})[ \0]*")
_PACKED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x9d": "compress"}


@dataclass(frozen=True)
class TarMember:
    """A plain file in a tar.

    Attributes:
        name: relative path with ``/`` between folders, checked, without a leading ``./``.
        begin: byte of the (unpacked) archive at which its content begins.
        size: bytes of its content.
    """

    name: str
    begin: int
    size: int


class Readable(Protocol):
    """What members are looked for in: :class:`ByteFile`, or the first bytes of an archive."""

    size: int

    def read(self, where: str, begin: int, count: int) -> bytes:
        """Return ``count`` bytes from ``begin`` on."""
        ...


def is_tar(head: bytes) -> bool:
    """Say whether the first 512 bytes of a file (unpacked) are a tar's header: by its checksum."""
    return len(head) >= BLOCK and _has_checksum(head[:BLOCK])


def is_gzip(head: bytes) -> bool:
    """Say whether a file begins as gzip does."""
    return head.startswith(b"\x1f\x8b\x08")


def open_tar(path: Path, most: int = MOST_UNPACKED) -> ByteFile:
    """Open a tar or tar.gz; the latter is unpacked into a file that has no name and vanishes when it is closed.

    Args:
        path: the archive. The file without a name lies beside it, or in the folder for temporary files where that is
            not allowed.
        most: bytes that unpacking may yield.

    Raises:
        VlscaleError: it cannot be read, is damaged, is no tar, is packed otherwise, or unpacks to too much.
    """
    file = ByteFile(path)
    try:
        head = file.read(str(path), 0, min(BLOCK, file.size))
        for magic, name in _PACKED.items():
            if head.startswith(magic):
                raise VlscaleError(f"{path}: is packed by {name}; unpack it, or pack it as .tar.gz")
        if is_gzip(head):
            packed, file = file, _unpack(path, file.size, most)
            packed.close()
            head = file.read(str(path), 0, min(BLOCK, file.size))
        if not is_tar(head):
            raise VlscaleError(f"{path}: does not begin with a tar header; it is damaged, or no tar archive")
    except BaseException:
        file.close()
        raise
    return file


def first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file, unpacked if it is gzip; fewer if there are no more or they are damaged.

    Raises:
        VlscaleError: it cannot be read.
    """
    with ByteFile(path) as file:
        head = file.read(str(path), 0, min(count, file.size))
    if not is_gzip(head):
        return head
    try:
        return zlib.decompressobj(wbits=31).decompress(head, count)
    except zlib.error:
        return b""


def _unpack(path: Path, packed: int, most: int) -> ByteFile:
    most = min(most, max(SMALL, MOST_RATIO * packed))
    target = _nameless(path.parent)
    done = 0
    try:
        with path.open("rb") as raw, closing(gzip.GzipFile(fileobj=raw)) as stream:
            while piece := stream.read(_PIECE):
                done += len(piece)
                if done > most:
                    raise VlscaleError(
                        f"{path}: its {packed} bytes unpack to more than {most}; if that is meant, unpack it yourself"
                    )
                target.write(piece)
        target.flush()
        return ByteFile(path, target)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        target.close()
        raise VlscaleError(f"{path}: is damaged gzip ({error}); fetch it again") from None
    except OSError as error:
        target.close()
        raise VlscaleError(f"{path}: cannot be unpacked ({error.strerror}); free space, or unpack it") from None
    except BaseException:
        target.close()
        raise


def _nameless(folder: Path) -> BinaryIO:
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()


def list_members(path: Path, file: Readable) -> tuple[TarMember, ...]:
    """List all plain files of an open tar.

    Args:
        path: named in errors.
        file: the unpacked archive.

    Raises:
        VlscaleError: see :func:`walk_members`; a name twice.
    """
    found: dict[str, TarMember] = {}
    for member in walk_members(path, file):
        if member.name in found:
            raise VlscaleError(f"{path}: holds {shown(member.name)} twice; it is damaged or hostile")
        found[member.name] = member
    return tuple(found.values())


def walk_members(path: Path, file: Readable) -> Iterator[TarMember]:
    """Yield the plain files one after another; folders are passed over.

    Raises:
        VlscaleError: it is damaged or cut off; a member leaves the folder, is a link, a device, sparse or of a special
            kind, or is larger than the archive; more than :data:`MOST_MEMBERS` headers; something after the end.
    """
    position, long_name, pax = 0, b"", dict[bytes, bytes]()
    for _ in range(MOST_MEMBERS + 1):
        if position + BLOCK > file.size:
            raise VlscaleError(f"{path}: ends without a tar's end mark; it is cut off: fetch it again")
        header = file.read(str(path), position, BLOCK)
        if not header.strip(b"\0"):
            _check_tail(path, file, position + BLOCK)
            return
        if not _has_checksum(header):
            raise VlscaleError(f"{path}: no tar header at byte {position}; it is damaged")
        begin, kind = position + BLOCK, header[156:157]
        size = _size(path, header, position, pax if kind not in b"Lxg" else {})
        if begin + size > file.size:
            raise VlscaleError(f"{path}: the member at byte {position} claims {size} bytes; the archive is cut off")
        if kind in (b"L", b"x", b"g"):
            content = _extended(path, file, begin, size)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            else:
                pax = _pax(path, content, position, kind == b"g") or pax
        else:
            name = _checked_name(path, pax.get(b"path") or long_name or _name(header), kind)
            _check_kind(path, name, kind, size, pax)
            if kind in _PLAIN:
                yield TarMember(name, begin, size)
            long_name, pax = b"", {}
        position = begin + -(-size // BLOCK) * BLOCK
    raise VlscaleError(f"{path}: holds more than {MOST_MEMBERS} members; this is no checkpoint of such a model")


def _extended(path: Path, file: Readable, begin: int, size: int) -> bytes:
    if size > _MOST_EXTENDED:
        raise VlscaleError(f"{path}: the header at byte {begin - BLOCK} has {size} bytes; it is damaged or hostile")
    return file.read(str(path), begin, size)


def _check_tail(path: Path, file: Readable, position: int) -> None:
    """After the end mark there may be padding only: other readers would find other members there."""
    if file.size - position > _MOST_TAIL:
        raise VlscaleError(f"{path}: {file.size - position} bytes follow its end mark; it is damaged or hostile")
    if file.read(str(path), position, file.size - position).strip(b"\0"):
        raise VlscaleError(f"{path}: something follows its end mark at byte {position}; unpack and pack it anew")


def _checked_name(path: Path, raw: bytes, kind: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise VlscaleError(f"{path}: member {shown(raw)}: its name is not UTF-8; pack it anew") from None
    where = f"{path}: member {shown(name)}"
    if name.startswith("/") or "\\" in name or ":" in name.partition("/")[0]:
        raise VlscaleError(f"{where}: is not a relative path; the archive is hostile, or pack it anew")
    # "./" is what `tar -C folder .` names the folder itself.
    plain = name.rstrip("/") if kind == b"5" else name
    while plain.startswith("./"):
        plain = plain[2:]
    if kind == b"5" and plain in ("", "."):
        return "."
    pieces = plain.split("/")
    if not all(pieces) or {".", ".."} & set(pieces) or not name.isprintable() or len(name) > MOST_NAME:
        raise VlscaleError(f"{where}: is not a plain path inside the folder; the archive is hostile, or pack it anew")
    return plain


def _check_kind(path: Path, name: str, kind: bytes, size: int, pax: dict[bytes, bytes]) -> None:
    where = f"{path}: member {shown(name)}"
    if any(key.startswith(b"GNU.sparse") for key in pax):
        raise VlscaleError(f"{where}: is a sparse file, expected a plain one; pack it without --sparse")
    if kind == b"5" and size:
        raise VlscaleError(f"{where}: is a folder of {size} bytes; the archive is damaged or hostile")
    if kind not in (*_PLAIN, b"5"):
        what = _KINDS.get(kind, f"of the special kind {shown(kind)}")
        raise VlscaleError(f"{where}: is {what}, expected a plain file; pack it with --dereference")


def _has_checksum(header: bytes) -> bool:
    found = _OCTAL.fullmatch(header[148:156])
    return found is not None and int(found[1], 8) == sum(header) - sum(header[148:156]) + 8 * 32


def _size(path: Path, header: bytes, position: int, pax: dict[bytes, bytes]) -> int:
    """Bytes of a member's content: octal, GNU's base 256, or PAX's decimal."""
    field, told = header[124:136], pax.get(b"size")
    if told is not None:
        size = int(told) if told.isdigit() and len(told) < 20 else -1
    elif field[:1] == b"\x80":
        size = int.from_bytes(field[1:], "big")
    else:
        match = _OCTAL.fullmatch(field)
        size = int(match[1], 8) if match else -1
    if not 0 <= size < 1 << 62:
        raise VlscaleError(f"{path}: the member at byte {position} has no sane size; the archive is damaged")
    return size


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(path: Path, content: bytes, position: int, everywhere: bool) -> dict[bytes, bytes]:
    """Records ``LENGTH KEY=VALUE\\n``; those for all members may be remarks only."""
    found: dict[bytes, bytes] = {}
    at, end = 0, len(content)
    while at < end:
        digits = content[at : at + 6].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, mark, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not mark or at + length > end or content[at + length - 1 : at + length] != b"\n" or key in found:
            raise VlscaleError(f"{path}: the PAX header at byte {position} is damaged; fetch the archive again")
        found[key] = value
        at += length
    if not everywhere:
        return found
    if any(key in (b"path", b"size", b"linkpath") or key.startswith(b"GNU.") for key in found):
        raise VlscaleError(f"{path}: the PAX header at byte {position} renames all members; pack the archive anew")
    return {}
