"""Values of plain types out of pickles, without unpickling: nothing is imported, called or constructed by name.

A pickle is a program for a stack machine. :func:`read_pickle` runs the opcodes that dicts, lists, tuples, strings,
bytes, numbers and numpy arrays of plain numbers are made of. The handful of functions that numpy's arrays name are
recognised by their names and replaced by our own strict constructors; every other name, and every other opcode, is
refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from data_tools.formats.arrays import FieldError, from_description, show, whole_number

_MAX_ITEMS = 1 << 20
_MARK = object()
_ROOTS = {"numpy.core", "numpy._core"}
_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    **{
        (f"{root}.{module}", name): name
        for root in _ROOTS
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}
"""The names that pickles of numpy values hold, and what we take each for."""


class _Name(str):
    """One of :data:`_NAMES`, on the stack."""


class _DType:
    """A dtype under construction: its letters, and its byte order once the state is known."""

    def __init__(self, letters: str) -> None:
        self.letters = letters
        self.order = "|"


class _Array:
    """An array under construction; ``value`` once its state is known."""

    value: Any = None


def read_pickle(field: str, blob: bytes, max_items: int = _MAX_ITEMS) -> Any:
    """Return the value of a pickle of plain types (protocols 0 to 5).

    Args:
        field: name for errors.
        blob: the pickle.
        max_items: opcodes that it may have.

    Raises:
        FieldError: it is damaged, or needs anything beyond plain types and numpy arrays of plain numbers.
    """
    machine = _Machine(field)
    try:
        for count, (opcode, argument, _position) in enumerate(pickletools.genops(blob)):
            if count > max_items:
                raise FieldError(field, f"is a pickle of more than {max_items} steps")
            if opcode.name == "STOP":
                return _Finish(field, max_items)(machine.stack.pop())
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error, OverflowError) as error:
        raise FieldError(field, f"is a damaged pickle ({str(error)[:80] or type(error).__name__})") from None
    raise FieldError(field, "is a pickle without an end")


class _Machine:
    def __init__(self, field: str) -> None:
        self.field = field
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Run one opcode."""
        if name in _PUSH:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME"):
            raise FieldError(self.field, f"is a pickle with the step {name}, expected plain types")

    def to_mark(self) -> list[Any]:
        """Pop everything above the last mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("no mark")
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def pop(self, count: int) -> list[Any]:
        """Pop ``count`` values, in the order they were pushed."""
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def tuple_of(self, count: int) -> None:
        """TUPLE1 to TUPLE3."""
        self.stack.append(tuple(self.pop(count)))

    def append(self, items: list[Any]) -> None:
        """APPEND, APPENDS."""
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("not a list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        """SETITEM, SETITEMS."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("not a dict")
        target.update(_pairs(items))

    def _name(self, argument: Any) -> None:
        if argument is None:
            module, name = self.pop(2)
        else:
            module, _, name = argument.partition(" ")
        if not (isinstance(module, str) and isinstance(name, str)) or (module, name) not in _NAMES:
            raise FieldError(self.field, f"is a pickle that needs {show(module)}.{show(name)}, expected plain types")
        self.stack.append(_Name(_NAMES[module, name]))

    def reduce(self) -> None:
        """REDUCE: a call of one of our names."""
        called, arguments = self.pop(2)
        if type(called) is not _Name or type(arguments) is not tuple:
            raise ValueError("a call of something that is no function")
        self.stack.append(self._call(called, arguments))

    def _call(self, called: str, arguments: tuple[Any, ...]) -> Any:
        if called == "_reconstruct":
            return _Array()
        if called == "dtype":
            return _DType(_letters(arguments[0]))
        if called == "encode":  # how protocols below 3 spell bytes
            text, encoding = arguments
            if type(text) is not str or encoding not in ("latin1", "latin-1"):
                raise ValueError("an encoding that is not latin-1")
            return text.encode("latin-1")
        if called == "bytes" and not arguments:
            return b""
        if called == "scalar":
            dtype, data = arguments
            return self._array(dtype, (), data)[()]
        if called == "_frombuffer":
            data, dtype, shape, order = arguments
            return self._array(dtype, shape, data, order == "F")
        raise ValueError(f"a call of {called}")

    def build(self) -> None:
        """BUILD: the state of an array or a dtype."""
        (state,) = self.pop(1)
        target = self.stack[-1]
        if type(state) is not tuple:
            raise ValueError("a state that is no tuple")
        if type(target) is _DType:
            if any(part is not None for part in state[2:5]):
                raise FieldError(self.field, "is an array of records, expected plain numbers")
            target.order = _letters(state[1])
        elif type(target) is _Array and target.value is None:
            _version, shape, dtype, fortran, data = state
            target.value = self._array(dtype, shape, data, bool(fortran))
        else:
            raise ValueError("a state for something that has none")

    def _array(self, dtype: Any, shape: Any, data: Any, fortran: bool = False) -> Any:
        if type(dtype) is not _DType:
            raise ValueError("an array without a dtype")
        if type(data) is str:  # protocol 0 of Python 2
            data = data.encode("latin-1")
        sizes = [whole_number(f"{self.field}.shape", size) for size in shape]
        order = "" if dtype.order == "|" else dtype.order
        flat = from_description(self.field, order + dtype.letters, sizes, data)
        return flat.reshape(sizes[::-1]).transpose() if fortran else flat


def _letters(value: Any) -> str:
    text = value.decode("ascii") if type(value) is bytes else value
    if type(text) is not str or len(text) > 4:
        raise ValueError("a dtype that is no text")
    return text


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if not all(type(key) in (str, bytes, int) for key in keys):
        raise ValueError("a key that is neither text nor number")
    return dict(zip(keys, items[1::2], strict=True))


class _Finish:
    """Replaces the arrays under construction in a value; anything else that is unfinished is refused.

    What is shared is copied, so the copies are counted: a few bytes may refer to each other a million times.
    """

    def __init__(self, field: str, max_items: int) -> None:
        self._field = field
        self._left = max_items

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self._left -= 1
        if depth > 16 or self._left < 0:
            raise FieldError(self._field, "is a pickle that is nested too deep or refers to itself too often")
        if type(value) is _Array and value.value is not None:
            return value.value
        if type(value) is dict:
            return {key: self(each, depth + 1) for key, each in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self(each, depth + 1) for each in value)
        plain = (bool, int, float, bytes, bytearray, np.generic, np.ndarray)
        if value is None or type(value) is str or isinstance(value, plain):
            return value
        kind = type(value).__name__.lstrip("_")
        raise FieldError(self._field, f"is a pickle of {kind}, expected plain types")


_PUSH = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_STEPS: dict[str, Callable[[_Machine], Any]] = {
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.to_mark())),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "LIST": lambda machine: machine.stack.append(machine.to_mark()),
    "DICT": lambda machine: machine.stack.append(_pairs(machine.to_mark())),
    "APPEND": lambda machine: machine.append(machine.pop(1)),
    "APPENDS": lambda machine: machine.append(machine.to_mark()),
    "SETITEM": lambda machine: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine: machine.set_items(machine.to_mark()),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "POP": lambda machine: machine.pop(1),
}
