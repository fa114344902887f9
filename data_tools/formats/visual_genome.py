"""Visual Genome's region descriptions as published: ``region_descriptions.json`` (versions 1.0 to 1.4).

``[{"id": 1, "regions": [{"region_id", "image_id" (or "image"), "phrase", "x", "y", "width", "height"}, ...]}, ...]``.
The text's id is its region's; ``extra`` gets ``box_xywh``, pixels as published (some leave the image), and with
``--image-data`` the ``image_size``. Read piece by piece, one part per file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.formats.arrays import MAX_SIDE, FieldError, image_size, show, whole_number, word
from data_tools.formats.captions import ImageNames, add_image_id_argument, caption, mapping, member
from data_tools.formats.json_stream import read_elements
from data_tools.formats.lines import file_size
from data_tools.records import BadRow, TextRecord
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "Visual Genome: region_descriptions.json"
FIELDS = ("id", "source")
_SIDES = ("x", "y", "width", "height")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_image_id_argument(parser, "{id} (Visual Genome's number)")
    parser.add_argument(
        "--image-data", type=Path, metavar="FILE", help="image_data.json: put the images' sizes beside the boxes"
    )


def open_source(options: argparse.Namespace) -> VisualGenome:
    """Open the files of ``options.sources``."""
    return VisualGenome(options.sources, ImageNames(options.image_id, FIELDS), options.image_data)


class VisualGenome:
    """See the module."""

    paired = True

    def __init__(self, paths: Sequence[Path], names: ImageNames, image_data: Path | None = None) -> None:
        self.paths = list(paths)
        self.names = names
        self.image_data = image_data

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`: one per file."""
        for path in self.paths:
            file_size(path)
        return [{"file": number} for number in range(len(self.paths))]

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        path = self.paths[part["file"]]
        for key, index, element in read_elements(path):
            where = f"{path}: entry {index + 1}"
            if key:
                raise VlscaleError(f"{path}: is a map with the key {key!r}, expected Visual Genome's list of images")
            try:
                entry = mapping("", element)
                regions = member(entry, "regions")
                if not isinstance(regions, list):
                    raise FieldError("regions", f"{show(regions)} is not a list")
            except FieldError as error:
                yield error.at(where)
                continue
            for place, region in enumerate(regions):
                try:
                    yield self._text(f"{where}: regions[{place}]", path, entry, region)
                except FieldError as error:
                    yield error.at(f"{where}: regions[{place}]")

    def _text(self, where: str, path: Path, entry: Mapping[str, Any], region: Any) -> TextRecord:
        row = mapping("", region)
        name = word("region_id", row["region_id"] if "region_id" in row else member(row, "id"))
        field = "image_id" if "image_id" in row else "image"
        number = whole_number(field, row.get(field, entry.get("id")), 0)
        text = caption("phrase", member(row, "phrase"))
        box = [whole_number(side, member(row, side), -MAX_SIDE, MAX_SIDE) for side in _SIDES]
        extra: dict[str, Any] = {"box_xywh": box}
        if self.image_data is not None:
            size = self._sizes.get(number)
            if size is None:
                raise FieldError(field, f"image {number} is not in {self.image_data.name}")
            extra["image_size"] = size
        image = self.names.name(field, {"id": number, "source": path.stem})
        return TextRecord(where, name, text, (image,), None, extra)

    @cached_property
    def _sizes(self) -> _Sizes:
        assert self.image_data is not None
        return _Sizes(self.image_data)


class _Sizes:
    """Width and height of each image of an ``image_data.json``: 24 bytes an image."""

    def __init__(self, path: Path) -> None:
        rows = []
        for key, index, element in read_elements(path):
            try:
                row = mapping("", element)
                number = whole_number("image_id", row.get("image_id", row.get("id")), 0)
                rows.append((number, image_size("width", row.get("width")), image_size("height", row.get("height"))))
            except FieldError as error:
                raise VlscaleError(str(error.at(f"{path}: {key}[{index}]"))) from None
        table = np.array(sorted(rows), np.int64).reshape(-1, 3)
        self._numbers, self._sizes = np.ascontiguousarray(table[:, 0]), table[:, 1:]

    def get(self, number: int) -> list[int] | None:
        """Width and height in pixels; None if the image is not listed."""
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            return None
        found: list[int] = self._sizes[place].tolist()
        return found
