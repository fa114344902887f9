"""Files of torch.save come back bit for bit in both formats, and lies are refused."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.convert.torch_builders import (
    DTYPES,
    Tensor,
    dumps,
    everything,
    legacy_of,
    pack,
    refused,
    same,
    save,
    tricky,
    zip_of,
)
from tests.golden_batches import golden_folder
from vlscale.convert import torch_files
from vlscale.convert.torch_files import StoredTensor, TorchFile, open_source, recognise
from vlscale.errors import VlscaleError

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@BOTH
def test_every_kind_of_tensor(tmp_path, zipped):
    state = tricky()
    if not zipped:  # torch itself does not write these before 1.6
        state = {name: t for name, t in state.items() if t.dtype not in DTYPES[12:]}
    found = everything(save(state, tmp_path / "a.pt", zipped))
    assert list(found) == list(state)
    assert all(same(found[name], state[name]) for name in state)


def test_strided_views_are_read_in_slabs(tmp_path, monkeypatch):
    """A slab of 64 bytes gives what a slab of 8 MiB gives."""
    monkeypatch.setattr(torch_files, "_SLAB", 64)
    state = tricky()
    found = everything(save(state, tmp_path / "a.pt"))
    assert all(same(found[name], state[name]) for name in state)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_view(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("views") / "a.pt"
    base = torch.arange(4 * 5 * 6).view(4, 5, 6)
    for axis in range(3):
        start = data.draw(st.integers(0, 3))
        base = base[(slice(None),) * axis + (slice(start, None, data.draw(st.integers(1, 3))),)]
    view = base.permute(data.draw(st.permutations(range(3))))
    assert same(everything(save({"v": view}, path, data.draw(st.booleans())))["v"], view)


@pytest.mark.golden
@BOTH
def test_goldens(tmp_path, zipped):
    path = golden_folder("uniter") / "pretrain.pt"
    state = torch.load(path, weights_only=True)
    if not zipped:
        path = save(state, tmp_path / "old.pt", zipped)
    assert recognise(path)
    found = everything(path)
    assert list(found) == list(state)
    assert all(same(found[name], state[name]) for name in state)
    with open_source(path) as source:
        assert (source.format, source.files, source.extra) == ("torch", (path,), {})
        assert len(source.aliases) == 2
        for name, earlier in source.aliases.items():
            assert state[name].data_ptr() == state[earlier].data_ptr()


@BOTH
def test_aliases_are_equal_views(tmp_path, zipped):
    base = torch.arange(6.0)
    state = {"a": base, "b": base, "c": base[1:], "d": base.view(2, 3), "e": base.clone(), "f": base[1:]}
    with open_source(save(state, tmp_path / "a.pt", zipped)) as source:
        assert source.aliases == {"b": "a", "f": "c"}


@BOTH
def test_mmf_checkpoints(tmp_path, zipped):
    """The weights are the entry ``model``; the optimiser's tensors are described, the rest is plain."""
    model = torch.nn.Linear(3, 2)
    value = {
        "model": model.state_dict(),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 0.1}]},
        "best_update": 7,
        "best_metric": np.float64(0.5),
        "config": argparse.Namespace(shape=torch.Size([2]), dtype=torch.float16, device=torch.device("cuda", 1)),
        "rng": np.arange(3),
    }
    path = save(value, tmp_path / "a.ckpt", zipped)
    assert all(same(each, model.state_dict()[name]) for name, each in everything(path).items())
    with open_source(path) as source:
        assert list(source.tensors) == ["weight", "bias"]
        extra = source.extra
        assert extra["optimizer"]["state"]["0"] == {"step": 3, "exp_avg": "<tensor torch.float32 [2, 3]>"}
        assert (extra["best_update"], extra["best_metric"]) == (7, 0.5)
        state = {"shape": [2], "dtype": "torch.float16", "device": "cuda:1"}
        assert extra["config"] == {"class": "argparse.Namespace", "state": state}
    with open_source(path, entry="model") as source:
        assert list(source.tensors) == ["weight", "bias"]
    with pytest.raises(VlscaleError, match="no entry 'ema'"):
        open_source(path, entry="ema")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"state_dict": {"a": 1.0}, "epoch": 3}, ["a"]),
        ({"weights": {"a": 1.0}, "epoch": 3}, ["a"]),
        ({"one": {"a": 1.0}, "two": {"a": 1.0}}, ["one.a", "two.a"]),
        ({"a": 1.0, "nested": {"b": [1.0, (1.0,)]}}, ["a", "nested.b.0", "nested.b.1.0"]),
        ({"module": {"a": 1.0}, "step": 1.0}, ["a"]),
        ({"model": 1.0, "b": 1.0}, ["model", "b"]),
        ([1.0, {"x": 1.0}], ["0", "1.x"]),
    ],
)
def test_the_entry_is_chosen_by_content(tmp_path, value, names):
    def tensors(value):
        if isinstance(value, dict):
            return {key: tensors(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(tensors(each) for each in value)
        return torch.tensor(value) if isinstance(value, float) else value

    assert list(everything(save(tensors(value), tmp_path / "a.pt"))) == names


def test_names_that_meet_when_flattened(tmp_path):
    value = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    assert "'a.b' stands twice" in refused(save(value, tmp_path / "a.pt"))


def test_values_beside_tensors(tmp_path):
    path = save({"x": torch.arange(3), "deep": {"y": [torch.ones(2)]}}, tmp_path / "a.pt")
    file = TorchFile(path)
    assert type(file.value["deep"]["y"][0]) is StoredTensor
    assert same(file.read("y", file.value["deep"]["y"][0]), torch.ones(2))
    file.close()


def test_big_endian_files(tmp_path):
    """Every element's bytes reversed under byteorder ``big``."""
    state = {"f": torch.randn(3), "h": torch.randn(4).half(), "c": torch.randn(2, dtype=torch.complex64)}
    path = save(state, tmp_path / "a.pt")
    units = {12: 4, 8: 2, 16: 4}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, data in members.items():
        if "/data/" in name:
            unit = units[len(data)]
            members[name] = b"".join(data[at : at + unit][::-1] for at in range(0, len(data), unit))
    members["a/byteorder"] = b"big"
    found = everything(pack(path, members))
    assert all(same(found[name], state[name]) for name in state)


# ---------------------------------------------------------------------------------------------------------- hostile


class Touch:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class EvalTouch(Touch):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close() or {{'little_endian': True}}",)


def test_the_builders_make_good_files(tmp_path):
    for make in (zip_of, legacy_of):
        path = make(tmp_path / "a.pt", {"x": Tensor()})
        assert torch.equal(torch.load(path, weights_only=True)["x"], torch.zeros(2))
        assert torch.equal(everything(path)["x"], torch.zeros(2))


@pytest.mark.parametrize("make", [zip_of, legacy_of])
@pytest.mark.parametrize("attack", [Touch, EvalTouch])
@pytest.mark.parametrize("place", ["top", "value", "storage", "hooks", "size", "key", "facts"])
def test_payloads_do_not_run(tmp_path, make, attack, place):
    marker, path = tmp_path / "marker", tmp_path / "a.pt"
    bad = attack(marker)
    value = {
        "top": bad,
        "value": {"x": Tensor(), "y": [{"z": bad}]},
        "storage": {"x": Tensor(key=bad)},
        "hooks": {"x": Tensor(hooks=bad)},
        "size": {"x": Tensor(shape=(bad,))},
        "key": {"x": Tensor(), (1, bad): 2},
        "facts": {"x": Tensor()},
    }[place]
    if place == "facts" and make is zip_of:
        path = pack(path, {"a/data.pkl": dumps(value), "a/byteorder": dumps(bad), "a/data/0": bytes(8)})
        assert "byte order" in refused(path)
    else:
        path = make(path, value, facts=bad) if place == "facts" else make(path, value)
        assert "nothing was run" in refused(path)
    assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists() or (place == "facts" and make is zip_of)  # the payload is a real one


@pytest.mark.parametrize("make", [zip_of, legacy_of])
@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Tensor(shape=(3,)), "ends at byte 12 of its storage of 8"),
        (Tensor(offset=1), "ends at byte 12"),
        (Tensor(offset=-1), "negative offset"),
        (Tensor(stride=(-1,)), "negative offset or stride"),
        (Tensor(shape=(-2,)), "its shape is"),
        (Tensor(shape=(2,), stride=(5,)), "ends at byte 24"),
        (Tensor(shape=(2, 1), stride=(1,)), "too few"),
        (Tensor(shape=(1 << 39,), stride=(0,)), "repeats 8 bytes"),
        (Tensor(shape=(1 << 60, 0), stride=(1, 1)), "its shape is"),
        (Tensor(shape=(1,) * 9, stride=(1,) * 9), "its shape is"),
        (Tensor(shape=(1 << 200,)), "its shape is"),
        (Tensor(shape=("2",)), "damaged"),
        (Tensor(shape=[2]), "damaged"),
        (Tensor(hooks={"a": 1}), "hooks"),
        (Tensor(count=-1), "damaged"),
        (Tensor(kind=torch.QInt8Storage), "quantised"),
        (Tensor(key=3), "damaged"),
        (Tensor(key="../../../etc/passwd"), "storage"),
        (Tensor(key="1"), "storage"),
        (Tensor(count=1 << 50, shape=(1 << 38,)), "truncated"),
    ],
)
def test_tensors_that_lie(tmp_path, make, tensor, says):
    message = refused(make(tmp_path / "a.pt", {"x": tensor}))
    assert says in message or (make is legacy_of and "storage" in message)


