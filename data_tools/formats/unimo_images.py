"""Image features of UNIMO: COCO caption parts, SNLI-VE files, Flickr feature files (plain or ``.gz``).

Arrays are base64 of little-endian float32, boxes are corners in pixels (``unimo_rows.py`` lists the columns). COCO and
SNLI-VE rows are texts, and repeat the features of their image: the first row of each image counts, and a row that
repeats an image with other boxes or features is bad. To find the first rows, the files are read once beforehand (60
bytes of memory per image); the build's manifest keeps them, so that later jobs and ``--merge`` do not read them again.
Array jobs that start before the first one has found them all read the files, so start one of them first.

**Not kept**: ``attr_probs`` of the COCO caption parts (the stores have no column for attributes' probabilities).
``--img-id img_id.tsv`` (rows of name, tab, number; beside the Flickr files) puts UNIMO's number of each image into
``extra["img_id"]``; the id in the store stays the name, by which the captions refer to it.

UNIMO's readers silently resize features of the wrong size; here they are refused. Its reader for testing retrieval
takes the columns of width and height for height and width: ``--size-order hw`` reads files that were made for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import BoxRule, FieldError, add_box_arguments, box_rule, show, whole_number, word
from data_tools.formats.delimited import LineImages, add_width_argument, named, probabilities, regions
from data_tools.formats.lines import Line, file_size, line_parts, read_lines
from data_tools.formats.unimo_index import FirstRows, SeenImages, read_rows
from data_tools.formats.unimo_rows import (
    Kind,
    add_kind_arguments,
    find_kind,
    source_paths,
    unimo_fields,
)
from data_tools.parts import Work
from data_tools.records import BadRow, ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "UNIMO features: COCO caption parts (their attr_probs are NOT kept), SNLI-VE, Flickr feature files"

_WITH_IMAGES = ("coco", "snli_ve", "flickr")
ROWS_PER_PART = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_kind_arguments(parser, _WITH_IMAGES)
    add_box_arguments(parser)
    add_width_argument(parser)
    parser.add_argument(
        "--size-order",
        choices=("wh", "hw"),
        help="which of the two size columns is first (default: hw in COCO caption parts, else wh)",
    )
    parser.add_argument(
        "--img-id",
        type=Path,
        metavar="FILE",
        help="UNIMO's img_id file (name, tab, number): puts the numbers into extra; Flickr feature files only",
    )


def open_source(options: argparse.Namespace) -> UnimoImages:
    """Open the files of ``options.sources``."""
    paths = source_paths(options)
    kind = find_kind(paths, options.kind, _WITH_IMAGES)
    if options.img_id is not None and kind.name != "flickr":
        raise VlscaleError(f"--img-id {options.img_id}: is for Flickr feature files, but the source is {kind.name}")
    return UnimoImages(
        paths,
        box_rule(options),
        options.feature_dim,
        kind=kind,
        size_order=options.size_order,
        img_id=options.img_id,
        root=getattr(options, "out", None),
    )


class UnimoImages(LineImages):
    """See the module.

    Args:
        paths: the files.
        rule: how the boxes are spelled.
        kind: of their rows.
        size_order: ``wh`` or ``hw``, the columns of width and height; default: the kind's.
        img_id: file of UNIMO's numbers of the images, or None.
        root: of the build, whose manifest has the parts of one that goes on.
    """

    description = "UNIMO feature files (bottom-up-attention Faster R-CNN, Visual Genome)"

    def __init__(
        self,
        paths: Sequence[Path],
        rule: BoxRule,
        *args: Any,
        kind: Kind,
        size_order: str | None = None,
        img_id: Path | None = None,
        root: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(paths, rule, *args, **options)
        swapped = {"image_w": "image_h", "image_h": "image_w"}
        if size_order not in (None, kind.size_order):
            kind = dataclasses.replace(kind, columns=tuple(swapped.get(name, name) for name in kind.columns))
        self.kind = kind
        self.rows_per_part = ROWS_PER_PART
        self._img_id = img_id
        self._root = root

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.ImageSource`; files that repeat images are read once for this."""
        if not self.kind.repeats:
            return line_parts(self.paths, self.part_bytes)
        recorded = None if self._root is None else Work(self._root, "images").recorded()
        if recorded is not None:  # if begun with something else, the build is refused because of that
            return list(recorded["parts"])
        line_parts(self.paths)  # complains about missing and empty files
        if self.kind.name == "coco":
            print("unimo_images: attr_probs of the COCO caption parts are not kept", file=sys.stderr, flush=True)
        seen = SeenImages()
        parts: list[dict[str, Any]] = []
        for number in range(len(self.paths)):
            rows = FirstRows()
            bad: list[BadRow] = []
            for line in read_lines(self.paths, {"file": number, "begin": 0, "end": None}):
                found = self._first_seen(line, seen)
                if isinstance(found, Line):
                    rows.add(found.begin, found.row)
                elif found is not None:
                    bad.append(found)
            parts += [{"file": number, "first_rows": spelled} for spelled in rows.spell(self.rows_per_part)]
            parts[-1]["bad"] = [(row.where, row.field, row.why) for row in bad]
        return parts

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """See :class:`data_tools.records.ImageSource`."""
        if "first_rows" in part:
            part = {**part, "rows": read_rows(part["first_rows"])}
        yield from super().read(part)
        yield from (BadRow(*row) for row in part.get("bad", ()))

    def _first_seen(self, line: Line | BadRow, seen: SeenImages) -> Line | BadRow | None:
        """Return the line if it is its image's first or cannot be used, None if it repeats it, or what is wrong."""
        if isinstance(line, BadRow):
            return line
        try:
            fields = unimo_fields(self.kind, line)
        except FieldError as error:
            return error.at(line.where)
        name = fields["image_id"]
        same = seen.add(name, fields["boxes"] + b" " + fields["image_embeddings"])
        if same is False:
            return BadRow(line.where, "image_embeddings", f"differ from an earlier row of image {show(name)}")
        return line if same is None else None

    def parse(self, line: Line, dim: int | None, classes: int | None) -> ImageRecord:
        """See :class:`LineImages`."""
        fields = unimo_fields(self.kind, line)
        name = word("image_id", fields["image_id"])
        width, height, features, boxes = regions(fields, self.rule, dim, ("image_w", "image_h", "image_embeddings"))
        probs = probabilities("probs", fields["probs"], len(features), classes) if "probs" in fields else None
        extra = {} if self._img_id is None else {"img_id": self._number_of(name)}
        return ImageRecord(line.where, name, width, height, features, boxes, class_probs=probs, extra=extra)

    def _number_of(self, name: str) -> int:
        found = self._numbers.get(name)
        if found is None:
            raise FieldError("image_id", f"{show(name)} is not in --img-id {self._img_id}")
        return found

    @cached_property
    def _numbers(self) -> dict[str, int]:
        assert self._img_id is not None
        return read_img_ids(self._img_id)


def read_img_ids(path: Path) -> dict[str, int]:
    """Read UNIMO's img_id file: image name -> number.

    Raises:
        VlscaleError: a row is not a name, a tab and a number, or repeats one of them.
    """
    file_size(path)
    numbers: dict[str, int] = {}
    known: set[int] = set()
    for line in read_lines([path], {"file": 0, "begin": 0, "end": None}, max_line=4096):
        try:
            if isinstance(line, BadRow):
                raise VlscaleError(str(line))
            fields = named(line, b"\t", ("name", "number"))
            name, number = word("name", fields["name"]), whole_number("number", fields["number"])
            if name in numbers or number in known:
                raise FieldError("name" if name in numbers else "number", "stands on an earlier row too")
        except FieldError as error:
            raise VlscaleError(str(error.at(line.where))) from None
        numbers[name] = number
        known.add(number)
    return numbers
