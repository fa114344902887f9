"""COCO's captions as published: ``captions_train2014.json``, ``captions_val2017.json``, ...

``{"images": [{"id", "file_name", ...}], "annotations": [{"id", "image_id", "caption"}], ...}``. The text's id is the
annotation's. The file is read piece by piece; it is one part, because JSON cannot be entered in the middle.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, word
from data_tools.formats.captions import ImageNames, add_image_id_argument, caption, mapping, member, stem
from data_tools.formats.json_stream import read_elements
from data_tools.formats.lines import file_size
from data_tools.records import BadRow, TextRecord
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "COCO captions: captions_train2014.json, captions_val2017.json, ..."
FIELDS = ("id", "file", "stem", "source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_image_id_argument(parser, "{id} (COCO's number), {file} and {stem} (its file), {source} (the annotation file)")


def open_source(options: argparse.Namespace) -> CocoCaptions:
    """Open the files of ``options.sources``."""
    return CocoCaptions(options.sources, ImageNames(options.image_id, FIELDS))


class CocoCaptions:
    """See the module."""

    paired = True

    def __init__(self, paths: Sequence[Path], names: ImageNames) -> None:
        self.paths = list(paths)
        self.names = names

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`: one per file."""
        for path in self.paths:
            file_size(path)
        return [{"file": number} for number in range(len(self.paths))]

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        path = self.paths[part["file"]]
        files = dict(_files(path)) if self.names.uses & {"file", "stem"} else {}
        found = False
        for key, index, element in read_elements(path):
            if key != "annotations":
                continue
            found = True
            where = f"{path}: annotations[{index}]"
            try:
                yield self._text(where, path, mapping("", element), files)
            except FieldError as error:
                yield error.at(where)
        if not found:
            raise VlscaleError(f"{path}: has no list of annotations; give COCO's captions_*.json")

    def _text(self, where: str, path: Path, row: Mapping[str, Any], files: Mapping[str, str]) -> TextRecord:
        name = word("id", member(row, "id"))
        number = word("image_id", member(row, "image_id"))
        file = files.get(number)
        values = {"id": number, "file": file, "stem": None if file is None else stem(file), "source": path.stem}
        image = self.names.name("image_id", values)
        return TextRecord(where, name, caption("caption", member(row, "caption")), (image,))


def _files(path: Path) -> Iterator[tuple[str, str]]:
    """Numbers and files of the images that a COCO file lists."""
    for key, index, element in read_elements(path):
        if key == "images":
            try:
                row = mapping("", element)
                yield word("id", member(row, "id")), word("file_name", member(row, "file_name"))
            except FieldError as error:
                raise VlscaleError(str(error.at(f"{path}: images[{index}]"))) from None
