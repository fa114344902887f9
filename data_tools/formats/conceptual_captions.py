"""Conceptual Captions as published: ``Train_GCC-training.tsv``, ``Validation_GCC-1.1.0-Validation.tsv``, CC12M.

Rows of caption, tab, address; CC12M (``cc12m.tsv``) has the address first, which ``--columns url,caption`` says. The
text's id is the file's name and the number of the row, from 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError
from data_tools.formats.captions import caption
from data_tools.formats.lines import Line, read_lines
from data_tools.formats.numbered_lines import MAX_ROW, ROWS_PER_PART, numbered_parts, tab_fields
from data_tools.formats.urls import UrlNames, add_url_arguments
from data_tools.records import BadRow, TextRecord

KIND = "texts"
HELP = "Conceptual Captions: Train_GCC-training.tsv, Validation_GCC-*.tsv, cc12m.tsv"
COLUMNS = ("caption,url", "url,caption")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_url_arguments(parser)
    parser.add_argument("--columns", choices=COLUMNS, default=COLUMNS[0], help="their order (CC12M: url,caption)")


def open_source(options: argparse.Namespace) -> ConceptualCaptions:
    """Open the files of ``options.sources``."""
    names = UrlNames(options.image_id, options.image_map, options.sources)
    return ConceptualCaptions(options.sources, names, options.columns)


class ConceptualCaptions:
    """See the module."""

    paired = True

    def __init__(
        self, paths: Sequence[Path], names: UrlNames, columns: str = COLUMNS[0], rows_per_part: int = ROWS_PER_PART
    ) -> None:
        self.paths = list(paths)
        self.names = names
        self.columns = tuple(columns.split(","))
        self.rows_per_part = rows_per_part

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`."""
        return numbered_parts(self.paths, self.rows_per_part)

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        source = self.paths[part["file"]].stem
        for line in read_lines(self.paths, part, MAX_ROW):
            if isinstance(line, BadRow):
                yield line
                continue
            try:
                yield self._text(line, source)
            except FieldError as error:
                yield error.at(line.where)

    def _text(self, line: Line, source: str) -> TextRecord:
        assert line.row is not None
        row = line.row - 1
        fields = dict(zip(self.columns, tab_fields(line.data, self.columns), strict=True))
        text = caption("caption", fields["caption"])
        return TextRecord(line.where, f"{source}-{row}", text, (self.names.image(row, fields["url"], source),))
