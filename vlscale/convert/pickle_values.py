"""Values out of pickles, without unpickling: nothing is imported, and nothing that a file names is called.

A pickle is a program for a stack machine (opcodes: ``pickletools`` of the standard library). :func:`read_pickle` runs
the opcodes that plain values are made of, protocols 2 to 5. A name in the file stands for one of three things, all
given by the caller: a function of ours with strict arguments, a constant, or a class of a short list of packages whose
objects stay :class:`Opaque`. Every other name and every other opcode is refused. Long strings are left in the file as
a :class:`Blob`, so that parsing a checkpoint does not load its arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from vlscale.convert.pickle_calls import (
    HARMLESS,
    PLAIN_CALLS,
    TYPES,
    Blob,
    Leaf,
    Name,
    NameKey,
    Opaque,
    checked_key,
    put,
    show,
)
from vlscale.errors import VlscaleError

_MOST_DEPTH = 64
_MOST_NODES = 1_000_000
_MOST_LINE = 1024
_MOST_INTEGER = 256
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error)


@dataclass(frozen=True)
class Grammar:
    """What the names and persistent ids of a pickle may stand for.

    Attributes:
        calls: our functions, called with the file's arguments, which they check; a ``ValueError`` or ``TypeError`` is
            told as damage. :data:`PLAIN_CALLS` is always included.
        values: names that stand for a constant.
        harmless: top-level packages whose classes make :class:`Opaque` objects.
        persistent: turns a persistent id into its object; None refuses them.
        refused: names with a reason of their own to be refused, and the cure.
    """

    calls: Mapping[NameKey, Callable[..., Any]] = field(default_factory=dict)
    values: Mapping[NameKey, Any] = field(default_factory=dict)
    harmless: frozenset[str] = HARMLESS
    persistent: Callable[[Any], Any] | None = None
    refused: Mapping[NameKey, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Bounds of one pickle.

    Attributes:
        steps: opcodes, and a part of one for each item that a constructor copies.
        text: bytes of all strings that are not left in the file.
        inline: longest string, in bytes, that is taken out of the file.
    """

    steps: int = 4_000_000
    text: int = 64 << 20
    inline: int = 4096


def read_pickle(where: str, stream: BinaryIO, size: int, grammar: Grammar, limits: Limits | None = None) -> Any:
    """Return the value of the pickle at the stream's position, and leave the stream behind it.

    Args:
        where: file (and part of it), for messages.
        stream: seekable and buffered.
        size: position at which it ends.
        grammar: what its names mean.
        limits: bounds of time and memory.

    Returns:
        Plain values, :class:`Leaf` objects and what the grammar's functions return; an OrderedDict is a dict, bytes
        and bytearrays are bytes. References within the pickle are kept, so that the value may hold itself; see
        :func:`plain`.

    Raises:
        VlscaleError: it is damaged, exceeds a limit, holds a key twice, or needs a name or opcode that is not allowed.
    """
    machine = _Machine(where, stream, size, grammar, limits or Limits())
    try:
        return machine.run()
    except _DAMAGE as error:
        what = show(str(error)) or type(error).__name__
        raise VlscaleError(f"{where}: is a damaged pickle ({what}) near byte {stream.tell()}; fetch it again") from None


