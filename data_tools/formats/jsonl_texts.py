"""JSON lines, plain or ``.gz``: one document a line, ``{"text": ...}`` (OpenWebText style)."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, sentence
from data_tools.formats.captions import mapping, member
from data_tools.formats.corpus import (
    MAX_DOCUMENT,
    PART_BYTES,
    Corpus,
    Packing,
    add_packing_arguments,
    packing_of,
)
from data_tools.formats.lines import line_parts, read_lines
from data_tools.packing_texts import Piece
from data_tools.records import BadRow

KIND = "texts"
HELP = "JSON lines, a document a line"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_packing_arguments(parser)
    parser.add_argument("--field", default="text", help="that holds the text (default text)")


def open_source(options: argparse.Namespace) -> JsonlTexts:
    """Open the files of ``options.sources``."""
    return JsonlTexts(options.sources, packing_of(options, open_source), options.field)


def json_object(data: bytes) -> Mapping[str, Any]:
    """Parse a line that holds a JSON object.

    Raises:
        FieldError: it is not UTF-8, or no JSON object.
    """
    try:
        return mapping("", json.loads(sentence("line", data, MAX_DOCUMENT)))
    except (ValueError, RecursionError) as error:
        raise FieldError("", f"is not JSON ({str(error)[:80]})") from None


class JsonlTexts(Corpus):
    """See the module."""

    def __init__(
        self, paths: Sequence[Path], packing: Packing, field: str = "text", part_bytes: int = PART_BYTES
    ) -> None:
        super().__init__(paths, packing)
        self.field = field
        self.part_bytes = part_bytes

    def divide(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.formats.corpus.Corpus`."""
        return line_parts(self.paths, self.part_bytes)

    def pieces(self, part: Mapping[str, Any]) -> Iterator[Piece | BadRow]:
        """See :class:`data_tools.formats.corpus.Corpus`."""
        for line in read_lines(self.paths, part, MAX_DOCUMENT):
            if isinstance(line, BadRow):
                yield line
                continue
            try:
                text = sentence(self.field, member(json_object(line.data), self.field), MAX_DOCUMENT)
                if not text.strip():
                    raise FieldError(self.field, "is empty")
            except FieldError as error:
                yield error.at(line.where)
                continue
            yield Piece(line.where, f"{part['file']}-{line.begin}", text, True)
