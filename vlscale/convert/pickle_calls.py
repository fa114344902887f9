"""What the names in a pickle may stand for: inert leaves, and our own constructors of plain values by an allow-list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NameKey = tuple[str, str]
"""Module and name."""
_KEYS = (str, int, float, bool, bytes, type(None))


def show(value: Any) -> str:
    """Return a text from a file as short plain ASCII on one line, for a message."""
    text = value if type(value) is str else value.decode("latin-1") if type(value) is bytes else type(value).__name__
    return ascii(text[:100])[1:-1]


class Leaf:
    """What stands in a value for something that is not plain. A constructor's results derive from it."""

    def build(self, state: Any) -> None:
        """Take the state that the pickle gives to the object (opcode BUILD).

        Raises:
            ValueError: it has none.
        """
        raise ValueError("a state for something that has none")

    def plain(self) -> Any:
        """Return what to show of it among plain values; the result may hold leaves again."""
        return f"<{type(self).__name__}>"


@dataclass(frozen=True, slots=True)
class Name(Leaf):
    """A function or class that a file names; inert."""

    module: str
    name: str

    def plain(self) -> Any:
        """Return the dotted name."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Blob(Leaf):
    """A long string that was left where it lies.

    Attributes:
        start: first byte in the file.
        length: bytes in the file.
        kind: ``"bytes"``; ``"text"``, UTF-8; or ``"latin1"``, bytes that stand as the UTF-8 of their latin-1 text,
            which is how protocols below 3 spell them.
    """

    start: int
    length: int
    kind: str

    def plain(self) -> Any:
        """Return its kind and length."""
        return f"<{self.length} bytes of {self.kind}>"


@dataclass(slots=True)
class Opaque(Leaf):
    """An object of a class that we neither have nor want: the class's name and what it was made from."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] | list[Any] | None = None

    def build(self, state: Any) -> None:
        """Keep the state as it is."""
        self.state = state

    def plain(self) -> Any:
        """Return ``{"class": name, ...}`` with the parts that it has."""
        parts = {"arguments": list(self.arguments) or None, "state": self.state, "items": self.items}
        return {"class": self.name, **{key: part for key, part in parts.items() if part is not None}}


def checked_key(key: Any) -> Any:
    """Return a key of a dict or member of a set that may be hashed.

    Raises:
        ValueError: it is neither text, number, name nor a short tuple of these.
    """
    # The hash of a tuple recurses in C: a deeply nested one would end the process.
    flat = key if type(key) is tuple else (key,)
    if not all(type(part) in _KEYS or type(part) is Name for part in flat):
        raise ValueError("a key that is neither text nor number")
    if type(key) is tuple and (len(key) > 8 or any(type(part) in (str, bytes) and len(part) > 256 for part in key)):
        raise ValueError("a key of too many parts")
    return key


def put(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Add an item to a dict.

    Raises:
        ValueError: the key may not be one, see :func:`checked_key`, or stands there already.
    """
    if checked_key(key) in target:
        raise ValueError(f"the key {show(key) if type(key) is str else show(repr(key))} stands twice")
    target[key] = value


def _encode(text: Any, encoding: Any) -> Any:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError("an encoding that is not latin-1")
    if type(text) is Blob and text.kind == "text":
        return Blob(text.start, text.length, "latin1")
    if type(text) is not str:
        raise ValueError("an encoding of something that is no text")
    return text.encode("latin-1")


def _bytes(*arguments: Any) -> bytes:
    if not arguments:
        return b""
    data = arguments[0] if len(arguments) == 1 else _encode(*arguments)
    if type(data) is not bytes:
        raise ValueError("bytes of something else")
    return data


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number of something else")
    return complex(real, imaginary)


def _items(values: Any = ()) -> list[Any]:
    if type(values) not in (list, tuple):
        raise ValueError("a sequence of something else")
    return list(values)


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = dict(pairs) if type(pairs) is dict else {}
    for pair in () if type(pairs) is dict else _items(pairs):
        key, value = _items(pair)
        put(found, key, value)
    return found


def _default_dict(factory: Any = None, *pairs: Any) -> dict[Any, Any]:
    if factory is not None and type(factory) is not Name:
        raise ValueError("a default that is no name")
    return _dict(*pairs)


def _set(values: Any = ()) -> set[Any]:
    return {checked_key(value) for value in _items(values)}


_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "set": _set,
    "frozenset": _set,
    "list": _items,
    "tuple": lambda values=(): tuple(_items(values)),
    "dict": _dict,
    "complex": _complex,
    "bytes": _bytes,
    "bytearray": _bytes,
}
PLAIN_CALLS: Mapping[NameKey, Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _dict,
    ("collections", "Counter"): _dict,
    ("collections", "defaultdict"): _default_dict,
    **{(module, name): call for module in ("builtins", "__builtin__") for name, call in _BUILTINS.items()},
}
"""The constructors of plain values, by their names in pickles, with our own function for each."""
TYPES: frozenset[NameKey] = frozenset(
    {
        *((module, name) for module in ("builtins", "__builtin__") for name in ("int", "float", "str", "bool")),
        ("typing", "Any"),
        ("numpy", "ndarray"),
    }
)
"""Types that objects refer to; on the stack they are a :class:`Name` and can do nothing."""
HARMLESS = frozenset({"argparse", "collections", "numpy", "omegaconf", "mmf", "pythia"})
"""Packages whose objects stay :class:`Opaque`: what MMF (formerly Pythia) leaves in its checkpoints."""
