"""Ranges of files and fresh files, where the formats' own tests do not reach."""

from __future__ import annotations

import io
import os

import pytest
import torch

from tests.convert.hostile import refused
from vlscale.convert.byte_files import ByteFile, FreshFiles, write_tensor
from vlscale.convert.source import TensorInfo, check_tensor

INFO = TensorInfo(torch.float32, (2, 3))


def test_range_is_read_in_as_many_steps_as_the_system_takes(tmp_path, monkeypatch):
    """One call of the system's returns at most 2 GiB."""
    values = torch.arange(6.0)
    (tmp_path / "x").write_bytes(b"12345" + values.numpy().tobytes())
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: original(file, [buffers[0][:7]], at))
    with ByteFile(tmp_path / "x") as file:
        assert file.tensor("x", INFO, 5).equal(values.reshape(2, 3))
        assert file.read("x", 1, 9) == b"2345" + values.numpy().tobytes()[:5]
        with refused("x: the file ends at byte 29"):
            file.read("x", 20, 10)
        with refused("x: ends at byte 30 of 29"):
            file.tensor("x", INFO, 6)


def test_what_does_not_fit_into_memory_is_told(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(24))

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", failing)
    with ByteFile(tmp_path / "x") as file, refused("tensor: its 24 bytes do not fit into memory"):
        file.tensor("tensor", INFO, 0)


def test_disk_that_fails_is_told(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(24))

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with ByteFile(tmp_path / "x") as file, refused("Input/output error"):
        file.tensor("x", INFO, 0)


def test_empty_tensor_of_absurd_sides_is_refused():
    with refused("at most 8 sides"):
        check_tensor("x", torch.float32, (0, 1 << 62), 0)
    assert check_tensor("x", torch.float32, (0, 1 << 40), 0).nbytes == 0


def test_strided_view_is_copied_in_pieces(monkeypatch):
    pieces: list[bytes] = []

    class Stream:
        def write(self, content: memoryview) -> None:
            pieces.append(bytes(content))

    monkeypatch.setattr("vlscale.convert.byte_files._PIECE", 400)
    tensor = torch.arange(600).reshape(20, 30).T[::2]  # rows of 160 bytes
    write_tensor(Stream(), "x", tensor, TensorInfo(torch.int64, (15, 20)))
    assert b"".join(pieces) == tensor.contiguous().numpy().tobytes()
    assert [len(piece) for piece in pieces] == [320] * 7 + [160]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.complex64])
def test_views_of_one_element_are_written(dtype):
    """They are contiguous by definition, whatever their strides are."""
    base = torch.arange(600).reshape(20, 30).to(dtype)
    for view in (base[3:4, 7], base[3:4, 7:8].T, base[3:4, 7:8, None], base[3, 7], base[::2].T[7:8, 2:3]):
        stream = io.BytesIO()
        write_tensor(stream, "x", view, TensorInfo(dtype, tuple(view.shape)))
        assert stream.getvalue() == view.clone(memory_format=torch.contiguous_format).numpy().tobytes()


def test_pieces_of_one_element_are_written(monkeypatch):
    monkeypatch.setattr("vlscale.convert.byte_files._PIECE", 8)
    stream, view = io.BytesIO(), torch.arange(600).reshape(20, 30)[:, 7]
    write_tensor(stream, "x", view, TensorInfo(torch.int64, (20,)))
    assert stream.getvalue() == view.contiguous().numpy().tobytes()


def test_fresh_files_leave_alone_what_others_put_there(tmp_path):
    with refused("cannot be written (No space"), FreshFiles(tmp_path / "new") as fresh:
        fresh.create("mine").close()
        (tmp_path / "new" / "theirs").write_text("1")
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path / "new") == ["theirs"]


def test_fresh_files_are_removed_on_interrupt(tmp_path):
    def interrupted() -> None:
        with FreshFiles(tmp_path / "new") as fresh:
            fresh.create("mine").close()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
