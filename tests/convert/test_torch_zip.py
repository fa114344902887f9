"""Zip archives that lie about their members, or hold what torch.save never writes, are refused."""

from __future__ import annotations

import struct
import zipfile

import pytest

from tests.convert.torch_builders import Tensor, dumps, pack, refused

GOOD = {"a/data.pkl": dumps({"x": Tensor()}), "a/data/0": bytes(8)}


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({**GOOD, "a/../../x": b""}, "plain names"),
        ({**GOOD, "/etc/x": b""}, "plain names"),
        ({**GOOD, "a\\x": b""}, "plain names"),
        ({**GOOD, "c:x": b""}, "plain names"),
        ({**GOOD, "a/x\n": b""}, "plain names"),
        ({"a/data.pkl": GOOD["a/data.pkl"]}, "no storage '0'"),
        ({**GOOD, "a/data/0": bytes(7)}, "is truncated"),
        ({"a/x": b""}, "without data.pkl"),
        ({**GOOD, "a/code/x.py": b""}, "TorchScript"),
        ({**GOOD, "a/data.pkl": b""}, "truncated"),
        ({**GOOD, "a/data.pkl": dumps([1, 2])}, "holds no tensors"),
        ({**GOOD, "a/data.pkl": dumps({"x" * 1100: Tensor()})}, "no name"),
        ({**GOOD, "a/data.pkl": dumps({"x\ny": Tensor()})}, "no name"),
    ],
)
def test_archives_that_lie(tmp_path, members, says):
    assert says in refused(pack(tmp_path / "a.pt", members))


def test_compressed_and_encrypted_members(tmp_path):
    assert "zip -0" in refused(pack(tmp_path / "a.pt", {**GOOD, "a/y": bytes(100)}, zipfile.ZIP_DEFLATED))
    data = bytearray(pack(tmp_path / "a.pt", GOOD).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert "encrypted" in refused(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_repeated_and_overlapping_members(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in [*GOOD.items(), ("a/data/0", b"12345678")]:
            archive.writestr(name, data)
    assert "twice" in refused(path)
    data = bytearray(pack(path, {**GOOD, "a/data/1": bytes(8)}).read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[second + 20 : second + 28] = struct.pack("<2I", 60, 60)  # data/0 reaches into data/1
    path.write_bytes(data)
    assert "overlaps" in refused(path)


def test_a_directory_of_a_million_members(tmp_path):
    """Refused before it is read."""
    path = pack(tmp_path / "a.pt", GOOD)
    data = bytearray(path.read_bytes())
    data[-22:] = (
        b"PK\x06\x06"
        + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, 10**6, 10**6, len(data) - 22, 0)
        + (b"PK\x06\x07" + struct.pack("<IQI", 0, len(data) - 22, 1) + data[-22:])
    )
    path.write_bytes(data)
    assert "more than 100000 tensors" in refused(path)
