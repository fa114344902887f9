"""Tar archives: real ones are listed as ``tarfile`` does; links, lies and bombs are refused."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.convert.hostile import damaged, refused
from tests.golden_batches import golden_folder
from vlscale.convert import tar_members
from vlscale.convert.tar_members import list_members, open_tar
from vlscale.errors import VlscaleError

OFFICIAL = golden_folder("unimo") / "official"


def member(name: str, content: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT, **options) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, **options) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(path: Path) -> dict[str, bytes]:
    with open_tar(path) as file:
        return {found.name: file.read("x", found.begin, found.size) for found in list_members(path, file)}


def refuse(path: Path, content: bytes, *words: str) -> None:
    before = set(path.parent.iterdir()) | {path}
    path.write_bytes(content)
    with refused(path, *words):
        contents(path)
    assert set(path.parent.iterdir()) == before


@pytest.mark.golden
@pytest.mark.parametrize("name", ["unimo_tiny_en.tar.gz", "fluid_after_optim.tar.gz"])
def test_golden_archives(name):
    with tarfile.open(OFFICIAL / name) as tar:
        expected = {info.name: tar.extractfile(info).read() for info in tar if info.isfile()}
    assert contents(OFFICIAL / name) == expected
    assert len(expected) > 50


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("packed", [False, True])
def test_all_forms(tmp_path, form, packed):
    long_name = "folder/" + ("d" * 60 + "/") * 2 + "n" * 60
    members = [
        member("folder", type=tarfile.DIRTYPE),
        member("./folder/a", b"1" * 513, mtime=1.5 if form == tarfile.PAX_FORMAT else 1),
        member("folder/empty"),
        member(long_name, b"long"),
        member("folder/old", b"2" * 512, type=tarfile.AREGTYPE),
    ]
    raw = archive(*members, form=form)
    path = tmp_path / "x.bin"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert contents(path) == {
        "folder/a": b"1" * 513,
        "folder/empty": b"",
        long_name: b"long",
        "folder/old": b"2" * 512,
    }


def test_archive_of_the_system_s_tar(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a b").write_bytes(b"1")
    (tmp_path / "new" / "é").write_bytes(b"2")
    for form in ("gnu", "pax", "ustar", "v7"):
        subprocess.run(["tar", f"--format={form}", "-C", "new", "-czf", "x.tar.gz", "."], check=True, cwd=tmp_path)
        assert contents(tmp_path / "x.tar.gz") == {"a b": b"1", "é": b"2"}


def test_packed_by_several_streams(tmp_path):
    raw = archive(member("a", b"1" * 2000))
    (tmp_path / "x").write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]))
    assert contents(tmp_path / "x") == {"a": b"1" * 2000}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../a", "inside the folder"),
        ("a/../../b", "inside the folder"),
        ("..", "inside the folder"),
        ("a/..", "inside the folder"),
        ("a/./b", "inside the folder"),
        ("a//b", "inside the folder"),
        ("a\nb", "inside the folder"),
        ("a\x1b[2Jb", "inside the folder"),
        ("n" * 1025, "inside the folder"),
        ("/etc/passwd", "not a relative path"),
        ("//a", "not a relative path"),
        ("a\\..\\b", "not a relative path"),
        ("c:/a", "not a relative path"),
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_name_that_leaves_the_folder_is_refused(tmp_path, name, message, form, kind):
    refuse(tmp_path / "x", archive(member("good"), member(name, type=kind), form=form), message)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"V", "the special kind 'V'"),
        (b"\xff", "the special kind"),
    ],
)
def test_what_is_no_plain_file_is_refused(tmp_path, kind, what):
    refuse(tmp_path / "x", archive(member("a", type=kind, linkname="/etc/passwd")), "member 'a'", what)


def test_long_link_is_refused(tmp_path):
    refuse(tmp_path / "x", archive(member("a", type=tarfile.SYMTYPE, linkname="l" * 200)), "a link")


@pytest.mark.parametrize("key", ["GNU.sparse.major", "GNU.sparse.size", "GNU.sparse.name"])
def test_sparse_by_pax_is_refused(tmp_path, key):
    raw = archive(member("a", pax_headers={key: "1"}), form=tarfile.PAX_FORMAT)
    refuse(tmp_path / "x", raw, "a sparse file")


@pytest.mark.parametrize("key", ["path", "size", "linkpath", "GNU.sparse.major"])
def test_pax_for_all_members_may_not_rename(tmp_path, key):
    raw = archive(member("a"), form=tarfile.PAX_FORMAT, pax_headers={key: "1"})
    refuse(tmp_path / "x", raw, "renames all members")
    (tmp_path / "y").write_bytes(archive(member("a"), form=tarfile.PAX_FORMAT, pax_headers={"comment": "1"}))
    assert contents(tmp_path / "y") == {"a": b""}


@pytest.mark.parametrize("second", ["a", "./a", "././a"])
def test_name_twice_is_refused(tmp_path, second):
    refuse(tmp_path / "x", archive(member("a", b"1"), member(second, b"2")), "'a' twice")


def _header(raw: bytes, at: int, field: bytes) -> bytes:
    """Replace a field of the first header and mend the checksum."""
    header = bytearray(raw[:512])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + raw[512:]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"77777777777\0", "claims 8589934591 bytes"),
        (b"\x80" + (2**61).to_bytes(11, "big"), f"claims {2**61} bytes"),
        (b"\x80" + b"\xff" * 11, "no sane size"),
        (b"\xff" * 12, "no sane size"),
        (b"-1         \0", "no sane size"),
        (b"1_0        \0", "no sane size"),
        (b"9          \0", "no sane size"),
        (bytes(12), "no sane size"),
    ],
)
def test_size_that_lies_is_refused(tmp_path, size, message):
    raw = archive(member("a", b"1" * 600))
    refuse(tmp_path / "x", _header(raw, 124, size), message)
    refuse(tmp_path / "x", gzip.compress(_header(raw, 124, size)), message)


@pytest.mark.parametrize("told", ["9" * 18, "9" * 30, "-1", "x", ""])
def test_pax_size_that_lies_is_refused(tmp_path, told):
    raw = archive(member("a", b"1" * 600, pax_headers={"size": told}), form=tarfile.PAX_FORMAT)
    refuse(tmp_path / "x", raw, "bytes" if told.startswith("9" * 18) and len(told) == 18 else "no sane size")


def test_extended_header_of_any_size_is_refused(tmp_path):
    refuse(tmp_path / "x", archive(member("n" * 70_000)), "70001 bytes")


@pytest.mark.parametrize(
    "record", [b"5 a=\n", b"99 a=b\n", b"x a=b\n", b"0 a=b\n", b"6 a=b\n6 a=b\n", b"6 abc\n", b"4 a=b\n"]
)
def test_damaged_pax_header_is_refused(tmp_path, record):
    raw = archive(member("p", record, type=b"x"), member("a", b"1"))
    if record == b"5 a=\n":
        (tmp_path / "x").write_bytes(raw)
        assert contents(tmp_path / "x") == {"a": b"1"}
    else:
        refuse(tmp_path / "x", raw, "PAX header", "damaged")


def test_folder_with_content_is_refused(tmp_path):
    raw = archive(member("a", b"1" * 600))
    refuse(tmp_path / "x", _header(raw, 156, b"5"), "a folder of 600 bytes")


def test_truncation_is_noticed(tmp_path):
    raw = archive(member("a", b"1" * 600), member("b", b"2"))
    for length in (512 + 600, 512 + 1024, 512 + 1024 + 100, 512 + 1024 + 512 + 512):
        refuse(tmp_path / "x", raw[:length], "cut off")
        refuse(tmp_path / "x", gzip.compress(raw[:length]), "cut off")
    packed = gzip.compress(raw)
    for length in (len(packed) - 1, len(packed) - 8, 12):
        refuse(tmp_path / "x", packed[:length], "damaged gzip")
    refuse(tmp_path / "x", packed[:-5] + bytes([packed[-5] ^ 1]) + packed[-4:], "damaged gzip")
    refuse(tmp_path / "x", packed + b"more", "damaged gzip")


def test_something_after_the_end_is_refused(tmp_path):
    raw = archive(member("a"))
    refuse(tmp_path / "x", raw + archive(member("b")), "follows its end mark")
    with (tmp_path / "y").open("wb") as file:
        file.write(raw)
        file.truncate(17 << 20)
    with refused("follow its end mark"):
        contents(tmp_path / "y")


def test_what_is_no_tar_is_refused(tmp_path):
    for content in (b"", b"1" * 600, bytes(10240), gzip.compress(b"1" * 600), gzip.compress(b"")):
        refuse(tmp_path / "x", content, "no tar archive")
    for magic, name in ((b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        refuse(tmp_path / "x", magic + bytes(600), f"packed by {name}")
    refuse(tmp_path / "x", archive(member("a"))[:512] + b"1" * 512, "no tar header at byte 512")


def test_more_members_than_a_checkpoint_has_are_refused(tmp_path, monkeypatch):
    assert tar_members.MOST_MEMBERS == 100_000
    monkeypatch.setattr(tar_members, "MOST_MEMBERS", 50)
    (tmp_path / "x").write_bytes(archive(*(member(f"m{i}") for i in range(50))))
    assert len(contents(tmp_path / "x")) == 50
    refuse(tmp_path / "x", archive(*(member(f"m{i}") for i in range(51))), "more than 50 members")
    headers = archive(*(member("p", b"5 a=\n", type=b"x") for _ in range(51)))
    refuse(tmp_path / "x", headers, "more than 50 members")


def test_bomb_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "SMALL", 1 << 20)
    bomb = gzip.compress(archive(member("a", bytes(8 << 20))), 9)
    assert len(bomb) * tar_members.MOST_RATIO < 8 << 20
    refuse(tmp_path / "x", bomb, f"unpack to more than {len(bomb) * 200}")
    with refused("unpack to more than 1000;", "unpack it yourself"):
        open_tar(OFFICIAL / "unimo_tiny_en.tar.gz", most=1000)


def test_small_archive_may_be_mostly_zeros(tmp_path):
    packed = gzip.compress(archive(member("a", bytes(8 << 20))), 9)
    (tmp_path / "x").write_bytes(packed)
    assert contents(tmp_path / "x") == {"a": bytes(8 << 20)}


def test_unpacked_copy_has_no_name_and_vanishes(tmp_path):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(archive(member("a", b"1"))))
    before = set(os.listdir("/proc/self/fd"))
    with open_tar(path) as file:
        assert file.size == 10240
        assert list(tmp_path.iterdir()) == [path]
    assert set(os.listdir("/proc/self/fd")) <= before


def test_folder_that_may_not_be_written_does_not_matter(tmp_path, monkeypatch):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(archive(member("a", b"1"))))
    original, asked = tempfile.TemporaryFile, []

    def refusing(dir: Path | None = None):
        asked.append(dir)
        if dir is not None:
            raise PermissionError(13, "Permission denied")
        return original()

    monkeypatch.setattr(tempfile, "TemporaryFile", refusing)
    assert contents(path) == {"a": b"1"}
    assert asked == [tmp_path, None]


NAMES = ["folder/a", "folder/b", "n" * 130]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_archive_is_listed_or_refused(data):
    form = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    raw = archive(*(member(name, b"1" * 30) for name in NAMES), form=form)
    packed = data.draw(st.booleans())
    content = data.draw(damaged(gzip.compress(raw) if packed else raw.rstrip(b"\0") + bytes(1024)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        line = ""
        try:
            found = contents(path)
        except VlscaleError as error:
            line = str(error)
        assert line.isprintable()
        if not line:
            assert all(".." not in name.split("/") and not name.startswith("/") for name in found)
        assert list(Path(folder).iterdir()) == [path]
