"""What the tests of hostile files share: one-line refusals, and damage drawn by Hypothesis."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from vlscale.convert.source import TensorSource
from vlscale.errors import VlscaleError


@contextmanager
def refused(*words: object) -> Iterator[None]:
    """The block must raise one printable line that holds all ``words``."""
    with pytest.raises(VlscaleError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 1200
    for word in words:
        assert str(word) in line, line


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with bytes flipped, cut out, put in, or its end cut off."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "cut"]))
        if kind == "flip" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and result:
            result[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            result[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del result[at : at + draw(st.integers(1, 9))]
        else:
            del result[at:]
    return bytes(result)


def read_all(source: TensorSource) -> dict[str, Tensor]:
    """All tensors of a source; each must be what it was said to be."""
    with source:
        found = {name: source.read(name) for name in source.tensors}
        for name, info in source.tensors.items():
            assert found[name].dtype == info.dtype
            assert tuple(found[name].shape) == info.shape
            assert found[name].is_contiguous()
    return found


def read_or_none(opened: Callable[[], TensorSource]) -> dict[str, Tensor] | None:
    """All tensors, or None where opening or reading is refused in one line; any other exception gets through."""
    try:
        return read_all(opened())
    except VlscaleError as error:
        line = str(error)
    assert line.isprintable()
    return None


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in dtype, shape and every bit (so also in NaN)."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8))
    )


@st.composite
def random_tensors(draw: st.DrawFn, dtypes: list[torch.dtype], most_sides: int = 4) -> Tensor:
    """A small tensor of any bits, and perhaps a transposed view."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=most_sides))
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


class ReadRanges:
    """Records every range that is read from files.

    Attributes:
        ranges: (file's path, begin, bytes), in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[tuple[Path, int, int]] = []
        original = os.preadv

        def recorded(descriptor: int, buffers: list[memoryview], begin: int) -> int:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.ranges.append((path, begin, sum(len(buffer) for buffer in buffers)))
            return original(descriptor, buffers, begin)

        monkeypatch.setattr(os, "preadv", recorded)

    def total(self) -> int:
        """Bytes asked for so far."""
        return sum(count for _, _, count in self.ranges)
