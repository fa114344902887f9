"""The names in the pickles of ``torch.save``: storages by their persistent ids, and tensors as views of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlscale.convert.numpy_values import NUMPY_CALLS
from vlscale.convert.pickle_calls import Leaf, Name, NameKey
from vlscale.convert.pickle_values import Grammar
from vlscale.untrusted import check_count

STORAGES: Mapping[str, torch.dtype] = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}
_DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"),
    *("complex128", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
DTYPES = {name: dtype for name in _DTYPE_NAMES if isinstance(dtype := getattr(torch, name, None), torch.dtype)}
_DENSE = "holds a {} tensor, expected dense ones; convert it (to_dense(), dequantize()) and save it again"
_REFUSED: dict[NameKey, str] = {
    **{("torch._utils", f"_rebuild_{kind}_tensor"): _DENSE.format(kind) for kind in ("sparse", "nested", "wrapper")},
    **{("torch._utils", f"_rebuild_sparse_{kind}_tensor"): _DENSE.format("sparse") for kind in ("csr", "compressed")},
    **{("torch", f"{kind}Storage"): _DENSE.format("quantised") for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2")},
    ("torch._utils", "_rebuild_qtensor"): _DENSE.format("quantised"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "holds a tensor without data (device meta); save real weights",
}


@dataclass(frozen=True, slots=True)
class _Storage(Leaf):
    """A storage as a tensor refers to it: elements ``first`` to ``first + count`` of the file's storage ``key``."""

    key: str
    dtype: torch.dtype
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor(Leaf):
    """A tensor that still lies in the file; ``offset`` and ``stride`` count elements of its storage."""

    storage: _Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def plain(self) -> Any:
        """Return its dtype and shape, as text."""
        return f"<tensor {self.dtype} {list(self.shape)}>"


def _sizes(value: Any) -> tuple[int, ...]:
    value = value.items if type(value) is _Size else value
    if type(value) is not tuple or len(value) > 64 or any(type(each) is not int for each in value):
        raise ValueError("sizes or strides that are no integers")
    return value


@dataclass(frozen=True, slots=True)
class _Size(Leaf):
    items: tuple[int, ...]

    def plain(self) -> Any:
        return list(self.items)


@dataclass(frozen=True, slots=True)
class _Text(Leaf):
    text: str

    def plain(self) -> Any:
        return self.text


def _device(kind: Any, index: Any = 0) -> _Text:
    if type(kind) is not str or type(index) is not int:
        raise ValueError("a device without a name")
    return _Text(f"{kind[:40]}:{index}")


class TorchNames:
    """The names of torch's pickles, and the storages that the persistent ids have named so far."""

    def __init__(self, where: str, calls: Mapping[NameKey, Callable[..., Any]], harmless: Iterable[str]) -> None:
        self.where = where
        self.counts: dict[str, tuple[torch.dtype, int]] = {}  # key -> as it was named first
        self._tensors = 0
        rebuilders = {
            "_rebuild_tensor": self._tensor,
            "_rebuild_tensor_v2": self._tensor,
            "_rebuild_tensor_v3": self._tensor_v3,
            "_rebuild_parameter": self._parameter,
            "_rebuild_parameter_with_state": self._parameter,
        }
        self._rebuilders: dict[NameKey, Any] = {("torch._utils", name): call for name, call in rebuilders.items()}
        known = {
            **self._rebuilders,
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            ("torch", "Size"): lambda sizes=(): _Size(_sizes(sizes)),
            ("torch", "device"): _device,
            ("torch.nn.parameter", "Parameter"): _refuse_call,
            ("torch", "Tensor"): _refuse_call,
        }
        values: dict[NameKey, Any] = {("torch", name): dtype for name, dtype in DTYPES.items()}
        for module in ("torch", "torch.cuda"):
            values.update({(module, name): _Kind(dtype) for name, dtype in STORAGES.items()})
        values["torch.storage", "UntypedStorage"] = _Kind(torch.uint8)
        names = Grammar().harmless | frozenset(harmless)
        self.grammar = Grammar({**NUMPY_CALLS, **known, **calls}, values, names, self._storage, _REFUSED)

    def _storage(self, key: Any) -> _Storage:
        if type(key) is not tuple or len(key) not in (5, 6) or key[0] != "storage" or type(key[1]) is not _Kind:
            raise ValueError("a persistent id that is no storage")
        _word, kind, name, _device, count = key[:5]
        if type(name) is not str or type(count) is not int or count < 0:
            raise ValueError("a storage without a key or size")
        known = self.counts.setdefault(name, (kind.dtype, count))
        if known != (kind.dtype, count):
            raise ValueError("a storage of two sizes or dtypes")
        check_count(Path(self.where), len(self.counts))
        first = 0
        if len(key) == 6 and key[5] is not None:  # before PyTorch 0.4, a storage could be a view of another one
            _view, first, length = key[5]
            if type(first) is not int or type(length) is not int or first < 0 or not 0 <= length <= count - first:
                raise ValueError("a view that leaves its storage")
            count = length
        return _Storage(name, kind.dtype, first, count)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
        if type(storage) is not _Storage:
            raise ValueError("a tensor without a storage")
        return self._stored(storage, storage.dtype, offset, shape, stride, rest)

    def _tensor_v3(self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, *rest: Any) -> Any:
        dtype = rest[0]
        if type(storage) is not _Storage or storage.dtype != torch.uint8 or type(dtype) is not torch.dtype:
            raise ValueError("a tensor without an untyped storage or dtype")
        return self._stored(storage, dtype, offset, shape, stride, (grad, hooks, *rest[1:]))

    def _stored(
        self, storage: _Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any, rest: tuple[Any, ...]
    ) -> StoredTensor:
        self._tensors += 1
        check_count(Path(self.where), self._tensors)
        if type(offset) is not int or len(rest) > 3 or any(each for each in rest[1:]):
            raise ValueError("a tensor with hooks, a conjugate or a negative view")
        return StoredTensor(storage, dtype, _sizes(shape), _sizes(stride), offset)

    def _parameter(self, tensor: Any, _grad: Any = None, hooks: Any = None, _state: Any = None) -> StoredTensor:
        if type(tensor) is not StoredTensor or hooks:
            raise ValueError("a parameter without a tensor, or with hooks")
        return tensor

    def _from_type(self, function: Any, kind: Any, arguments: Any, _state: Any) -> StoredTensor:
        call = self._rebuilders.get((function.module, function.name)) if type(function) is Name else None
        if call is None or type(kind) is not Name or type(arguments) is not tuple:
            raise ValueError("a tensor of a class of its own")
        result: StoredTensor = call(*arguments)
        return result


@dataclass(frozen=True, slots=True)
class _Kind(Leaf):
    """A class of storages."""

    dtype: torch.dtype


def _refuse_call(*_arguments: Any) -> Any:
    raise ValueError("a call of a tensor's class")


def dense_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
