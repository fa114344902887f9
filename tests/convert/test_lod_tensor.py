"""Fluid's LoDTensor record: Paddle's own bytes, both ways of writing dims, and every lie refused."""

from __future__ import annotations

import math
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.convert.hostile import random_tensors, refused, same_bits
from vlscale.convert.byte_files import ByteFile, write_tensor
from vlscale.convert.lod_tensor import DTYPES, read_record, record_head, starts_record
from vlscale.convert.source import TensorInfo

FLOATS = [1.5, -2.0, 0.25]
DATA = struct.pack("<3f", *FLOATS)


def record(description: bytes = b"\x08\x05\x10\x03", data: bytes = DATA, **parts: bytes | int) -> bytes:
    """A record of three floats, of which any part can be replaced."""
    version, levels = parts.get("version", 0), parts.get("levels", bytes(8))
    length = parts.get("length", len(description))
    inner = parts.get("inner", 0)
    assert isinstance(levels, bytes)
    return struct.pack("<I", version) + levels + struct.pack("<Ii", inner, length) + description + data


def _read(path: Path, content: bytes):
    path.write_bytes(content)
    with ByteFile(path) as file:
        found = read_record("file: variable 'x'", file, 0, file.size)
        return found, file.tensor("file: variable 'x'", found.info, found.begin)


@pytest.mark.parametrize(
    "description",
    [b"\x08\x05\x10\x03", b"\x08\x05\x12\x01\x03", b"\x10\x03\x08\x05", b"\x12\x01\x03\x08\x05"],
    ids=["unpacked", "packed", "unpacked first", "packed first"],
)
def test_dims_are_read_packed_and_unpacked(tmp_path, description):
    found, tensor = _read(tmp_path / "x", record(description))
    assert tensor.tolist() == FLOATS
    assert found.levels == ()
    assert found.end == len(record(description))


def test_example_of_the_format():
    """Tensor [120, 32] of floats, as Paddle describes it."""
    assert record_head("x", TensorInfo(torch.float32, (120, 32)))[16:] == b"\x06\0\0\0\x08\x05\x10\x78\x10\x20"
    assert record_head("x", TensorInfo(torch.float32, (50265,)))[16:] == b"\x06\0\0\0\x08\x05\x10\xd9\x88\x03"


def test_levels_are_kept(tmp_path):
    levels = struct.pack("<QQ3QQ2Q", 2, 24, 0, 2, 3, 16, 0, 3)
    found, tensor = _read(tmp_path / "x", record(levels=levels))
    assert found.levels == ((0, 2, 3), (0, 3))
    assert tensor.tolist() == FLOATS


def test_many_levels_are_read_by_a_second_look(tmp_path):
    offsets = range(5000)
    found, tensor = _read(tmp_path / "x", record(levels=struct.pack("<QQ5000Q", 1, 40_000, *offsets)))
    assert found.levels == (tuple(offsets),)
    assert tensor.tolist() == FLOATS


