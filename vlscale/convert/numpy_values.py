"""What the names in numpy's pickles stand for: arrays and scalars of plain numbers, their bytes left in the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlscale.convert.pickle_calls import Blob, Leaf, NameKey, show

_LETTERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"})


class NumpyDtype(Leaf):
    """A dtype of plain numbers: ``letters`` such as ``f4``, and its byte ``order`` once the state is known."""

    def __init__(self, letters: Any, *flags: Any) -> None:
        if type(letters) is not str or letters not in _LETTERS or any(flag not in (0, 1) for flag in flags):
            raise ValueError(f"the dtype {show(letters)}, expected plain numbers")
        self.letters, self.order = letters, "<"

    def build(self, state: Any) -> None:
        """Take ``(version, byte order, None, None, None, -1, -1, flags)``."""
        _version, order, *fields = state
        if order not in ("<", ">", "|", "=") or any(part is not None for part in fields[:3]):
            raise ValueError("a dtype of records, expected plain numbers")
        self.order = ">" if order == ">" else "<"

    def plain(self) -> Any:
        """Return it as numpy writes it."""
        return self.order + self.letters


class NumpyArray(Leaf):
    """An array of a pickle; its elements are checked against its shape once both are known.

    Attributes:
        dtype: None until the state is known.
        shape: sides.
        fortran: whether the elements stand column-major.
        data: the elements, or where they lie.
    """

    dtype: NumpyDtype | None = None
    shape: tuple[int, ...] = ()
    fortran = False
    data: bytes | Blob = b""

    def build(self, state: Any) -> None:
        """Take ``(version, shape, dtype, fortran, data)``.

        Raises:
            ValueError: damage, or elements that do not fill the shape.
        """
        _version, shape, dtype, fortran, data = state
        if self.dtype is not None or type(dtype) is not NumpyDtype or type(shape) is not tuple:
            raise ValueError("an array without a dtype or shape")
        if len(shape) > 32 or any(type(side) is not int or side < 0 for side in shape):
            raise ValueError("an array of an absurd shape")
        self.dtype, self.shape, self.fortran = dtype, shape, bool(fortran)
        # Python 2's bytes may be text as well, and were then taken for it.
        self.data = data.encode() if type(data) is str else data
        if type(self.data) not in (bytes, Blob) or (type(data) is Blob and data.kind == "text"):
            raise ValueError("an array without bytes")
        count = len(self.data) if isinstance(self.data, bytes) else self.data.length
        # Of bytes that stand as text, those above 127 take two; how many these are is seen when they are read.
        least = most = count
        if isinstance(self.data, Blob) and self.data.kind == "latin1":
            least = (count + 1) // 2
        if not least <= self.nbytes <= most:
            raise ValueError(f"an array of shape {list(shape)[:8]} in {count} bytes, expected {self.nbytes}")

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * (int(self.dtype.letters[1:]) if self.dtype else 0)

    def plain(self) -> Any:
        """Return its value if it is a single number, or what it is."""
        if self.shape == () and self.dtype is not None and isinstance(self.data, bytes):
            return np.frombuffer(self.data, self.dtype.plain())[0].item()
        return f"<numpy {self.dtype.plain() if self.dtype else 'nothing'} {list(self.shape)}>"


def _reconstruct(_class: Any, _shape: Any, _letters: Any) -> NumpyArray:
    return NumpyArray()


def _from_parts(data: Any, dtype: Any, shape: Any, order: Any = "C") -> NumpyArray:
    array = NumpyArray()
    array.build((1, shape, dtype, order == "F", data))
    return array


NUMPY_CALLS: Mapping[NameKey, Any] = {
    ("numpy", "dtype"): NumpyDtype,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", lambda dtype, data: _from_parts(data, dtype, ())),
            ("numeric", "_frombuffer", _from_parts),
        )
    },
}
"""What the names in numpy's pickles stand for: see :class:`Grammar`."""
