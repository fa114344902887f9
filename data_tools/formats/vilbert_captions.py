"""ViLBERT's Conceptual Captions: ``caption_train.json``, ``caption_val.json``, or the captions in the feature LMDBs.

A ``.json`` file is one map of image id to caption (or list of captions); it is read piece by piece.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import MAX_TEXT, FieldError, sentence, word
from data_tools.formats.lines import file_size
from data_tools.formats.lmdb_files import key_parts
from data_tools.formats.vilbert_lmdb import RECORDS_PER_PART, parse_record, records
from data_tools.records import BadRow, TextRecord
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "ViLBERT's captions: caption_train.json, or the Conceptual Captions LMDBs themselves"

_PIECE = 1 << 20
_BLANK = " \t\r\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options: none."""


def open_source(options: argparse.Namespace) -> VilbertCaptions:
    """Open the files of ``options.sources``."""
    return VilbertCaptions(options.sources)


class VilbertCaptions:
    """See the module; ``per_part`` counts the records of an LMDB in a part."""

    paired = True

    def __init__(self, paths: Sequence[Path], per_part: int = RECORDS_PER_PART) -> None:
        self.paths = list(paths)
        self.per_part = per_part

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`."""
        parts: list[dict[str, Any]] = []
        for number, path in enumerate(self.paths):
            if path.suffix == ".json":
                file_size(path)
                parts.append({"file": number})
            else:
                parts += [{"file": number, **part} for part in key_parts(path, self.per_part)]
        return parts

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        path = self.paths[part["file"]]
        if "first" not in part:
            for number, (image, captions) in enumerate(read_map(path)):
                yield from _texts(f"{path}: entry {number + 1}", image, captions)
            return
        for where, value in records(path, part):
            try:
                fields = parse_record(value)
            except FieldError as error:
                yield error.at(where)
                continue
            if "caption" in fields:
                yield from _texts(where, fields["image_id"], fields["caption"])
            else:
                yield BadRow(where, "caption", "is missing; only the Conceptual Captions LMDBs have captions")


def _texts(where: str, image: Any, captions: Any) -> Iterator[TextRecord | BadRow]:
    try:
        name = word("image_id", image)
        for number, caption in enumerate(captions if isinstance(captions, list) else [captions]):
            text = sentence("caption", caption).strip()
            if not text:
                raise FieldError("caption", "is empty")
            yield TextRecord(where, f"{name}-{number}", text, (name,))
    except FieldError as error:
        yield error.at(where)


def read_map(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a JSON map that is too large to hold.

    Raises:
        VlscaleError: the file is not one JSON map in UTF-8, or an entry is longer than a text may be.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8") as stream:
            window = _Window(path, stream)
            separator = window.sign("{")
            while True:
                if window.next_sign() == "}" and separator == "{":
                    return
                key = window.value(decoder)
                window.sign(":")
                value = window.value(decoder)
                if not isinstance(key, str):
                    raise VlscaleError(f"{path}: has the key {key!r}, expected text")
                yield key, value
                separator = window.sign(",}")
                if separator == "}":
                    return
    except UnicodeDecodeError as error:
        raise VlscaleError(f"{path}: is not UTF-8 ({error.reason}); convert it") from None
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror})") from None


class _Window:
    """A piece of a text file that moves forward over JSON values."""

    def __init__(self, path: Path, stream: Any) -> None:
        self._path = path
        self._stream = stream
        self._text = ""
        self._at = 0
        self._begin = 0

    def next_sign(self) -> str:
        """Return the next character that is no blank, without passing it."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                raise VlscaleError(f"{self._path}: ends at character {self._begin + self._at}; it is cut off")

    def sign(self, allowed: str) -> str:
        """Pass one of the characters that are allowed."""
        found = self.next_sign()
        if found not in allowed:
            spelled = " or ".join(repr(each) for each in allowed)
            raise VlscaleError(f"{self._path}: has {found!r} at character {self._begin + self._at}, expected {spelled}")
        self._at += 1
        return found

    def value(self, decoder: json.JSONDecoder) -> Any:
        """Pass one JSON value."""
        self.next_sign()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError):
                value, end = None, len(self._text)
            # a number at the window's end may go on behind it
            if end < len(self._text):
                self._at = end
                return value
            if len(self._text) - self._at > 4 * MAX_TEXT or not self._more():
                place = self._begin + self._at
                raise VlscaleError(
                    f"{self._path}: is not JSON, is cut off or has an entry too long at character {place}"
                )

    def _more(self) -> bool:
        piece = self._stream.read(_PIECE)
        self._text = self._text[self._at :] + piece
        self._begin += self._at
        self._at = 0
        return bool(piece)
