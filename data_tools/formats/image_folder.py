"""A folder of pictures with JSON lines of their captions: ``{"image": "a/b.jpg", "text": "..."}``.

``image`` (or ``file_name``, as in Hugging Face's image folders) is a path relative to ``--images``, or a list of paths
for a text about several pictures; ``text`` (or ``caption``) is a text, or a list of texts. A picture's id is its path
without suffix, as ``extract_regions`` names it. The text's id is the row's ``id``, else made of file and byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, show, word
from data_tools.formats.captions import caption
from data_tools.formats.jsonl_texts import json_object
from data_tools.formats.lines import Line, line_parts, read_lines
from data_tools.formats.numbered_lines import MAX_ROW
from data_tools.records import BadRow, TextRecord

KIND = "texts"
HELP = "JSON lines of captions beside a folder of pictures"
IMAGE_FIELDS = ("image", "images", "file_name")
TEXT_FIELDS = ("text", "caption", "captions")
MAX_IMAGES = 64
_PART_BYTES = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="of the pictures: rows without a picture there are bad rows"
    )


def open_source(options: argparse.Namespace) -> ImageFolder:
    """Open the files of ``options.sources``."""
    return ImageFolder(options.sources, options.images)


class ImageFolder:
    """See the module."""

    paired = True

    def __init__(self, paths: Sequence[Path], images: Path | None = None, part_bytes: int = _PART_BYTES) -> None:
        self.paths = list(paths)
        self.images = images
        self.part_bytes = part_bytes

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`."""
        return line_parts(self.paths, self.part_bytes)

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        source = self.paths[part["file"]].stem
        for line in read_lines(self.paths, part, MAX_ROW):
            if isinstance(line, BadRow):
                yield line
                continue
            try:
                yield from self._texts(line, source)
            except FieldError as error:
                yield error.at(line.where)

    def _texts(self, line: Line, source: str) -> list[TextRecord]:
        row = json_object(line.data)
        images = tuple(self._image(*each) for each in _items(row, IMAGE_FIELDS, MAX_IMAGES))
        name = word("id", row["id"]) if "id" in row else f"{source}-{line.begin}"
        texts = [caption(field, value) for field, value in _items(row, TEXT_FIELDS, 1 << 16)]
        names = [name] if len(texts) == 1 else [f"{name}-{number}" for number in range(len(texts))]
        return [TextRecord(line.where, each, text, images) for each, text in zip(names, texts, strict=True)]

    def _image(self, field: str, value: Any) -> str:
        path = word(field, value)
        pieces = path.split("/")
        if not all(pieces) or {".", ".."} & set(pieces) or "\\" in path:
            raise FieldError(field, f"{show(path, 80)} is not a plain path inside the folder of pictures")
        if self.images is not None and not (self.images / path).is_file():
            raise FieldError(field, f"there is no picture {show(path, 80)} in {self.images}")
        stem, dot, _ = pieces[-1].rpartition(".")
        return "/".join([*pieces[:-1], stem if dot and stem else pieces[-1]])


def _items(row: Mapping[str, Any], fields: Sequence[str], most: int) -> list[tuple[str, Any]]:
    """The values of the first of ``fields`` that the row has, each with a name for errors."""
    field = next((each for each in fields if each in row), None)
    if field is None:
        raise FieldError(fields[0], f"is missing (nor is there {' or '.join(fields[1:])})")
    values = row[field]
    if not isinstance(values, list):
        return [(field, values)]
    if not 1 <= len(values) <= most:
        raise FieldError(field, f"has {len(values)} entries, expected 1 to {most}")
    return [(f"{field}[{place}]", value) for place, value in enumerate(values)]
