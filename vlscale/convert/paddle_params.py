"""PaddlePaddle's ``.pdparams``: a pickle of a dict from names to numpy arrays (facts: ``paddle.save`` of 2.x).

The arrays' bytes stay in the file until they are read. Protocol 4 holds them as they are; protocols 2 and 3 may hold
them as the UTF-8 of latin-1 text, and cut arrays of 1 GiB and more into slices that ``UnpackBigParamInfor@@`` lists.
Some versions store ``(name, array)`` instead of an array. Paddle has no uint16: such an array holds bfloat16.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.convert.byte_files import ByteFile, ByteStream
from vlscale.convert.numpy_values import NUMPY_CALLS, NumpyArray
from vlscale.convert.pickle_calls import Blob
from vlscale.convert.pickle_values import Grammar, plain, read_pickle
from vlscale.convert.source import TensorInfo, check_tensor
from vlscale.errors import VlscaleError
from vlscale.untrusted import check_count, is_sane_name, shown

BIG_PARAMETERS = "UnpackBigParamInfor@@"
STRUCTURED_NAMES = "StructuredToParameterName@@"
_HEAD = 4096
_PIECE = 1 << 22
_DTYPES = {
    **{"b1": torch.bool, "i1": torch.int8, "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8},
    **{"u2": torch.bfloat16, "f2": torch.float16, "f4": torch.float32, "f8": torch.float64},
    **{"c8": torch.complex64, "c16": torch.complex128},
}


@dataclass
class _Parameter:
    info: TensorInfo
    parts: list[NumpyArray] = field(default_factory=list)


def recognise(path: Path) -> bool:
    """Say whether a file begins as a pickle of protocol 2 to 5 that holds a dict whose first values are numpy's."""
    try:
        with ByteFile(path) as file:
            head = file.read(str(path), 0, min(file.size, _HEAD))
    except VlscaleError:
        return False
    is_pickle = len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5
    start = 11 if head[2:3] == b"\x95" else 2  # a frame's length follows its opcode
    return is_pickle and head[start : start + 1] in (b"}", b"c", b"\x8c") and b"numpy" in head


def open_source(path: Path) -> PaddleSource:
    """Open a ``.pdparams`` file.

    Raises:
        VlscaleError: it is none, damaged, or holds what is not plain numbers; see :func:`read_pickle`.
    """
    return PaddleSource(path)