def test_sparse_and_quantised_tensors(tmp_path):
    assert "sparse" in refused(save({"x": torch.eye(2).to_sparse()}, tmp_path / "a.pt"))
    assert "sparse" in refused(save({"x": torch.eye(2).to_sparse_csr()}, tmp_path / "a.pt"))
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "quantised" in refused(save({"x": quantised}, tmp_path / "a.pt"))
    assert "device meta" in refused(save({"x": torch.ones(2, device="meta")}, tmp_path / "a.pt"))
    conjugate = torch.ones(2, dtype=torch.complex64).conj()
    assert "conjugate" in refused(save({"x": conjugate}, tmp_path / "a.pt"))


def test_truncated_anywhere(tmp_path):
    for make in (zip_of, legacy_of):
        whole = make(tmp_path / "a.pt", {"x": Tensor()}).read_bytes()
        for length in range(len(whole)):
            (tmp_path / "a.pt").write_bytes(whole[:length])
            refused(tmp_path / "a.pt")
        (tmp_path / "a.pt").write_bytes(whole + b"x")
        refused(tmp_path / "a.pt")


def test_old_storages_that_lie(tmp_path):
    value = {"x": Tensor()}
    assert "lies about its size" in refused(legacy_of(tmp_path / "a.pt", value, count=1))
    assert "lies about its size" in refused(legacy_of(tmp_path / "a.pt", value, count=-1))
    for keys in (("0", "0"), ("1",), (), ("0", "1"), (0,)):
        assert "list of storages" in refused(legacy_of(tmp_path / "a.pt", value, keys=keys))
    assert "little-endian" in refused(legacy_of(tmp_path / "a.pt", value, facts={"little_endian": False}))