MINUS_ONE = b"\xff" * 9 + b"\x01"
LIES = {
    "version": (record(version=1), "version 0 (found 1)"),
    "inner version": (record(inner=7), "version 7, expected 0"),
    "negative length": (record(length=-1), "has -1 bytes"),
    "long length": (record(length=257), "has 257 bytes"),
    "huge length": (record(length=2**31 - 1), "has 2147483647 bytes"),
    "length beyond the file": (record(length=200), "ends inside the head"),
    "length cuts a dim": (record(b"\x08\x05\x10", DATA), "is cut off"),
    "length takes data": (record(length=8), "unexpected tag"),
    "many levels": (record(levels=struct.pack("<Q", 9)), "has 9 LoD levels"),
    "endless levels": (record(levels=struct.pack("<Q", 2**64 - 1)), "LoD levels"),
    "huge level": (record(levels=struct.pack("<QQ", 1, 2**63)), "a LoD level has 9223372036854775808 bytes"),
    "half a level": (record(levels=struct.pack("<QQ", 1, 12) + bytes(12)), "a LoD level has 12 bytes"),
    "levels too large in all": (
        record(levels=struct.pack("<QQ", 2, 65536) + bytes(65536) + b"\x08" + bytes(7)),
        "65536",
    ),
    "level beyond the file": (record(levels=struct.pack("<QQ", 1, 8000)), "ends inside the head"),
    "no type": (record(b"\x10\x03"), "data type is None"),
    "unknown type": (record(b"\x08\x07\x10\x03"), "data type is 7"),
    "negative type": (record(b"\x08" + MINUS_ONE + b"\x10\x03"), "data type is -1"),
    "type twice": (record(b"\x08\x05\x08\x05\x10\x03"), "unexpected tag 0x08"),
    "unknown field": (record(b"\x08\x05\x10\x03\x18\x01"), "unexpected tag 0x18"),
    "wrong wire type": (record(b"\x08\x05\x15\x03\0\0\0"), "unexpected tag 0x15"),
    "packed twice": (record(b"\x08\x05\x12\x01\x03\x12\x01\x03"), "unexpected tag 0x12"),
    "packed, then not": (record(b"\x08\x05\x12\x01\x01\x10\x03"), "unexpected tag 0x10"),
    "packed too long": (record(b"\x08\x05\x12\x05\x03"), "is cut off"),
    "packed length negative": (record(b"\x08\x05\x12" + MINUS_ONE), "is cut off"),
    "packed dim cut": (record(b"\x08\x05\x12\x01\x83"), "is cut off"),
    "negative dim": (record(b"\x08\x05\x10" + MINUS_ONE), "[-1]"),
    "negative dims": (record(b"\x08\x05\x10" + MINUS_ONE + b"\x10" + MINUS_ONE), "[-1, -1]"),
    "number of eleven bytes": (record(b"\x08\x05\x10" + b"\x80" * 10 + b"\x01"), "malformed number"),
    "number of 65 bits": (record(b"\x08\x05\x10" + b"\xff" * 9 + b"\x02"), "malformed number"),
    "overlong number": (record(b"\x08\x05\x10\x83\x00"), "malformed number"),
    "huge dim": (record(b"\x08\x05\x10" + b"\xff" * 8 + b"\x7f"), "at most 8 sides"),
    "huge dims, empty": (record(b"\x08\x05\x10\x00" + (b"\x10" + b"\xff" * 8 + b"\x7f") * 2), "at most 8 sides"),
    "nine dims": (record(b"\x08\x05" + b"\x10\x01" * 9), "at most 8 sides"),
    "more than there is": (record(b"\x08\x05\x10\x04"), "needs 16 bytes, the file has 12"),
    "nothing": (b"", "ends inside the head"),
}


@pytest.mark.parametrize("lie", LIES)
def test_record_that_lies_is_refused(tmp_path, lie):
    content, message = LIES[lie]
    with refused("file: variable 'x'", message):
        _read(tmp_path / "x", content)
    assert not starts_record(content, len(content))


@pytest.mark.parametrize("length", range(len(record()) - 1))
def test_every_truncation_is_refused(tmp_path, length):
    with refused("file: variable 'x'"):
        _read(tmp_path / "x", record()[:length])


def test_start_is_told_from_a_whole():
    content = record()
    assert starts_record(content, len(content), whole=True)
    assert starts_record(content[:30], len(content), whole=True)
    assert starts_record(content + b"1", len(content) + 1)
    assert not starts_record(content + b"1", len(content) + 1, whole=True)
    assert not starts_record(content, len(content) - 1)


@settings(max_examples=200, deadline=None)
@given(random_tensors(list(DTYPES.values())))
def test_round_trip_is_bit_exact(tensor):
    info = TensorInfo(tensor.dtype, tuple(tensor.shape))
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "x").open("wb") as stream:
            stream.write(record_head("x", info))
            write_tensor(stream, "x", tensor, info)
        with ByteFile(Path(folder) / "x") as file:
            found = read_record("x", file, 0, file.size)
            assert found.info == info
            assert found.end == file.size
            assert same_bits(file.tensor("x", info, found.begin), tensor)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 127, 128, 16383, 16384, 1 << 21, 1 << 35]), max_size=8))
def test_dims_of_any_size_survive(shape):
    info = TensorInfo(torch.float32, tuple(shape))
    head = record_head("x", info)
    possible = math.prod(max(side, 1) for side in shape) <= 1 << 40
    assert starts_record(head, len(head) + info.nbytes, whole=True) == possible


def test_type_or_shape_that_paddle_lacks_is_refused():
    with refused("torch.float8_e5m2", "--dtype"):
        record_head("x", TensorInfo(torch.float8_e5m2, (1,)))
    with refused("[1, 1, 1, 1, 1, 1, 1, 1, 1]"):
        record_head("x", TensorInfo(torch.float32, (1,) * 9))
