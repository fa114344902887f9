"""What is written torch.load reads, one tensor at a time in memory, and a failed write leaves no trace."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import torch

from tests.convert.torch_builders import same, tricky
from vlscale.convert.torch_files import TorchFile, open_source
from vlscale.convert.torch_writer import write_torch
from vlscale.errors import VlscaleError


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_written(tmp_path, mmap):
    state = {name: tensor.detach() for name, tensor in tricky().items()}
    path = tmp_path / "w.pt"
    write_torch(path, [*state.items(), ("tied", "block"), ("tied again", "tied")])
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert type(found) is OrderedDict
    assert list(found) == [*state, "tied", "tied again"]
    assert all(same(found[name], state[name]) for name in state)
    assert found["tied"].data_ptr() == found["block"].data_ptr() == found["tied again"].data_ptr()
    with open_source(path) as source:
        assert source.aliases == {"tied": "block", "tied again": "block"}
        assert all(same(source.read(name), state[name]) for name in state)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert [each.name for each in tmp_path.iterdir()] == ["w.pt"]


def test_storages_are_aligned_and_files_equal(tmp_path):
    state = {"a": torch.arange(5), "b": torch.ones(3), "c": torch.ones(100)}
    for name in ("x.pt", "y.pt"):
        write_torch(tmp_path / name, state.items())
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "y.pt").read_bytes()
    file = TorchFile(tmp_path / "x.pt")
    assert [start % 64 for start, _length in file._places.values()] == [0, 0, 0]
    file.close()


def test_entries_and_extras_are_written(tmp_path):
    path = tmp_path / "w.ckpt"
    write_torch(path, {"a": torch.ones(2)}.items(), entry="model", extra={"best_update": 3})
    found = torch.load(path, weights_only=True)
    assert torch.equal(found["model"]["a"], torch.ones(2))
    with open_source(path) as source:
        assert (list(source.tensors), source.extra) == (["a"], {"best_update": 3})


def test_one_tensor_at_a_time(tmp_path):
    """Writing and reading 32 tensors of 1 MiB takes far less memory than 32 MiB."""
    tracemalloc.start()
    path = tmp_path / "w.pt"
    alive = []

    def tensors():
        for index in range(32):
            tensor = torch.full((1 << 18,), float(index))
            alive.append(tensor.untyped_storage()._weak_ref())
            yield f"t{index}", tensor
            del tensor
            assert sum(not torch.UntypedStorage._expired(each) for each in alive) <= 2

    write_torch(path, tensors())
    with open_source(path) as source:
        assert all(float(source.read(f"t{index}")[-1]) == index for index in range(32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", torch.ones(1)), ("a", torch.ones(1))],
        [("a", torch.ones(1)), ("b", "c")],
        [("a", torch.ones(1)), ("b", torch.zeros(2, dtype=torch.complex32))],
    ],
)
def test_a_failed_write_leaves_what_was_there(tmp_path, tensors):
    path = tmp_path / "w.pt"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"is given twice|does not stand before|not written"):
        write_torch(path, tensors)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"w.pt": b"before"}
    with pytest.raises(VlscaleError, match="cannot be written"):
        write_torch(tmp_path / "none" / "w.pt", [("a", torch.ones(1))])
