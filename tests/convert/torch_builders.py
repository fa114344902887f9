"""Good and hostile files of torch.save for the tests, and what is read from them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from vlscale.convert.torch_files import MAGIC, open_source
from vlscale.errors import VlscaleError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


def save(value, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def same(a, b) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    raw = [each.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for each in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def everything(path: Path) -> dict[str, torch.Tensor]:
    with open_source(path) as source:
        found = {name: source.read(name) for name in source.tensors}
        assert all(
            (t.dtype, tuple(t.shape)) == (source.tensors[n].dtype, source.tensors[n].shape) for n, t in found.items()
        )
        return found


def refused(path: Path) -> str:
    with pytest.raises(VlscaleError) as caught:
        everything(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def tricky() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    big = torch.randn(300, 40)
    return {
        "whole": base,
        "part": base[5:9],
        "transposed": base.view(4, 6).t(),
        "steps": base[3::4],
        "column": big[:, 7],
        "one of a column": big[3:4, 7],
        "block": big[10:20, 5:9],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.tensor([1.5]).expand(3, 4),
        "empty": torch.empty(0, 5),
        "empty view": base[24:],
        "scalar": torch.tensor(3.0),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "grad": torch.randn(3, requires_grad=True),
        "rows of one": torch.randn(4, 1, 3)[:, :, 1:],
        **{str(dtype): torch.arange(6).to(dtype) for dtype in DTYPES},
    }


class Pickler(pickle.Pickler):
    """Writes :class:`Id` as persistent ids; the old format's have a sixth part."""

    tail: tuple[None, ...] = ()

    def persistent_id(self, value):
        return (*value, *self.tail) if isinstance(value, Id) else None


class Id(tuple):
    __slots__ = ()


class Tensor:
    """Pickles as a tensor with any arguments."""

    def __init__(self, offset=0, shape=(2,), stride=(1,), key="0", count=2, kind=torch.FloatStorage, hooks=None):
        self.arguments = (
            Id(("storage", kind, key, "cpu", count)),
            offset,
            shape,
            stride,
            False,
            hooks or OrderedDict(),
        )

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def dumps(value, tail=()) -> bytes:
    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    pickler.tail = tail
    pickler.dump(value)
    return stream.getvalue()


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name) if method == zipfile.ZIP_STORED else name, data)
    return path


def zip_of(path: Path, value, data: bytes = bytes(8)) -> Path:
    return pack(path, {"a/data.pkl": dumps(value), "a/data/0": data, "a/version": b"3\n"})


def legacy_of(path: Path, value, facts=None, keys=("0",), data: bytes = bytes(8), count: int = 2) -> Path:
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} if facts is None else facts
    parts = [dumps(each, (None,)) for each in (MAGIC, 1001, facts, value, list(keys))]
    path.write_bytes(b"".join(parts) + struct.pack("<q", count) + data)
    return path