class _Machine:
    def __init__(self, where: str, stream: BinaryIO, size: int, grammar: Grammar, limits: Limits) -> None:
        self.where, self.stream, self.size, self.grammar, self.limits = where, stream, size, grammar, limits
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below the open marks, as in CPython's own machine
        self.memo: dict[int, Any] = {}
        self.steps = limits.steps
        self.text = limits.text

    def run(self) -> Any:
        while True:
            code = self.stream.read(1)
            self.charge(1)
            if code == b".":
                if self.marks or len(self.stack) != 1:
                    raise ValueError("values are left on the stack")
                return self.stack[0]
            step = _STEPS.get(code)
            if step is None:
                name = _REFUSED.get(code, f"the unknown step 0x{code.hex()}")
                raise VlscaleError(f"{self.where}: is a pickle with {name}, expected plain values; it is not read")
            step(self)

    def charge(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise VlscaleError(f"{self.where}: takes more than {self.limits.steps} steps to parse; it is no checkpoint")

    def take(self, count: int) -> bytes:
        data = self.stream.read(count)
        if len(data) != count:
            raise ValueError("it ends too early")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def line(self) -> str:
        data = self.stream.readline(_MOST_LINE + 1)
        if not data.endswith(b"\n"):
            raise ValueError("a line that does not end")
        return data[:-1].decode("utf-8")

    def string(self, form: str, kind: str) -> None:
        """Push a text or bytes, or a :class:`Blob` where they are long; the length is checked before anything."""
        length = self.number(form)
        if length > self.limits.inline:
            start = self.stream.tell()
            if not 0 <= length <= self.size - start:
                raise ValueError(f"a string of {length} bytes where {self.size - start} are left")
            self.stream.seek(start + length)
            self.stack.append(Blob(start, length, "bytes" if kind == "either" else kind))
            return
        if length < 0:
            raise ValueError("a string of less than no bytes")
        self.text -= length
        if self.text < 0:
            raise VlscaleError(f"{self.where}: holds more than {self.limits.text} bytes of texts; it is no checkpoint")
        data = self.take(length)
        if kind == "either":  # Python 2's str is both
            try:
                self.stack.append(data.decode("utf-8"))
            except UnicodeDecodeError:
                self.stack.append(data)
        else:
            self.stack.append(data if kind == "bytes" else data.decode("utf-8"))

    def long(self, form: str) -> None:
        length = self.number(form)
        if not 0 <= length <= _MOST_INTEGER:
            raise ValueError(f"an integer of {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def put(self, index: int) -> None:
        if not 0 <= index <= self.limits.steps:
            raise ValueError(f"the memo has no place {index}")
        self.memo[index] = self.stack[-1]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Opaque:
            target.items = [] if target.items is None else target.items
            target = target.items
        if type(target) is not list:
            raise ValueError("items for something that is no list")
        target.extend(items)

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise ValueError("items for something that is no set")
        target.update(checked_key(item) for item in items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Opaque:
            target.items = {} if target.items is None else target.items
            target = target.items
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items for something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            put(target, key, value)

    def persistent(self, key: Any) -> None:
        if self.grammar.persistent is None:
            raise VlscaleError(f"{self.where}: refers to persistent objects, expected plain values; it is not read")
        self.stack.append(self.grammar.persistent(key))

    def name(self, module: Any, name: Any) -> None:
        """Push what a name stands for."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("a name that is no text")
        key, grammar = (module, name), self.grammar
        if key in grammar.refused:
            raise VlscaleError(f"{self.where}: {grammar.refused[key]}")
        if key in grammar.values:
            self.stack.append(grammar.values[key])
        elif self.call_for(key) or key in TYPES or self.is_harmless(key):
            self.stack.append(Name(module, name))
        else:
            raise self.refusal("needs", key)

    def call_for(self, key: NameKey) -> Callable[..., Any] | None:
        return self.grammar.calls.get(key) or PLAIN_CALLS.get(key)

    def call(self, step: str) -> None:
        """REDUCE, NEWOBJ, NEWOBJ_EX: one of our functions, or an opaque object of a harmless class.

        Only a class can stand in NEWOBJ. REDUCE may name a function, so without arguments at the most (that is how
        subclasses of dict are written).
        """
        keywords = self.pop(1)[0] if step == "NEWOBJ_EX" else {}
        called, arguments = self.pop(2)
        if type(called) is not Name or type(arguments) is not tuple or type(keywords) is not dict:
            raise ValueError("a call of something that is no function")
        key = (called.module, called.name)
        function = self.call_for(key)
        if function is not None and not keywords:
            # A constructor copies its arguments: a few bytes could have a long list copied a million times.
            self.charge(sum(len(each) >> 4 for each in arguments if isinstance(each, (list, tuple, dict, str, bytes))))
            self.stack.append(function(*arguments))
        elif self.is_harmless(key) and not (step == "REDUCE" and arguments):
            self.stack.append(Opaque(called.plain(), arguments, items=keywords or None))
        else:
            raise self.refusal("calls", key)

    def is_harmless(self, key: NameKey) -> bool:
        return key not in TYPES and key[0].partition(".")[0] in self.grammar.harmless

    def refusal(self, verb: str, key: NameKey) -> VlscaleError:
        return VlscaleError(
            f"{self.where}: is a pickle that {verb} {show(key[0])}.{show(key[1])}, expected tensors and plain values; "
            "nothing was run. If you trust it, save its tensors alone with the program that wrote it"
        )

    def build(self) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Leaf):
            target.build(state)
        elif type(target) is not dict or type(state) is not dict:  # attributes of an OrderedDict, e.g. _metadata
            raise ValueError("a state for something that has none")


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": _Machine.mark,
    b"0": lambda m: m.pop(1) if m.stack else m.to_mark(),
    b"1": _Machine.to_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("i")),
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("H")),
    b"\x8a": lambda m: m.long("B"),
    b"\x8b": lambda m: m.long("i"),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"T": lambda m: m.string("i", "either"),
    b"U": lambda m: m.string("B", "either"),
    b"X": lambda m: m.string("I", "text"),
    b"\x8c": lambda m: m.string("B", "text"),
    b"\x8d": lambda m: m.string("Q", "text"),
    b"B": lambda m: m.string("I", "bytes"),
    b"C": lambda m: m.string("B", "bytes"),
    b"\x8e": lambda m: m.string("Q", "bytes"),
    b"\x96": lambda m: m.string("Q", "bytes"),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"}": lambda m: m.push({}),
    b"\x8f": lambda m: m.push(set()),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"\x91": lambda m: m.push({checked_key(item) for item in m.to_mark()}),
    b"\x85": lambda m: m.push(tuple(m.pop(1))),
    b"\x86": lambda m: m.push(tuple(m.pop(2))),
    b"\x87": lambda m: m.push(tuple(m.pop(3))),
    b"a": lambda m: m.append(m.pop(1)),
    b"e": lambda m: m.append(m.to_mark()),
    b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"\x90": lambda m: m.add(m.to_mark()),
    b"h": lambda m: m.push(m.memo[m.number("B")]),
    b"j": lambda m: m.push(m.memo[m.number("I")]),
    b"q": lambda m: m.put(m.number("B")),
    b"r": lambda m: m.put(m.number("I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.name(*m.pop(2)),
    b"R": lambda m: m.call("REDUCE"),
    b"\x81": lambda m: m.call("NEWOBJ"),
    b"\x92": lambda m: m.call("NEWOBJ_EX"),
    b"b": _Machine.build,
    b"Q": lambda m: m.persistent(m.pop(1)[0]),
}
_REFUSED = {
    **{
        b"i": "the step INST",
        b"o": "the step OBJ",
        b"\x97": "the step NEXT_BUFFER",
        b"\x98": "the step READONLY_BUFFER",
    },
    **{b"\x82": "the step EXT1", b"\x83": "the step EXT2", b"\x84": "the step EXT4", b"": "no end; it is truncated"},
    **dict.fromkeys((b"I", b"L", b"F", b"S", b"V", b"l", b"d", b"g", b"p", b"P"), "steps of protocol 0 or 1"),
}


def plain(where: str, value: Any) -> Any:
    """Return a value as None, bool, int, float, str, lists and dicts with texts as keys; the rest is described.

    What is shared within the value is copied, so the copies are counted: a few bytes may refer to each other a
    million times.

    Raises:
        VlscaleError: it is nested deeper than 64, holds itself, or has more than a million parts.
    """
    left = _MOST_NODES

    def convert(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > _MOST_DEPTH or left < 0:
            raise VlscaleError(f"{where}: is nested too deep or refers to itself too often; it is no checkpoint")
        if isinstance(value, Leaf):
            return convert(value.plain(), depth + 1)
        if type(value) is dict:
            found: dict[str, Any] = {}
            for key, each in value.items():
                text = key if type(key) is str else str(key.plain() if type(key) is Name else key)
                found[repr(key) if text in found else text] = convert(each, depth + 1)
            return found
        if type(value) in (list, tuple, set):
            return [convert(each, depth + 1) for each in value]
        if type(value) is bytes:
            return f"<{len(value)} bytes>"
        return value if value is None or type(value) in (bool, int, float, str) else str(value)

    return convert(value, 0)
