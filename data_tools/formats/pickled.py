"""Values of plain types and numpy arrays out of the pickles of records, without unpickling.

The pickle is run by the interpreter that reads checkpoints, :mod:`vlscale.convert.pickle_values`: nothing is imported,
called or constructed by name. Here its values are made arrays of plain numbers, and anything else is refused.
"""

from __future__ import annotations

import io
from typing import Any

from data_tools.formats.arrays import FieldError, from_description
from vlscale.convert import pickle_values
from vlscale.convert.numpy_values import NUMPY_CALLS, NumpyArray
from vlscale.errors import VlscaleError

_MAX_ITEMS = 1 << 20
_MAX_DEPTH = 16
_GRAMMAR = pickle_values.Grammar(calls=NUMPY_CALLS, harmless=frozenset())
_PLAIN = (bool, int, float, str, bytes)
_KEYS = (str, bytes, int)


def read_pickle(field: str, blob: bytes, max_items: int = _MAX_ITEMS) -> Any:
    """Return the value of a pickle of plain types (protocols 2 to 5).

    Args:
        field: name for errors.
        blob: the pickle; it is in memory already, so its strings and arrays need no other bound.
        max_items: steps that it may take, and values that it may hold.

    Raises:
        FieldError: it is damaged, or needs anything beyond plain types and numpy arrays of plain numbers.
    """
    limits = pickle_values.Limits(steps=max_items, text=len(blob), inline=len(blob))
    try:
        value = pickle_values.read_pickle(field, io.BytesIO(blob), len(blob), _GRAMMAR, limits)
    except VlscaleError as error:  # its cures are for checkpoints
        raise FieldError(field, str(error).removeprefix(f"{field}: ").partition("; ")[0]) from None
    return _Finish(field, max_items)(value)


class _Finish:
    """Makes arrays in a value; anything that is neither plain nor an array is refused.

    What is shared is copied, so the copies are counted: a few bytes may refer to each other a million times.
    """

    def __init__(self, field: str, max_items: int) -> None:
        self._field = field
        self._left = max_items

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            raise FieldError(self._field, "is a pickle that is nested too deep or refers to itself too often")
        if type(value) is NumpyArray and value.dtype is not None:
            return self._array(value)
        if type(value) is dict:
            if not all(type(key) in _KEYS for key in value):
                raise FieldError(self._field, "is a pickle with a key that is neither text nor number")
            return {key: self(each, depth + 1) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self(each, depth + 1) for each in value)
        if value is None or type(value) in _PLAIN:
            return value
        raise FieldError(self._field, f"is a pickle of {type(value).__name__}, expected plain types")

    def _array(self, array: NumpyArray) -> Any:
        """An array, read-only; a number of numpy's where it has no sides."""
        assert array.dtype is not None
        one_byte = array.dtype.letters.endswith("1")
        spelled = array.dtype.letters if one_byte else array.dtype.plain()
        sides = list(array.shape)
        if not array.fortran:
            return from_description(self._field, spelled, sides, array.data)[()]
        return from_description(self._field, spelled, sides[::-1], array.data).transpose()[()]
