"""Image features of UNIMO: COCO caption parts, SNLI-VE files, Flickr feature files (plain or ``.gz``).

Arrays are base64 of little-endian float32, boxes are corners in pixels (``unimo_rows.py`` lists the columns). COCO and
SNLI-VE rows are texts, and repeat the features of their image: the first row of each image counts, and a row that
repeats an image with other boxes or features is bad. To find the first rows, the files are read once beforehand.

UNIMO's readers silently resize features of the wrong size; here they are refused. Its reader for testing retrieval
takes the columns of width and height for height and width: ``--size-order hw`` reads files that were made for it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from data_tools.formats.arrays import BoxRule, FieldError, add_box_arguments, box_rule, show, word
from data_tools.formats.delimited import LineImages, add_width_argument, probabilities, regions
from data_tools.formats.lines import Line, line_parts, read_lines
from data_tools.formats.unimo_rows import (
    Kind,
    add_kind_arguments,
    find_kind,
    source_paths,
    unimo_fields,
)
from data_tools.records import BadRow, ImageRecord

KIND = "images"
HELP = "UNIMO features: COCO caption parts, SNLI-VE, Flickr feature files"

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


def open_source(options: argparse.Namespace) -> UnimoImages:
    """Open the files of ``options.sources``."""
    paths = source_paths(options)
    kind = find_kind(paths, options.kind, _WITH_IMAGES)
    return UnimoImages(paths, box_rule(options), options.feature_dim, kind=kind, size_order=options.size_order)


class UnimoImages(LineImages):
    """See the module.

    Args:
        paths: the files.
        rule: how the boxes are spelled.
        kind: of their rows.
        size_order: ``wh`` or ``hw``, the columns of width and height; default: the kind's.
    """

    description = "UNIMO feature files (bottom-up-attention Faster R-CNN, Visual Genome)"

    def __init__(
        self,
        paths: Sequence[Path],
        rule: BoxRule,
        *args: Any,
        kind: Kind,
        size_order: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(paths, rule, *args, **options)
        swapped = {"image_w": "image_h", "image_h": "image_w"}
        if size_order not in (None, kind.size_order):
            kind = dataclasses.replace(kind, columns=tuple(swapped.get(name, name) for name in kind.columns))
        self.kind = kind
        self.rows_per_part = ROWS_PER_PART

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.ImageSource`; files that repeat images are read once for this."""
        if not self.kind.repeats:
            return line_parts(self.paths, self.part_bytes)
        line_parts(self.paths)  # complains about missing and empty files
        seen: dict[bytes, bytes] = {}
        parts: list[dict[str, Any]] = []
        for number in range(len(self.paths)):
            rows: list[tuple[int, int | None]] = []
            bad: list[BadRow] = []
            for line in read_lines(self.paths, {"file": number, "begin": 0, "end": None}):
                found = self._first_seen(line, seen)
                if isinstance(found, Line):
                    rows.append((found.begin, found.row))
                elif found is not None:
                    bad.append(found)
            cuts = range(0, max(len(rows), 1), self.rows_per_part)
            parts += [{"file": number, "rows": rows[first : first + self.rows_per_part]} for first in cuts]
            parts[-1]["bad"] = [(row.where, row.field, row.why) for row in bad]
        return parts

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """See :class:`data_tools.records.ImageSource`."""
        yield from super().read(part)
        yield from (BadRow(*row) for row in part.get("bad", ()))

    def _first_seen(self, line: Line | BadRow, seen: dict[bytes, bytes]) -> Line | BadRow | None:
        """Return the line if it is its image's first or cannot be used, None if it repeats it, or what is wrong."""
        if isinstance(line, BadRow):
            return line
        try:
            fields = unimo_fields(self.kind, line)
        except FieldError as error:
            return error.at(line.where)
        digest = xxhash.xxh3_128_digest(fields["boxes"] + b" " + fields["image_embeddings"])
        name = fields["image_id"]
        if name not in seen:
            seen[name] = digest
            return line
        if seen[name] != digest:
            return BadRow(line.where, "image_embeddings", f"differ from an earlier row of image {show(name)}")
        return None

    def parse(self, line: Line, dim: int | None, classes: int | None) -> ImageRecord:
        """See :class:`LineImages`."""
        fields = unimo_fields(self.kind, line)
        name = word("image_id", fields["image_id"])
        width, height, features, boxes = regions(fields, self.rule, dim, ("image_w", "image_h", "image_embeddings"))
        probs = probabilities("probs", fields["probs"], len(features), classes) if "probs" in fields else None
        return ImageRecord(line.where, name, width, height, features, boxes, class_probs=probs)
