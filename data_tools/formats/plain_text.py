"""Plain text, UTF-8, plain or ``.gz``: sentences or paragraphs in lines, blank lines between documents (BookWiki).

A document that reaches over a part's end (64 MiB) is two documents.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, sentence
from data_tools.formats.corpus import PART_BYTES, Corpus, Packing, add_packing_arguments, packing_of
from data_tools.formats.lines import line_parts, read_lines
from data_tools.packing_texts import Piece
from data_tools.records import BadRow

KIND = "texts"
HELP = "plain text, blank lines between documents, or a document a line"
DOCUMENTS = ("blank", "line", "file")
MAX_ROW = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_packing_arguments(parser)
    parser.add_argument(
        "--documents", choices=DOCUMENTS, default="blank", help="what ends one: a blank line (default), line, or file"
    )


def open_source(options: argparse.Namespace) -> PlainText:
    """Open the files of ``options.sources``."""
    return PlainText(options.sources, packing_of(options, open_source), options.documents)


class PlainText(Corpus):
    """See the module."""

    def __init__(
        self, paths: Sequence[Path], packing: Packing, documents: str = "blank", part_bytes: int = PART_BYTES
    ) -> None:
        super().__init__(paths, packing)
        self.documents = documents
        self.part_bytes = part_bytes

    def divide(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.formats.corpus.Corpus`."""
        return line_parts(self.paths, self.part_bytes)

    def pieces(self, part: Mapping[str, Any]) -> Iterator[Piece | BadRow]:
        """See :class:`data_tools.formats.corpus.Corpus`."""
        expected: int | None = None  # byte at which the next line begins if no blank line is passed over
        for line in read_lines(self.paths, part, MAX_ROW):
            if isinstance(line, BadRow):
                yield line
                expected = None
                continue
            begins = expected is None or self.documents == "line"
            if self.documents == "blank":
                begins |= line.begin != expected or not line.data.strip()
            expected = line.begin + len(line.data)
            try:
                text = sentence("line", line.data.removeprefix(b"\xef\xbb\xbf") if line.begin == 0 else line.data)
            except FieldError as error:
                yield error.at(line.where)
                expected = None
                continue
            if not text.strip():
                expected = None if self.documents == "blank" else expected
            else:
                yield Piece(line.where, f"{part['file']}-{line.begin}", text, begins)
