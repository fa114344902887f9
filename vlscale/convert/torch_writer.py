"""What ``torch.load`` reads (the zip format, see :mod:`vlscale.convert.torch_files`), written tensor by tensor."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._utils
from torch import Tensor

from vlscale.convert.byte_files import write_tensor
from vlscale.convert.source import TensorInfo
from vlscale.convert.torch_pickle import DTYPES, STORAGES, dense_stride
from vlscale.errors import VlscaleError

_ALIGNMENT = 64


class _Reference:
    """Pickles as a tensor of a storage that is written already."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key, self.dtype, self.shape = key, dtype, shape

    def __reduce__(self) -> Any:
        view = (_StorageReference(self.key, self.dtype, math.prod(self.shape)), 0, self.shape, dense_stride(self.shape))
        if self.dtype in STORAGES.values():
            return torch._utils._rebuild_tensor_v2, (*view, False, OrderedDict())
        return torch._utils._rebuild_tensor_v3, (*view, False, OrderedDict(), self.dtype)


@dataclass(frozen=True)
class _StorageReference:
    key: str
    dtype: torch.dtype
    count: int


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _StorageReference):
            return None
        names = {dtype: name for name, dtype in STORAGES.items()}
        if value.dtype in names:
            return "storage", getattr(torch, names[value.dtype]), value.key, "cpu", value.count
        return "storage", torch.UntypedStorage, value.key, "cpu", value.count * value.dtype.itemsize


def write_torch(
    path: Path, tensors: Iterable[tuple[str, Tensor | str]], entry: str | None = None, extra: Any = None
) -> None:
    """Write what ``torch.load`` reads (also with ``weights_only`` and ``mmap``), holding one tensor at a time.

    The file is written beside and renamed, so that ``path`` is whole or as it was. Equal tensors make equal files.

    Args:
        path: of the file; its folder exists.
        tensors: name and tensor, in order; in place of a tensor an earlier name, whose storage is then shared.
        entry: key under which the state dict stands; None writes it bare.
        extra: dict of plain values beside the entry; needs ``entry``.

    Raises:
        VlscaleError: the disk refused.
        ValueError: a name twice, an unknown earlier name, or ``extra`` without ``entry``, a dtype that is not known.
    """
    if extra and entry is None:
        raise ValueError("extra values need an entry for the state dict")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    state: OrderedDict[str, _Reference] = OrderedDict()
    try:
        with zipfile.ZipFile(beside, "x", zipfile.ZIP_STORED) as archive:
            for name, tensor in tensors:
                if name in state:
                    raise ValueError(f"{name} is given twice")
                if isinstance(tensor, str):
                    earlier = state.get(tensor)
                    if earlier is None:
                        raise ValueError(f"{name} shares {tensor}, which does not stand before it")
                    state[name] = _Reference(earlier.key, earlier.dtype, earlier.shape)
                    continue
                if tensor.dtype not in DTYPES.values():
                    raise ValueError(f"{name} is of dtype {tensor.dtype}, which is not written")
                state[name] = _Reference(str(len(archive.namelist())), tensor.dtype, tuple(tensor.shape))
                _write_member(
                    archive, f"data/{state[name].key}", name, tensor.detach().cpu().resolve_conj().resolve_neg()
                )
                del tensor  # before the next one is read
            text = io.BytesIO()
            _Pickler(text, 2).dump(state if entry is None else {entry: state, **(extra or {})})
            for member, data in (("data.pkl", text.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
                _write_member(archive, member, member, torch.frombuffer(bytearray(data), dtype=torch.uint8))
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise VlscaleError(f"{path}: cannot be written ({error}); check the folder and its space") from None
        raise


def _write_member(archive: zipfile.ZipFile, member: str, name: str, tensor: Tensor) -> None:
    entry = zipfile.ZipInfo(f"archive/{member}")  # its default date is fixed, so that files can be compared
    entry.file_size = tensor.numel() * tensor.dtype.itemsize
    wide = entry.file_size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule; its header then grows by 20 bytes
    assert archive.fp is not None
    ahead = archive.fp.tell() + 30 + len(entry.filename) + (20 if wide else 0) + 4
    padding = -ahead % _ALIGNMENT
    entry.extra = struct.pack("<2s H", b"FB", padding) + b"Z" * padding
    with archive.open(entry, "w", force_zip64=wide) as stream:
        write_tensor(stream, name, tensor, TensorInfo(tensor.dtype, tuple(tensor.shape)))  # type: ignore[arg-type]
