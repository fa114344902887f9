"""What ``torch.save`` writes, read without unpickling.

Two formats (``torch/serialization.py``). Since PyTorch 1.6 a zip archive of stored members: ``NAME/data.pkl`` is a
pickle whose persistent ids name storages, ``NAME/data/KEY`` are their bytes, ``NAME/byteorder`` tells their order.
Before that, five pickles in a row (a magic number, the protocol's version, facts of the machine, the value, the keys of
the storages), then for each key an int64 count of elements and these, little-endian.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from vlscale.convert.byte_files import ByteFile, ByteStream
from vlscale.convert.pickle_calls import NameKey
from vlscale.convert.pickle_values import Grammar, Limits, plain, read_pickle
from vlscale.convert.source import TensorInfo, check_tensor
from vlscale.convert.torch_pickle import StoredTensor, TorchNames, dense_stride
from vlscale.convert.torch_zip import ZipDirectory
from vlscale.errors import VlscaleError
from vlscale.untrusted import MOST_NAME, check_count, is_sane_name, shown

STATE_ENTRIES = ("model", "state_dict", "module", "model_state_dict")
"""Entries of a checkpoint that hold the weights, the likeliest first (MMF, Lightning, DeepSpeed, habit)."""
MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_HEAD_LIMITS = Limits(steps=1000, text=1 << 16)
_LIMITS = Limits(inline=1 << 20)
_MOST_PICKLE = 1 << 28
_MOST_REPEATED = 1 << 26
_SLAB = 1 << 23


class TorchFile:
    """The value in a file of ``torch.save``, with a :class:`StoredTensor` for each tensor; closes its file.

    Args:
        path: of the file.
        calls: further names and our own functions for them, see :class:`Grammar`.
        harmless: further packages whose objects stay opaque.

    Attributes:
        value: plain values, stored tensors and other leaves; it may hold itself, see :func:`plain`.

    Raises:
        VlscaleError: not such a file, damaged or hostile.
    """

    def __init__(
        self,
        path: Path,
        calls: Mapping[NameKey, Callable[..., Any]] | None = None,
        harmless: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.file = ByteFile(path)
        self.little = True
        self._names = TorchNames(str(path), calls or {}, harmless)
        self._places: dict[str, tuple[int, int]] = {}  # key -> first byte, bytes
        try:
            is_zip = self.file.read(str(path), 0, min(4, self.file.size)) == b"PK\x03\x04"
            self.value = self._open_zip() if is_zip else self._open_legacy()
        except BaseException:
            self.file.close()
            raise

    def _open_zip(self) -> Any:
        members = ZipDirectory(self.file).members
        root = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), None)
        if root is None or root.count("/") != 1:
            raise VlscaleError(f"{self.path}: is a zip archive without data.pkl; expected a file of torch.save")
        if any(name.startswith(f"{root}code/") for name in members):
            raise VlscaleError(f"{self.path}: is a TorchScript archive; save the module's state_dict() with torch.save")
        if f"{root}byteorder" in members:
            start, length = members[f"{root}byteorder"]
            order = self.file.read(str(self.path), start, min(length, 16))
            if order not in (b"little", b"big"):
                raise VlscaleError(f"{self.path}: has the byte order {shown(order)}, expected little or big")
            self.little = order == b"little"
        start, length = members[f"{root}data.pkl"]
        if length > _MOST_PICKLE:
            raise VlscaleError(f"{self.path}: its data.pkl has {length} bytes, expected at most {_MOST_PICKLE}")
        where = f"{self.path} (data.pkl)"
        text = io.BytesIO(self.file.read(where, start, length))
        value = read_pickle(where, text, length, self._names.grammar, _LIMITS)
        for key in self._names.counts:
            if f"{root}data/{key}" not in members:
                raise VlscaleError(f"{self.path}: has no storage {shown(key)}; it is truncated, fetch it again")
            self._places[key] = members[f"{root}data/{key}"]
        return value

    def _open_legacy(self) -> Any:
        where, size = str(self.path), self.file.size
        stream = io.BufferedReader(ByteStream(self.file))
        if _magic(where, stream, size) != MAGIC:
            raise VlscaleError(f"{where}: is no file of torch.save (neither a zip archive nor the format before 1.6)")
        if read_pickle(where, stream, size, Grammar(), _HEAD_LIMITS) != _VERSION:
            raise VlscaleError(
                f"{where}: is not of version {_VERSION} of torch.save's format before 1.6; save it again"
            )
        facts = read_pickle(f"{where} (sys_info)", stream, size, Grammar(), _HEAD_LIMITS)
        if type(facts) is not dict or facts.get("little_endian") is not True:
            raise VlscaleError(f"{where}: does not come from a little-endian machine; save it again with PyTorch 1.6")
        value = read_pickle(where, stream, size, self._names.grammar, _LIMITS)
        keys = read_pickle(f"{where} (storage keys)", stream, size, Grammar(), _LIMITS)
        counts = self._names.counts
        if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
            raise VlscaleError(f"{where}: its list of storages is damaged, fetch it again")
        if set(keys) != set(counts):
            raise VlscaleError(f"{where}: its list of storages is not that of its tensors; fetch it again")
        place = stream.tell()
        for key in keys:
            dtype, count = counts[key]
            (found,) = struct.unpack("<q", self.file.read(where, place, 8))
            length = count * dtype.itemsize
            if found != count or length > size - place - 8:
                raise VlscaleError(f"{where}: storage {shown(key)} is truncated or lies about its size; fetch it again")
            self._places[key] = (place + 8, length)
            place += 8 + length
        if place != size:
            raise VlscaleError(f"{where}: has {size - place} bytes behind its last storage; fetch it again")
        return value

    def check(self, where: str, tensor: StoredTensor) -> TensorInfo:
        """Return what a tensor is, or refuse one that does not lie within its storage.

        Raises:
            VlscaleError: negative or absurd sizes, or elements outside of the storage or of the file.
        """
        info = check_tensor(where, tensor.dtype, tensor.shape)
        size, storage = tensor.dtype.itemsize, tensor.storage
        if self._places[storage.key][1] < (storage.first + storage.count) * storage.dtype.itemsize:
            raise VlscaleError(f"{where}: its storage {shown(storage.key)} is truncated; fetch the file again")
        room = storage.count * storage.dtype.itemsize
        if len(tensor.stride) != len(tensor.shape) or tensor.offset < 0 or any(step < 0 for step in tensor.stride):
            raise VlscaleError(f"{where}: has a negative offset or stride, or too few of them; the file is damaged")
        last = tensor.offset + _span(tensor.shape, tensor.stride)
        if last * size > room:
            raise VlscaleError(f"{where}: ends at byte {last * size} of its storage of {room}; the file is damaged")
        if info.nbytes > max(room, _MOST_REPEATED):
            raise VlscaleError(f"{where}: repeats {room} bytes to {info.nbytes}; save it after contiguous()")
        return info

    def place(self, tensor: StoredTensor) -> tuple[Any, ...]:
        """Return what two tensors have in common if and only if they are the same view of the same bytes."""
        start = tensor.storage.first * tensor.storage.dtype.itemsize + tensor.offset * tensor.dtype.itemsize
        return tensor.storage.key, start, tensor.dtype, tensor.shape, tensor.stride

    def read(self, where: str, tensor: StoredTensor) -> Tensor:
        """Return a tensor, contiguous; of a strided view, memory for 8 MiB more (or one row of it) is taken.

        Raises:
            VlscaleError: see :meth:`check`; the file is damaged, or has been changed since it was opened.
        """
        info = self.check(where, tensor)
        begin = self._places[tensor.storage.key][0] + self.place(tensor)[1]
        shape, stride = tensor.shape, tensor.stride
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=tensor.dtype)
        steps = zip(shape, stride, dense_stride(shape), strict=True)
        if all(side == 1 or step == dense for side, step, dense in steps):
            found = self._flat(where, info.dtype, begin, math.prod(shape))
            return found.reshape(shape)
        axis = max(range(len(shape)), key=lambda axis: stride[axis] if shape[axis] > 1 else -1)
        row = _span((*shape[:axis], 1, *shape[axis + 1 :]), stride)
        step = max(1, (_SLAB // info.dtype.itemsize - row) // max(1, stride[axis]) + 1)
        result = torch.empty(shape, dtype=info.dtype)
        for first in range(0, shape[axis], step):
            count = min(step, shape[axis] - first)
            start = begin + first * stride[axis] * info.dtype.itemsize
            slab = self._flat(where, info.dtype, start, row + (count - 1) * stride[axis])
            result.narrow(axis, first, count).copy_(slab.as_strided((*shape[:axis], count, *shape[axis + 1 :]), stride))
        return result

    def _flat(self, where: str, dtype: torch.dtype, begin: int, count: int) -> Tensor:
        flat = self.file.tensor(where, TensorInfo(dtype, (count,)), begin)
        if not self.little:
            rows = flat.view(torch.uint8).view(-1, dtype.itemsize // (2 if dtype.is_complex else 1))
            rows.copy_(rows.flip(1))
        return flat

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))


def _magic(where: str, stream: BinaryIO | io.BufferedReader, size: int) -> Any:
    try:
        return read_pickle(where, stream, size, Grammar(), _HEAD_LIMITS)
    except VlscaleError:
        return None


def recognise(path: Path) -> bool:
    """Say whether a file is what ``torch.save`` writes, in either format, by its beginning and its members' names."""
    try:
        with ByteFile(path) as file:
            head = file.read(str(path), 0, min(file.size, 4096))
            if head.startswith(b"PK\x03\x04"):
                # torch writes data.pkl first, which tells of a truncated file too.
                return b"/data.pkl" in head[:300] or any(
                    name.endswith("/data.pkl") for name in ZipDirectory(file).members
                )
            return head.startswith(b"\x80") and _magic(str(path), io.BytesIO(head), len(head)) == MAGIC
    except VlscaleError:
        return False


