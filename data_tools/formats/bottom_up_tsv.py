"""Bottom-up-attention TSV: the public ``*_resnet101_faster_rcnn_genome.tsv*`` (36, or 10 to 100 regions per image).

Tab-separated, without a heading: image_id, image_w, image_h, num_boxes, boxes, features and, in files for masked-region
classification, cls_prob; arrays are base64 of little-endian float32, boxes are corners in pixels. A heading in the
first row of the first file, or ``--columns``, names other orders.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import BoxRule, FieldError, add_box_arguments, box_rule, show, word
from data_tools.formats.delimited import LineImages, add_width_argument, name_fields, probabilities, regions, split
from data_tools.formats.lines import Line
from data_tools.records import ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "bottom-up-attention TSV (*_resnet101_faster_rcnn_genome.tsv), with or without cls_prob"

_COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features", "cls_prob")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_box_arguments(parser)
    add_width_argument(parser)
    parser.add_argument(
        "--columns",
        type=lambda text: tuple(text.split(",")),
        help="names of the columns in their order, _ for those to ignore (default: " + ",".join(_COLUMNS) + ")",
    )


def open_source(options: argparse.Namespace) -> BottomUpTsv:
    """Open the files of ``options.sources``."""
    return BottomUpTsv(options.sources, box_rule(options), options.feature_dim, columns=options.columns)


class BottomUpTsv(LineImages):
    """See the module; ``columns`` are the names of the fields in their order."""

    description = "bottom-up-attention TSV (Faster R-CNN, Visual Genome)"

    def __init__(
        self, paths: Sequence[Path], rule: BoxRule, *args: Any, columns: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(paths, rule, *args, **options)
        repeated = sorted({name for name in columns or () if name != "_" and (columns or ()).count(name) > 1})
        if repeated:
            raise VlscaleError(f"--columns: {', '.join(repeated)} stands twice; name each column once, others _")
        unknown = [name for name in columns or () if name not in (*_COLUMNS, "_")]
        missing = [name for name in _COLUMNS[:-1] if name not in (columns or _COLUMNS)]
        if unknown or missing:
            raise VlscaleError(f"--columns: unknown {unknown}, missing {missing}; the names are {', '.join(_COLUMNS)}")
        self.columns = None if columns is None else tuple(columns)

    def is_heading(self, line: Line) -> bool:
        """Take over the order of columns from a heading."""
        if not line.data.startswith(b"image_id\t"):
            return False
        names = tuple(name.decode("latin-1") for name in split(line, b"\t"))
        if self.columns is None and self._layout is None and set(_COLUMNS[:-1]) <= set(names):
            columns = tuple(name if name in _COLUMNS else "_" for name in names)
            known = [name for name in columns if name != "_"]
            if len(set(known)) < len(known):
                raise FieldError("", f"is a heading that names a column twice: {show(', '.join(known), 120)}")
            self.columns = columns
        return True

    def parse(self, line: Line, dim: int | None, classes: int | None) -> ImageRecord:
        """See :class:`LineImages`."""
        values = split(line, b"\t")
        fields = name_fields(values, self.columns or (_COLUMNS if len(values) == len(_COLUMNS) else _COLUMNS[:-1]))
        name = word("image_id", fields["image_id"])
        width, height, features, boxes = regions(fields, self.rule, dim)
        probs = None
        if "cls_prob" in fields:
            probs = probabilities("cls_prob", fields["cls_prob"], len(features), classes)
        elif classes is not None:
            raise FieldError("cls_prob", "is missing, other rows have it")
        return ImageRecord(line.where, name, width, height, features, boxes, class_probs=probs)
