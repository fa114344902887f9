"""The header of a safetensors file: every lie is refused before a byte of data is read, and damage is no crash."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from tests.convert.hostile import damaged, read_or_none, refused, same_bits
from vlscale.convert.safetensors_files import open_source, recognise

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, -2], dtype=torch.int64), "c.d": torch.ones(3)}


def _file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def _entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


LIES = {
    "no shape": (_entry(shape=None), b"1234", "expected a list of sizes"),
    "negative side": (_entry(shape=[-1, -1]), b"1234", "at most 8 sides"),
    "boolean side": (_entry(shape=[True]), b"1234", "expected a list of sizes"),
    "fraction": (_entry(shape=[1.0]), b"1234", "expected a list of sizes"),
    "huge side": (_entry(shape=[2**62]), b"1234", "at most 8 sides"),
    "huge and empty": (_entry(shape=[0, 2**62, 2**62], offsets=[0, 0]), b"", "at most 8 sides"),
    "many sides": (_entry(shape=[1] * 9), b"1234", "at most 8 sides"),
    "endless side": (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"1234", "JSON"),
    "too large": (_entry(shape=[2]), b"1234", "8 bytes, but lies at [0, 4]"),
    "too small": (_entry(shape=[1], offsets=[0, 8]), b"12345678", "4 bytes, but lies at [0, 8]"),
    "offsets swapped": (_entry(offsets=[4, 0]), b"1234", "lies at [4, 0]"),
    "negative offset": (_entry(offsets=[-4, 0]), b"1234", "lies at [-4, 0]"),
    "three offsets": (_entry(offsets=[0, 4, 4]), b"1234", "expected [begin, end]"),
    "text offset": (_entry(offsets=["0", 4]), b"1234", "expected [begin, end]"),
    "hole at first": (_entry(offsets=[4, 8]), b"12345678", "leaves a hole"),
    "beyond the file": (_entry(shape=[2], offsets=[0, 8]), b"1234", "need 8 bytes after the header, the file has 4"),
    "data left over": (_entry(), b"12345", "need 4 bytes after the header, the file has 5"),
    "unknown dtype": (_entry(dtype="F33"), b"1234", "expected one of BOOL"),
    "dtype of no text": (_entry(dtype=[5]), b"1234", "expected one of BOOL"),
    "eight bits": (_entry(dtype="F8_E4M3", shape=[4]), b"1234", "without its scales"),
    "more keys": (_entry(code="os.system"), b"1234", "and nothing else"),
    "no object": ([1, 2], b"", "and nothing else"),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', b"", "no object of strings"),
    "metadata of surrogates": (b'{"__metadata__":{"a":"\\ud800"}}', b"", "no object of strings"),
    "metadata list": (b'{"__metadata__":[]}', b"", "no object of strings"),
    "name twice": (
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "key 'x' stands twice",
    ),
    "key twice": (
        b'{"x":{"dtype":"U8","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
        "'dtype' stands twice",
    ),
    "name of two lines": (b'{"a\\nb":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "no name of a tensor"),
    "name of a surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "no name of a tensor"),
    "long name": (b'{"' + b"n" * 1025 + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", "no name"),
    "list": (b"[]", b"", "does not begin with '{'"),
    "blank before": (b' {"x":1}', b"", "does not begin with '{'"),
    "cut JSON": (b'{"x":', b"", "not valid JSON"),
    "two values": (b"{}{}", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "not a number": (b'{"x":NaN}', b"", "holds NaN"),
    "deep": (b'{"x":' + b"[" * 200_000, b"", "not valid JSON"),
    "wide": (b'{"x":[' + b"[]," * 2_000_000 + b"[]]}", b"", "more than 1600000 parts"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused(tmp_path, lie):
    header, data, message = LIES[lie]
    path = _file(tmp_path / "x.safetensors", header if isinstance(header, bytes) else {"x": header}, data)
    with refused(path, message):
        open_source(path)


def test_the_true_header_of_those_is_read(tmp_path):
    path = _file(tmp_path / "x.safetensors", {"x": _entry()}, bytes(4))
    assert open_source(path).read("x").tolist() == [0.0]


@pytest.mark.parametrize(
    ("second", "message"),
    [([2, 6], "overlaps"), ([0, 4], "overlaps"), ([5, 9], "leaves a hole")],
)
def test_overlap_and_hole_are_refused(tmp_path, second, message):
    entries = {"one": _entry(), "two": _entry(offsets=second)}
    with refused(message, "the header lies"):
        open_source(_file(tmp_path / "x.safetensors", entries, bytes(9)))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 10_000])
def test_length_that_lies_is_refused_before_anything_is_allocated(tmp_path, length):
    path = _file(tmp_path / "x.safetensors", {"x": _entry()}, bytes(4), length=length)
    with refused(f"claims a header of {length} bytes"):
        open_source(path)
    assert not recognise(path)
    with refused("too few"):
        path.write_bytes(b"1234567")
        open_source(path)


def test_header_over_the_format_s_limit_is_refused_though_it_is_there(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{}")
        file.truncate(200_000_000)
    with refused("claims a header of 100000001 bytes"):
        open_source(path)


def test_million_tiny_tensors_are_refused_quickly(tmp_path):
    entries = b",".join(
        b'"t%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(1_000_000)
    )
    path = _file(tmp_path / "x.safetensors", b"{" + entries + b"}", bytes(1_000_000))
    del entries
    with refused("more than 1600000 parts"):  # told before anything is parsed
        open_source(path)


def test_most_tensors(tmp_path, monkeypatch):
    entries = [b'"t%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(200_000)]
    with refused("more than 100002 objects"):  # told while parsing
        open_source(_file(tmp_path / "x.safetensors", b"{" + b",".join(entries) + b"}", bytes(200_000)))
    monkeypatch.setattr("vlscale.untrusted.MOST_TENSORS", 10)
    for count in (10, 11):
        path = _file(tmp_path / "x.safetensors", b"{" + b",".join(entries[:count]) + b"}", bytes(count))
        if count == 10:
            assert len(open_source(path).tensors) == 10
        else:
            with refused("more than 10 tensors"):
                open_source(path)


def test_boolean_of_another_value_is_refused(tmp_path):
    path = _file(tmp_path / "x.safetensors", {"x": _entry(dtype="BOOL", shape=[2], offsets=[0, 2])}, b"\1\2")
    source = open_source(path)
    with refused(path, "tensor 'x'", "a boolean 2"):
        source.read("x")


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_damaged_file_is_read_or_refused(data):
    whole = save(TENSORS, {"format": "pt"})
    content = data.draw(damaged(whole))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        recognise(path)
        found = read_or_none(lambda: open_source(path))
    if found is not None:  # what we accept, the library accepts, and sees the same
        theirs = load(content)
        assert found.keys() == theirs.keys()
        assert all(same_bits(found[name], theirs[name]) for name in found)


def test_the_library_refuses_what_we_refuse():
    """That our strictness on holes is the format's and not ours."""
    header = json.dumps({"x": _entry(offsets=[4, 8])}).encode()
    with pytest.raises(SafetensorError):
        load(len(header).to_bytes(8, "little") + header + bytes(8))
