"""The directory of a zip archive as ``torch.save`` writes it, held against the members' own headers."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from vlscale.convert.byte_files import ByteFile
from vlscale.errors import VlscaleError
from vlscale.untrusted import MOST_TENSORS, check_count, is_sane_name, shown

_MOST_DIRECTORY = 1 << 26


class ZipDirectory:
    """The members of a zip archive of stored members, each name -> first byte and length of its content.

    The names are only ever looked up: nothing is unpacked.

    Raises:
        VlscaleError: compressed, encrypted, overlapping or repeated members, unsafe names, or a damaged archive.
    """

    def __init__(self, file: ByteFile) -> None:
        self.members: dict[str, tuple[int, int]] = {}
        self._file, self._where = file, str(file.path)
        count, start, size = self._end()
        if count > MOST_TENSORS + 64 or size > _MOST_DIRECTORY:
            check_count(file.path, count)
            raise VlscaleError(f"{self._where}: its zip directory has {size} bytes; this is no checkpoint")
        directory, place = file.read(self._where, start, size), 0
        regions = []
        try:
            for _ in range(count):
                name, header, length, place = self._entry(directory, place)
                begin = self._content(name, header)
                regions.append((header, begin + length, name))
                self.members[name] = (begin, length)
        except (struct.error, ValueError, IndexError) as error:
            raise self._damage(f"directory ({' '.join(str(error).split())[:80]})") from None
        if place != size:
            raise self._damage("directory (it has another length)")
        regions.sort()
        for (_, end, name), (begin, _, _) in zip(regions, [*regions[1:], (start, 0, "")], strict=True):
            if end > begin:
                raise self._damage(f"member {shown(name)}, which overlaps what follows")

    def _damage(self, what: str) -> VlscaleError:
        return VlscaleError(
            f"{self._where}: is a damaged zip archive: its {what}; it is truncated or lies, fetch it again"
        )

    def _end(self) -> tuple[int, int, int]:
        """Return count, start and size of the directory; an archive's comment is refused, torch writes none."""
        size = self._file.size
        if size < 22:
            raise self._damage("end")
        last = struct.unpack("<4s4H2IH", self._file.read(self._where, size - 22, 22))
        behind = size - 22
        if last[0] != b"PK\x05\x06" or last[7] != 0:
            raise self._damage("end is missing")
        disk, disk_start, here, count, length, start = last[1:7]
        locator = self._file.read(self._where, behind - 20, 20) if behind >= 20 else b""
        if locator.startswith(b"PK\x06\x07"):
            behind = struct.unpack("<4sIQI", locator)[2]
            if behind + 56 > size - 42:
                raise self._damage("end of 64 bits")
            wide = struct.unpack("<4sQ2H2I4Q", self._file.read(self._where, behind, 56))
            if wide[0] != b"PK\x06\x06":
                raise self._damage("end of 64 bits")
            disk, disk_start, here, count, length, start = wide[4:]
        if disk or disk_start or here != count or start + length != behind:
            raise self._damage("directory is not where its end says")
        return count, start, length

    def _entry(self, directory: bytes, place: int) -> tuple[str, int, int, int]:
        fields = struct.unpack_from("<4s6H3I5H2I", directory, place)
        flags, method, packed, length = fields[3], fields[4], fields[8], fields[9]
        names, extras, comments, header = fields[10], fields[11], fields[12], fields[16]
        place += 46
        raw, extra = directory[place : place + names], directory[place + names : place + names + extras]
        name = raw.decode("utf-8")
        if fields[0] != b"PK\x01\x02" or len(raw) != names or len(extra) != extras:
            raise ValueError("an entry is cut")
        if not is_sane_name(name) or name.startswith("/") or set(name) & set("\\:") or ".." in name.split("/"):
            raise VlscaleError(
                f"{self._where}: has a member {shown(name)}, expected plain names; it is hostile, not read"
            )
        if flags & ~0x080E or method:  # data descriptors, UTF-8 names, and bits that mean nothing for stored members
            raise VlscaleError(
                f"{self._where}: member {shown(name)} is compressed or encrypted, torch.save stores them; pack it "
                "again with zip -0"
            )
        if name in self.members:
            raise VlscaleError(f"{self._where}: has the member {shown(name)} twice; it is damaged or hostile")
        wide = iter(_zip64(extra))
        length = next(wide) if length == 0xFFFFFFFF else length
        packed = next(wide) if packed == 0xFFFFFFFF else packed
        header = next(wide) if header == 0xFFFFFFFF else header
        if packed != length:
            raise ValueError("a stored member of two lengths")
        return name, header, length, place + names + extras + comments

    def _content(self, name: str, header: int) -> int:
        fields = struct.unpack("<4s5H3I2H", self._file.read(self._where, header, 30))
        raw = self._file.read(self._where, header + 30, fields[9])
        if fields[0] != b"PK\x03\x04" or raw != name.encode() or fields[3] or fields[2] & ~0x080E:
            raise ValueError("a member's own header is another")
        return header + 30 + int(fields[9]) + int(fields[10])


def _zip64(extra: bytes) -> Iterable[int]:
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            yield from struct.unpack_from(f"<{min(length, 24) // 8}Q", extra, place + 4)
        place += 4 + length
    raise ValueError("a length of 64 bits is missing")
