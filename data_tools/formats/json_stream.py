"""JSON files that are too large to hold: their lists are read element by element, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from data_tools.formats.lines import file_size
from vlscale.errors import VlscaleError

MAX_ELEMENT = 16 << 20
"""Characters of one element of a list: an image of Visual Genome with all its regions has some ten thousand."""
_PIECE = 1 << 20
_BLANK = " \t\r\n"


def read_elements(path: Path, piece: int = _PIECE) -> Iterator[tuple[str, int, Any]]:
    """Yield ``(key, index, element)`` for the lists of a file, in order.

    The file is a list (key ``""``), or a map, of whose values the lists are taken apart; other values come whole, with
    the index -1. Bytes that are not UTF-8 become surrogates (``surrogateescape``), so that only their row is bad.

    Args:
        path: the file.
        piece: characters that are read at a time.

    Raises:
        VlscaleError: the file is missing, empty, not JSON, cut off, neither list nor map, or has too large an element.
    """
    file_size(path)
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            window = _Window(path, stream, piece)
            if window.next_sign() == "[":
                yield from (("", index, element) for index, element in enumerate(_elements(window)))
            else:
                yield from _members(window)
            window.end()
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror})") from None


def _members(window: _Window) -> Iterator[tuple[str, int, Any]]:
    opened = window.sign("{")
    while True:
        if window.next_sign() == "}" and opened == "{":
            window.sign("}")
            return
        key = window.value()
        if not isinstance(key, str):
            raise window.error(f"has the key {str(key)[:40]}, expected text")
        window.sign(":")
        if window.next_sign() == "[":
            yield from ((key, index, element) for index, element in enumerate(_elements(window)))
        else:
            yield key, -1, window.value()
        opened = window.sign(",}")
        if opened == "}":
            return


def _elements(window: _Window) -> Iterator[Any]:
    window.sign("[")
    if window.next_sign() == "]":
        window.sign("]")
        return
    while True:
        yield window.value()
        if window.sign(",]") == "]":
            return


class _Window:
    """A piece of a text file that moves forward over JSON values."""

    def __init__(self, path: Path, stream: TextIO, piece: int) -> None:
        self._path = path
        self._stream = stream
        self._piece = piece
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._begin = 0

    def error(self, why: str) -> VlscaleError:
        """Return an error about the place that was reached."""
        return VlscaleError(f"{self._path}: {why} at character {self._begin + self._at}; give the published file")

    def next_sign(self) -> str:
        """Return the next character that is no blank, without passing it."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                raise self.error("is cut off")

    def sign(self, allowed: str) -> str:
        """Pass one of the characters that are allowed."""
        found = self.next_sign()
        if found not in allowed:
            spelled = " or ".join(repr(each) for each in allowed)
            raise self.error(f"is not JSON: has {found!r}, expected {spelled},")
        self._at += 1
        return found

    def value(self) -> Any:
        """Pass one JSON value."""
        self.next_sign()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError:
                raise self.error("is nested too deeply") from None
            except ValueError:
                value, end = None, len(self._text)
            if end < len(self._text):  # a number at the window's end may go on behind it
                self._at = end
                return value
            if len(self._text) - self._at > MAX_ELEMENT:
                raise self.error(f"is not JSON, or has an element of more than {MAX_ELEMENT} characters,")
            if not self._more():
                raise self.error("is not JSON, or is cut off,")

    def end(self) -> None:
        """Refuse anything but blanks behind the value."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANK:
                    raise self.error("is not JSON: goes on")
                self._at += 1
            if not self._more():
                return

    def _more(self) -> bool:
        piece = self._stream.read(self._piece)
        self._text = self._text[self._at :] + piece
        self._begin += self._at
        self._at = 0
        return bool(piece)
