"""Flickr30k's captions as published: ``results_20130124.token``, or the columns of ``results.csv``.

Rows of ``1000092795.jpg#0``, tab, caption (``results_20130124.token``), or ``image_name| comment_number| comment`` with
a heading (``results.csv``). Karpathy's ``dataset_flickr30k.json`` is the format ``karpathy``. The text's id is
``1000092795.jpg#0``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, show, whole_number, word
from data_tools.formats.captions import ImageNames, add_image_id_argument, caption, stem
from data_tools.formats.lines import Line, line_parts, read_lines
from data_tools.formats.numbered_lines import MAX_ROW, tab_fields
from data_tools.records import BadRow, TextRecord

KIND = "texts"
HELP = "Flickr30k (and 8k): results_20130124.token, results.csv, Flickr8k.token.txt"
FIELDS = ("id", "file", "stem")
_PART_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_image_id_argument(parser, "{id} and {stem} (1000092795), {file} (1000092795.jpg)")


def open_source(options: argparse.Namespace) -> Flickr30k:
    """Open the files of ``options.sources``."""
    return Flickr30k(options.sources, ImageNames(options.image_id, FIELDS))


class Flickr30k:
    """See the module."""

    paired = True

    def __init__(self, paths: Sequence[Path], names: ImageNames, part_bytes: int = _PART_BYTES) -> None:
        self.paths = list(paths)
        self.names = names
        self.part_bytes = part_bytes

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`."""
        return line_parts(self.paths, self.part_bytes)

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        csv = self.paths[part["file"]].suffix == ".csv"
        for line in read_lines(self.paths, part, MAX_ROW):
            if isinstance(line, BadRow):
                yield line
                continue
            try:
                if not (csv and line.data.startswith(b"image_name|")):
                    yield self._text(line, csv)
            except FieldError as error:
                yield error.at(line.where)

    def _text(self, line: Line, csv: bool) -> TextRecord:
        if csv:
            fields = line.data.rstrip(b"\r\n").split(b"|", 2)
            if len(fields) != 3:
                raise FieldError("", f"has {len(fields)} fields, expected image_name| comment_number| comment")
            file, number, text = word("image_name", fields[0]), fields[1], fields[2]
        else:
            key, text = tab_fields(line.data, ("image#number", "caption"))
            file, mark, digits = word("image", key).rpartition("#")
            if not mark:
                raise FieldError("image", f"{show(digits)} is not of the form 1000092795.jpg#0")
            number = digits.encode()
        which = whole_number("number", number, 0, 1 << 16)
        image = self.names.name("image", {"id": stem(file), "file": file, "stem": stem(file)})
        return TextRecord(line.where, f"{file}#{which}", caption("caption", text), (image,))