def open_source(path: Path, entry: str | None = None) -> TorchSource:
    """Open a checkpoint of ``torch.save``.

    Args:
        path: of the file.
        entry: which entry of it holds the weights; None chooses, see :class:`TorchSource`.

    Raises:
        VlscaleError: see :class:`TorchFile`; no tensors; names that stand twice.
    """
    return TorchSource(path, entry)


class TorchSource:
    """A :class:`~vlscale.convert.source.TensorSource` of a file of ``torch.save``.

    The weights are the first of :data:`STATE_ENTRIES` that is a dict with tensors, else the only entry that is one
    where the file holds no tensors beside it, else the whole value. Containers within are flattened with dots.
    ``extra`` tells the rest; tensors there (of an optimiser) are described and cannot be read.
    """

    format = "torch"

    def __init__(self, path: Path, entry: str | None = None) -> None:
        self.path = path
        self.files = (path,)
        self._file = TorchFile(path)
        try:
            state, rest = _choose(str(path), self._file.value, entry)
            self._stored: dict[str, StoredTensor] = {}
            left: dict[str, Any] = {}
            self._flatten("", state, left, 0)
            self.extra: Mapping[str, Any] = plain(str(path), {**left, **rest})
            if not self._stored:
                raise VlscaleError(f"{path}: holds no tensors; expected a model's state_dict()")
            self.tensors = {name: self._file.check(self._where(name), each) for name, each in self._stored.items()}
        except BaseException:
            self._file.close()
            raise
        self.aliases: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in self._stored.items():
            earlier = first.setdefault(self._file.place(tensor), name)
            if earlier != name:
                self.aliases[name] = earlier

    def _where(self, name: str) -> str:
        return f"{self.path}: {shown(name)}"

    def _flatten(self, prefix: str, value: Any, left: dict[str, Any], depth: int) -> None:
        if type(value) is StoredTensor:
            if not is_sane_name(prefix):
                raise VlscaleError(f"{self._where(prefix)} is no name for a tensor; it is damaged or hostile")
            if prefix in self._stored:
                raise VlscaleError(f"{self._where(prefix)} stands twice, nested and flat; it is damaged or hostile")
            check_count(self.path, len(self._stored) + 1)
            self._stored[prefix] = value
        elif len(prefix) > MOST_NAME:  # names are joined: long ones would take memory for each of their items
            raise VlscaleError(f"{self._where(prefix)} is a name of more than {MOST_NAME} characters; it is hostile")
        elif type(value) in (dict, list, tuple) and value and depth < 16:
            items = value.items() if type(value) is dict else enumerate(value)
            for count, (key, each) in enumerate(items):
                check_count(self.path, max(count, len(left)))
                if type(key) not in (str, int):
                    left[f"{prefix}.{type(key).__name__}"] = each
                else:
                    self._flatten(f"{prefix}.{key}" if prefix else str(key), each, left, depth + 1)
        else:
            left[prefix] = value

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, contiguous, of the stored dtype.

        Raises:
            VlscaleError: no such name; the file is damaged, or has been changed since it was opened.
        """
        if name not in self._stored:
            raise VlscaleError(f"{self._where(name)}: no such tensor")
        return self._file.read(self._where(name), self._stored[name])

    def __enter__(self) -> TorchSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _choose(where: str, value: Any, entry: str | None) -> tuple[Any, dict[Any, Any]]:
    if type(value) is not dict:
        if entry is not None:
            raise VlscaleError(f"{where}: holds no entries, so none named {shown(entry)}; leave the entry out")
        return value, {}
    states = [key for key, each in value.items() if type(each) is dict and _holds_tensors(each)]
    flat = any(type(each) is StoredTensor for each in value.values())
    if entry is not None and entry not in states:
        found = ", ".join(shown(key) for key in states if type(key) is str) or "none"
        raise VlscaleError(f"{where}: has no entry {shown(entry)} with tensors; there are: {found}")
    chosen = entry or next((name for name in STATE_ENTRIES if name in states), None)
    if chosen is None and len(states) == 1 and not flat:
        chosen = states[0]
    if chosen is None:
        return value, {}
    return value[chosen], {key: each for key, each in value.items() if key != chosen}


def _holds_tensors(value: dict[Any, Any]) -> bool:
    return any(type(each) is StoredTensor for each in value.values())
