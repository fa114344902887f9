"""Casting and counting in pieces, duplicate names, and the memory that all of it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vlscale.convert import mapped
from vlscale.convert.mapped import Mapped, Merged, as_it_is
from vlscale.convert.source import TensorInfo
from vlscale.convert.steps import KeyPlan, Step
from vlscale.errors import VlscaleError

NAN, INF = float("nan"), float("inf")


class Memory:
    """A source whose tensors are in memory."""

    format, files, extra = "memory", (), dict[str, Any]()

    def __init__(self, tensors: Mapping[str, Tensor], path: str = "in.pt", aliases: Mapping[str, str] | None = None):
        self.path, self.aliases, self._held = Path(path), aliases or {}, tensors
        self.tensors = {name: TensorInfo(each.dtype, tuple(each.shape)) for name, each in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._held[name]

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None: ...


def seen(tensor: Tensor, dtype: torch.dtype | None, operation: str = "copy") -> Mapped:
    return Mapped(Memory({"a": tensor}), KeyPlan((Step("x", ("a",), operation),)), dtype, counts=True)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(mapped, "_PIECE", 7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", [(), (0,), (1,), (50,), (3, 5), (2, 9, 4), (1, 40), (40, 1), (2, 0, 3)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float64, torch.bfloat16),
        (torch.float32, torch.float32), (torch.bfloat16, None), (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e5m2, None),
    ],
)  # fmt: skip
def test_pieces_make_the_same_tensor_as_one_cast(shape, strided, stored, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(stored)
    if strided:
        tensor = tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() > 1 else tensor
    made = seen(tensor, dtype).read("x")
    assert made.is_contiguous()
    assert made.dtype == (dtype or stored)
    assert made.shape == tensor.shape
    assert torch.equal(made.float(), tensor.to(dtype or stored).float())


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", [(50,), (2, 9, 4), (40, 1), (30, 30, 30), (8, 2, 2, 2)])
def test_pieces_are_small_and_cover_each_place_once(shape):
    tensor = torch.zeros(shape)
    for one in (tensor, tensor.movedim(0, -1), tensor.expand(3, *shape)[1]):
        other = torch.zeros(one.shape)
        for left, right in mapped._pieces(one, other):
            assert left.shape == right.shape
            assert left.numel() <= 7
            right += 1
        assert other.eq(1).all()


def test_a_tensor_that_keeps_its_dtype_is_not_copied():
    for dtype in (torch.float32, None):
        tensor = torch.randn(10)
        assert seen(tensor, dtype).read("x").data_ptr() == tensor.data_ptr()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_are_no_numbers_and_those_that_vanish_are_counted(transposed):
    tensor = torch.ones(6, 5)
    tensor[0, 0], tensor[5, 4], tensor[2, 2] = NAN, INF, -INF
    tensor[1, 1], tensor[4, 3], tensor[3, 3], tensor[3, 4] = 1e-9, -1e-30, 0.0, 6e-8  # the last stays: a subnormal
    source = seen(tensor.t().contiguous() if transposed else tensor, torch.float16, "transpose" * transposed or "copy")
    assert torch.equal(source.read("x").isfinite(), tensor.isfinite())
    assert source.not_finite == {"x": 3}
    assert source.vanished == {"x": 2}


@pytest.mark.parametrize(
    ("stored", "dtype", "value", "count"),
    [
        (torch.float32, torch.bfloat16, 1e-45, 1), (torch.float32, torch.bfloat16, 1e-38, 0),
        (torch.float64, torch.float32, 1e-60, 1), (torch.float16, torch.float32, 6e-8, 0),
        (torch.bfloat16, torch.float16, 1e-20, 1), (torch.float16, torch.bfloat16, 6e-8, 0),
    ],
)  # fmt: skip
def test_what_vanishes_depends_on_the_dtype(stored, dtype, value, count):
    source = seen(torch.tensor([value, 0.0, 1.0], dtype=stored), dtype)
    source.read("x")
    assert source.vanished["x"] == count
    assert not source.not_finite


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("stored", "dtype", "value", "take"),
    [
        (torch.float32, torch.float16, 7e4, "fp32, bf16 or keep"), (torch.float64, torch.float32, 1e60, "keep"),
        (torch.float64, torch.float16, 1e60, "keep"), (torch.float32, torch.bfloat16, 3.4e38, "fp32 or keep"),
        (torch.bfloat16, torch.float16, 1e5, "fp32, bf16 or keep"),
    ],
)  # fmt: skip
def test_a_value_that_is_too_large_suggests_dtypes_that_hold_it(stored, dtype, value, take):
    tensor = torch.ones(30, dtype=stored)
    tensor[3], tensor[11], tensor[28] = NAN, -value / 1.001 if take != "fp32 or keep" else 1, -value
    with pytest.raises(VlscaleError, match=rf"in\.pt: x has values beyond {dtype}'s range .*; take --dtype {take}$"):
        seen(tensor, dtype).read("x")


def test_infinity_itself_is_not_too_large():
    assert seen(torch.tensor([INF, NAN]), torch.float16).read("x").isinf().tolist() == [True, False]


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(VlscaleError, match="x: would be made twice, of a and of b, c; remove one"):
        KeyPlan((Step("x", ("a",)), Step("y", ("a",)), Step("x", ("b", "c"), "concatenate")))
    with pytest.raises(VlscaleError, match="y: would be made twice, of a and of x"):
        KeyPlan((Step("x", ("a",)), Step("y", ("a",))), copies={"y": "x"})


def test_two_sources_as_one_share_no_name():
    first, second = Memory({"a": torch.ones(1), "b": torch.ones(2)}), Memory({"c": torch.ones(3)}, "head.pt")
    both = Merged(first, second)
    assert [*map(len, map(both.read, "abc"))] == [1, 2, 3]
    assert [*as_it_is(both).steps] == [Step(name, (name,)) for name in "cab"]
    with pytest.raises(VlscaleError, match=re.escape("head.pt: holds 'b', which in.pt holds too; remove the one")):
        Merged(first, Memory({"b": torch.ones(2), "d": torch.ones(2)}, "head.pt"))
    with pytest.raises(VlscaleError, match="holds 'a' and 1 more, which"):
        Merged(first, Memory({"b": torch.ones(2), "a": torch.ones(2)}, "head.pt"))


CODE = """
import torch
from pathlib import Path
import vlscale.convert.command
from vlscale.convert.conversion import Wish, convert
def peak():  # ru_maxrss would be the parent's
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
for dtype in ("fp16", "fp32"):  # whatever is loaded at the first cast
    convert(Wish(Path("small.safetensors"), Path(f"small-{dtype}.safetensors"), to="state-dict", dtype=dtype))
before = peak()
convert(Wish(Path("in.safetensors"), Path("out.safetensors"), to="state-dict", dtype=DTYPE))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("stored", "dtype", "held"),
    [
        (torch.float32, "fp32", 4), (torch.float16, "keep", 2), (torch.float32, "fp16", 4 + 2),
        (torch.float16, "fp32", 2 + 4), (torch.float32, "bf16", 4 + 2),
    ],
)  # fmt: skip
def test_memory_stays_at_what_is_stored_and_written_of_one_tensor(stored, dtype, held, tmp_path):
    """Peak growth against bytes per value that must be there: none but the stored ones where the dtype stays."""
    values = 1 << 25
    save_file({name: torch.ones(1 << 12, values >> 12, dtype=stored) for name in "ab"}, tmp_path / "in.safetensors")
    save_file({"a": torch.ones(1 << 12, 1 << 9, dtype=stored)}, tmp_path / "small.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CODE.replace("DTYPE", repr(dtype))],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    bookkeeping = 16 << 20
    assert int(done.stdout) <= 1.3 * held * values + bookkeeping, int(done.stdout) / values
    assert int(done.stdout) >= held * values / 2  # it was measured at all
