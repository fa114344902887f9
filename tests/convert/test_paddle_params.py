"""Paddle's files come back bit for bit, whatever protocol wrote them; nothing in them runs."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.golden_batches import golden_folder, load_golden
from vlscale.convert import paddle_params
from vlscale.convert.paddle_params import BIG_PARAMETERS, STRUCTURED_NAMES, open_source, recognise
from vlscale.errors import VlscaleError

FOLDER = "unimo/paddlenlp"
DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)
PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


def save(value, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def everything(path: Path) -> dict[str, torch.Tensor]:
    with open_source(path) as source:
        found = {name: source.read(name) for name in source.tensors}
        for name, tensor in found.items():
            assert (tensor.dtype, tuple(tensor.shape)) == (source.tensors[name].dtype, source.tensors[name].shape)
            assert tensor.is_contiguous()
        return found


def refused(path: Path) -> str:
    with pytest.raises(VlscaleError) as caught:
        everything(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.golden
@pytest.mark.parametrize("name", ["model_state", "model_state_protocol2", "base_only"])
def test_goldens(name):
    path = golden_folder(FOLDER) / f"{name}.pdparams"
    prefix = "unimo." if name == "base_only" else ""
    expected = load_golden("expected_state", FOLDER)
    expected = {key: each for key, each in expected.items() if key.startswith("unimo.") or not prefix}
    assert recognise(path)
    found = everything(path)
    assert {prefix + key for key in found} == set(expected)
    assert all(torch.equal(each, expected[prefix + key]) for key, each in found.items())
    with open_source(path) as source:
        assert (source.format, source.files, source.aliases) == ("paddle", (path,), {})
        names = source.extra[STRUCTURED_NAMES]
        assert names[next(key for key in found if "word" in key)] == "embedding_0.w_0"
        assert set(names) >= set(found)


@PROTOCOLS
def test_every_dtype_and_size(tmp_path, protocol):
    """Inline in the pickle, or so long that it stays in the file; row-major, column-major and big-endian."""
    draw = np.random.default_rng(0)
    value = {}
    for dtype in DTYPES:
        for shape in ((), (0, 3), (2, 3), (70, 90)):
            value[f"{dtype} {shape}"] = np.asarray(draw.integers(0, 2 if dtype == "bool" else 120, shape)).astype(dtype)
    value["random"] = np.frombuffer(draw.bytes(40_000), "float32").reshape(100, 100)
    value["fortran"] = np.asfortranarray(draw.normal(size=(30, 40)))
    value["big-endian"] = draw.normal(size=(30, 40)).astype(">f4")
    value["big complex"] = (draw.normal(size=3) + 1j).astype(">c8")
    found = everything(save(value, tmp_path / "a.pdparams", protocol))
    assert list(found) == list(value)
    for name, each in value.items():
        assert found[name].numpy().dtype == each.dtype.newbyteorder("=")
        assert found[name].numpy().tobytes() == each.astype(each.dtype.newbyteorder("=")).tobytes(), name


def test_uint16_is_bfloat16(tmp_path):
    expected = torch.randn(3, 4).bfloat16()
    value = {"x": expected.view(torch.uint16).numpy()}
    assert torch.equal(everything(save(value, tmp_path / "a.pdparams"))["x"], expected)


@PROTOCOLS
def test_slices_are_put_together(tmp_path, protocol, monkeypatch):
    monkeypatch.setattr(paddle_params, "_PIECE", 1001)  # pieces end within a character
    whole = np.random.default_rng(0).normal(size=(50, 40)).astype("float32")
    flat = whole.flatten()
    value = {
        "a": np.ones(2, "float32"),
        "w@@.0": flat[:900],
        "w@@.1": flat[900:1800],
        "w@@.2": flat[1800:],
        BIG_PARAMETERS: {"w": {"OriginShape": whole.shape, "slices": ["w@@.0", "w@@.1", "w@@.2"]}},
    }
    path = save(value, tmp_path / "a.pdparams", protocol)
    found = everything(path)
    assert set(found) == {"a", "w"}
    assert np.array_equal(found["w"].numpy(), whole)
    with open_source(path) as source:
        assert source.extra == {}


@PROTOCOLS
def test_pairs_of_name_and_array(tmp_path, protocol):
    value = collections.OrderedDict(x=("linear_0.w_0", np.arange(3)), y=np.arange(2), epoch=3, rate=np.float32(0.5))
    path = save(value, tmp_path / "a.pdparams", protocol)
    assert [(name, each.tolist()) for name, each in everything(path).items()][:2] == [("x", [0, 1, 2]), ("y", [0, 1])]
    with open_source(path) as source:
        assert source.extra["epoch"] == 3


def test_arrays_that_are_one(tmp_path):
    one = np.arange(3)
    with open_source(save({"a": one, "b": one, "c": one.copy()}, tmp_path / "a.pdparams")) as source:
        assert source.aliases == {"b": "a"}


def test_opening_reads_no_arrays(tmp_path, monkeypatch):
    """Of 8 MiB, opening reads what stands between the arrays."""
    read = []
    original = paddle_params.ByteFile.read
    monkeypatch.setattr(
        paddle_params.ByteFile, "read", lambda self, *where: read.append(where[2]) or original(self, *where)
    )
    value = {f"x{index}": np.zeros(1 << 18, "float32") for index in range(8)}
    with open_source(save(value, tmp_path / "a.pdparams")) as source:
        assert sum(read) < 1 << 18
        assert len(source.tensors) == 8


class Touch:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class EvalTouch(Touch):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@PROTOCOLS
@pytest.mark.parametrize("attack", [Touch, EvalTouch])
@pytest.mark.parametrize("place", ["top", "value", "pair", "table", "object array"])
def test_payloads_do_not_run(tmp_path, protocol, attack, place):
    marker = tmp_path / "marker"
    bad = attack(marker)
    value = {
        "top": bad,
        "value": {"x": np.ones(2), "y": bad},
        "pair": {"x": ("x", bad)},
        "table": {"x": np.ones(2), BIG_PARAMETERS: {"w": {"OriginShape": (1,), "slices": [bad]}}},
        "object array": {"x": np.array([bad], dtype=object)},
    }[place]
    path = save(value, tmp_path / "a.pdparams", protocol)
    message = refused(path)
    assert "nothing was run" in message or "expected plain numbers" in message
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # the payload is a real one


class Array:
    """Pickles as an array of any state."""

    def __init__(self, shape=(2,), data=bytes(16), dtype=None, version=1):
        self.state = (version, shape, np.dtype("f8") if dtype is None else dtype, False, data)

    def __reduce__(self):
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"x": Array(shape=(3,))}, "expected 24"),
        ({"x": Array(shape=(1,))}, "expected 8"),
        ({"x": Array(shape=(-2,))}, "absurd shape"),
        ({"x": Array(shape=(1 << 62, 4))}, "expected"),
        ({"x": Array(shape=(1 << 62, 0), data=b"")}, "its shape is"),
        ({"x": Array(shape=(1,) * 9, data=bytes(8))}, "its shape is"),
        ({"x": Array(shape=(1,) * 40, data=bytes(8))}, "absurd shape"),
        ({"x": Array(shape=2)}, "damaged"),
        ({"x": Array(shape=("2",))}, "absurd shape"),
        ({"x": Array(data=[1.0, 2.0])}, "without bytes"),
        ({"x": Array(dtype="f8")}, "without a dtype"),
        ({"x": np.array(["a"])}, "expected plain numbers"),
        ({"x": np.zeros(2, "f4,i4")}, "expected plain numbers"),
        ({"x": np.zeros(2, "uint32")}, "dtypes"),
        ({"x": np.array([3], "uint8").view("bool")}, "boolean 3"),
        ({"x\n": np.zeros(2)}, "sane name"),
        ({1: np.zeros(2)}, "sane name"),
        ({"a": 1}, "holds no array"),
        ([np.zeros(2)], "no dict"),
        ({BIG_PARAMETERS: 3, "x": np.zeros(2)}, "no table"),
        ({BIG_PARAMETERS: {"w": {}}, "x": np.zeros(2)}, "no table"),
        ({BIG_PARAMETERS: {"w": {"OriginShape": (2,), "slices": ["x", "x"]}}, "x": np.zeros(1)}, "no table"),
        ({BIG_PARAMETERS: {"w": {"OriginShape": (2,), "slices": ["y"]}}, "x": np.zeros(2)}, "lacks its slices"),
        ({BIG_PARAMETERS: {"x": {"OriginShape": (2,), "slices": ["x"]}}, "x": np.zeros(2)}, "lacks its slices"),
        ({BIG_PARAMETERS: {"w": {"OriginShape": (3,), "slices": ["x"]}}, "x": np.zeros(2)}, "its slices have others"),
        ({BIG_PARAMETERS: {"w": {"OriginShape": (-2,), "slices": ["x"]}}, "x": np.zeros(2)}, "its shape is"),
        ({f"x{index}": 0 for index in range(100_001)}, "more than 100000"),
    ],
)
def test_arrays_that_lie(tmp_path, value, says):
    assert says in refused(save(value, tmp_path / "a.pdparams"))


def test_keys_that_stand_twice(tmp_path):
    path = save({"aa": np.zeros(2), "ab": np.zeros(2)}, tmp_path / "a.pdparams")
    path.write_bytes(path.read_bytes().replace(b"\x02ab", b"\x02aa"))
    assert "the key aa stands twice" in refused(path)


def test_text_that_is_no_array(tmp_path):
    """Protocol 2: as many bytes, but no latin-1; or no UTF-8; or of another length than the array."""
    original = save({"x": np.full(5000, 200, "uint8")}, tmp_path / "a.pdparams", 2).read_bytes()
    path = tmp_path / "b.pdparams"
    for new, says in ((b"\xc4\x88", "no latin-1"), (b"\xc3\xff", "no latin-1"), (b"ab", "has 5001 bytes")):
        path.write_bytes(original.replace(b"\xc3\x88", new, 1))
        assert says in refused(path)


def test_truncated_and_trailing(tmp_path):
    path = tmp_path / "a.pdparams"
    for protocol in (2, 4):
        whole = save({"x": np.zeros(3), "y": np.zeros(600)}, path, protocol).read_bytes()
        for length in [*range(0, len(whole), 7), len(whole) - 1]:
            path.write_bytes(whole[:length])
            refused(path)
        path.write_bytes(whole + b".")
        assert "bytes behind its end" in refused(path)


def test_files_that_change(tmp_path):
    path = save({"x": np.zeros(600)}, tmp_path / "a.pdparams")
    with open_source(path) as source:
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(VlscaleError, match="has been changed"):
            source.read("x")
        with pytest.raises(VlscaleError, match="no such tensor"):
            source.read("y")


def test_what_is_recognised(tmp_path):
    for protocol in (2, 3, 4, 5):
        assert recognise(save({"x": np.zeros(2)}, tmp_path / "no name", protocol))
    path = tmp_path / "a.pdparams"
    for data in (b"", b"\x80\x04", pickle.dumps({"a": 1}, 4), b"numpy", pickle.dumps({"x": np.zeros(2)}, 0)):
        path.write_bytes(data)
        assert not recognise(path)
    torch.save({"x": torch.zeros(2), "numpy": 1}, path, _use_new_zipfile_serialization=False)
    assert not recognise(path)
    assert not recognise(tmp_path)


@given(
    value=st.dictionaries(
        st.text("abc.", min_size=1, max_size=3),
        arrays.arrays(
            st.sampled_from([np.dtype(name) for name in DTYPES]), arrays.array_shapes(min_dims=0, max_dims=3)
        ),
        min_size=1,
        max_size=3,
    ),
    protocol=st.integers(2, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_arrays(tmp_path_factory, value, protocol):
    found = everything(save(value, tmp_path_factory.getbasetemp() / "any.pdparams", protocol))
    assert all(found[name].numpy().tobytes() == each.tobytes() for name, each in value.items())


SEEDS = [
    pickle.dumps(
        {"x": np.arange(6.0).reshape(2, 3), "y": ("n", np.ones(700, "uint8")), STRUCTURED_NAMES: {"x": "n"}}, at
    )
    for at in (2, 4)
]


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_tensors_or_one_line(tmp_path_factory, data):
    """Flips, cuts and insertions, most of them where the opcodes are."""
    blob = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = min(data.draw(st.integers(0, 330) | st.integers(0, 1100)), len(blob) - 1)
        if data.draw(st.booleans()):
            blob[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            blob[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.getbasetemp() / "fuzz.pdparams"
    path.write_bytes(blob)
    recognise(path)
    with contextlib.suppress(VlscaleError):  # anything else is a bug
        everything(path)