class PaddleSource:
    """A :class:`~vlscale.convert.source.TensorSource` of a ``.pdparams`` file.

    ``extra`` holds ``StructuredToParameterName@@`` (our names -> Paddle's names) and whatever is no array.
    """

    format = "paddle"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = (path,)
        self._file = ByteFile(path)
        try:
            stream = io.BufferedReader(ByteStream(self._file))
            value = read_pickle(str(path), stream, self._file.size, Grammar(NUMPY_CALLS))
            if stream.tell() != self._file.size:
                raise VlscaleError(f"{path}: has bytes behind its end ({stream.tell()}); it is damaged, fetch it again")
            if type(value) is not dict:
                raise VlscaleError(f"{path}: holds no dict of arrays; save the model's state_dict() with paddle.save")
            self._arrange(value)
        except BaseException:
            self._file.close()
            raise

    def _arrange(self, value: dict[Any, Any]) -> None:
        check_count(self.path, len(value))
        slices = _slices(str(self.path), value.get(BIG_PARAMETERS, {}))
        self._parameters: dict[str, _Parameter] = {}
        rest = {}
        taken = {part for _shape, parts in slices.values() for part in parts}
        arrays = {name: _array(each) for name, each in value.items()}
        for name, (shape, parts) in slices.items():
            found = [arrays.get(part) for part in parts]
            if name in value or not all(found):
                raise VlscaleError(f"{self.path}: {shown(name)} lacks its slices; fetch the file again")
            self._add(name, shape, [part for part in found if part is not None])
        for name, array in arrays.items():
            if array is not None and name not in taken:
                self._add(name, array.shape, [array])
            elif array is None and name != BIG_PARAMETERS:
                rest[name] = value[name]
        self.tensors = {name: parameter.info for name, parameter in self._parameters.items()}
        if not self.tensors:
            raise VlscaleError(f"{self.path}: holds no array; expected the state_dict() of a model")
        self.extra: Mapping[str, Any] = plain(str(self.path), rest)
        self.aliases: dict[str, str] = {}
        first: dict[tuple[int, ...], str] = {}
        for name, parameter in self._parameters.items():
            earlier = first.setdefault(tuple(id(part) for part in parameter.parts), name)
            if earlier != name:
                self.aliases[name] = earlier

    def _add(self, name: Any, shape: tuple[int, ...], parts: list[NumpyArray]) -> None:
        if type(name) is not str or not is_sane_name(name):
            raise VlscaleError(
                f"{self.path}: has an array without a sane name, expected a dict of names; it is no such"
            )
        where = f"{self.path}: {shown(name)}"
        letters = {part.dtype.letters if part.dtype else "" for part in parts}
        dtype = _DTYPES.get(letters.pop()) if len(letters) == 1 else None
        if dtype is None:
            raise VlscaleError(f"{where}: is not of one of the dtypes {', '.join(_DTYPES)}; cast it and save it again")
        if len(parts) > 1 and any(part.fortran for part in parts):
            raise VlscaleError(f"{where}: has column-major slices, expected flat ones; the file is damaged")
        info = check_tensor(where, dtype, shape)
        if info.nbytes != sum(part.nbytes for part in parts):
            raise VlscaleError(f"{where}: needs {info.nbytes} bytes, its slices have others; the file is damaged")
        self._parameters[name] = _Parameter(info, parts)

    def read(self, name: str) -> Tensor:
        """Return a tensor (uint16 as bfloat16), row-major and little-endian whatever the file has.

        Raises:
            VlscaleError: the file is damaged, or has been changed since it was opened; no such name.
        """
        where = f"{self.path}: {shown(name)}"
        if name not in self._parameters:
            raise VlscaleError(f"{where}: no such tensor")
        parameter = self._parameters[name]
        try:
            flat = torch.empty(parameter.info.nbytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            raise VlscaleError(f"{where}: its {parameter.info.nbytes} bytes do not fit into memory") from None
        place = 0
        for part in parameter.parts:
            self._fill(where, flat[place : place + part.nbytes], part)
            place += part.nbytes
        shape, dtype, first = parameter.info.shape, parameter.info.dtype, parameter.parts[0]
        if dtype is torch.bool and flat.numel() and int(flat.max()) > 1:
            raise VlscaleError(f"{where}: holds a boolean {int(flat.max())}, expected 0 or 1; the file is damaged")
        if first.fortran:
            return flat.view(dtype).reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
        return flat.view(dtype).reshape(shape)

    def _fill(self, where: str, target: Tensor, part: NumpyArray) -> None:
        data = part.data
        if isinstance(data, bytes):
            if data:
                target.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        else:
            self._copy(where, target, data)
        if part.dtype is not None and part.dtype.order == ">":
            size = int(part.dtype.letters[1:]) // (2 if part.dtype.letters.startswith("c") else 1)
            rows = target.view(-1, size)
            rows.copy_(rows.flip(1))

    def _copy(self, where: str, target: Tensor, data: Blob) -> None:
        """Copy a string in pieces, and undo ``text.encode("latin-1")``: whole, it would take three times the memory."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        place, end = 0, data.start + data.length
        try:
            for start in range(data.start, end, _PIECE):
                count = min(_PIECE, end - start)
                piece = self._file.read(where, start, count)
                if data.kind == "latin1":
                    piece = decoder.decode(piece, start + count == end).encode("latin-1")
                if piece and place + len(piece) <= target.numel():
                    target[place : place + len(piece)].copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
                place += len(piece)
        except ValueError as error:
            what = " ".join(str(error).split())[:80]
            raise VlscaleError(f"{where}: is no latin-1 text of its array ({what}); fetch the file again") from None
        if place != target.numel():
            raise VlscaleError(f"{where}: has {place} bytes, expected {target.numel()}; fetch the file again")

    def __enter__(self) -> PaddleSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _array(value: Any) -> NumpyArray | None:
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]
    if type(value) is not NumpyArray:
        return None
    return value if value.dtype is not None else None


def _slices(where: str, value: Any) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Parse ``UnpackBigParamInfor@@``: name -> original shape and the names of the slices, each used once."""
    found: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    used: set[str] = set()
    damage = VlscaleError(f"{where}: {BIG_PARAMETERS} is no table of shapes and slices; fetch the file again")
    if type(value) is not dict:
        raise damage
    for name, entry in value.items():
        shape: Any = entry.get("OriginShape") if type(entry) is dict else None
        parts: Any = entry.get("slices") if type(entry) is dict else None
        if type(name) is not str or type(shape) not in (tuple, list) or type(parts) not in (tuple, list) or not parts:
            raise damage
        if any(type(side) is not int for side in shape) or any(type(part) is not str for part in parts):
            raise damage
        if used & set(parts) or len(set(parts)) != len(parts):
            raise damage
        used |= set(parts)
        found[name] = (tuple(shape), list(parts))
    return found