def test_files_that_change(tmp_path):
    path = save({"x": torch.ones(4)}, tmp_path / "a.pt")
    with open_source(path) as source:
        with path.open("ab") as stream:
            stream.write(b"x")
        with pytest.raises(VlscaleError, match="has been changed"):
            source.read("x")
        with pytest.raises(VlscaleError, match="no such tensor"):
            source.read("y")


def test_a_million_tensors(tmp_path):
    """Refused at the hundred thousandth."""
    head = dumps({"x": Tensor()})
    tensor = head[head.index(b"ctorch._utils") : head.index(b"s.")]
    good, many = b"U\x05model}U\x01x" + tensor + b"s", b"U\x03opt](" + tensor * 100_001 + b"e"
    blob = b"\x80\x02}(" + good + many + b"u."
    message = refused(pack(tmp_path / "a.pt", {"a/data.pkl": blob, "a/data/0": bytes(8)}))
    assert "more than 100000 tensors" in message


def test_what_is_recognised(tmp_path):
    for zipped in (True, False):
        assert recognise(save({"x": torch.ones(1)}, tmp_path / "no name", zipped))
    path = tmp_path / "x"
    for data in (b"", b"PK\x03\x04", pickle.dumps({"a": 1}, 2), pickle.dumps(1, 4), b"\x80", b"{}" * 40):
        path.write_bytes(data)
        assert not recognise(path)
        refused(path)
    assert not recognise(pack(path, {"a/b": b"", "c": b"data.pkl"}))
    assert not recognise(tmp_path)
    assert "checkpoint" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert not recognise(tmp_path / "pipe")


def seeds() -> list[bytes]:
    state = OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(2, dtype=torch.bool), c=torch.tensor(1))
    state["d"] = state["a"].t()
    found = []
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save({"model": state, "n": 1}, stream, _use_new_zipfile_serialization=zipped)
        found.append(stream.getvalue())
    return found


SEEDS = seeds()


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_tensors_or_one_line(tmp_path_factory, data):
    """Flips, cuts and insertions; half of them where the pickle is."""
    blob = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, min(700, len(blob) - 1)))
        if data.draw(st.booleans()):
            blob[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            blob[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    if data.draw(st.integers(0, 4)) == 0:
        del blob[data.draw(st.integers(1, len(blob))) :]
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    path.write_bytes(blob)
    recognise(path)
    with contextlib.suppress(VlscaleError):  # anything else is a bug
        everything(path)
