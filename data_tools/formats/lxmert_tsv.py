"""LXMERT TSV (``*_obj36.tsv``): 36 regions with objects and attributes of the bottom-up-attention detector.

Tab-separated, without a heading: img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes,
boxes, features; arrays are base64, ids int64, the others little-endian float32, boxes are corners in pixels. ``conf``
of the store is objects_conf; ``extra`` gets ``objects``, ``attributes`` and ``attribute_conf``, one per region.
"""

from __future__ import annotations

import argparse

from data_tools.formats.arrays import add_box_arguments, box_rule, finite, word
from data_tools.formats.delimited import LineImages, add_width_argument, named, regions, vector
from data_tools.formats.lines import Line
from data_tools.records import ImageRecord

KIND = "images"
HELP = "LXMERT TSV (*_obj36.tsv): features with objects and attributes"

_COLUMNS = (
    "img_id",
    "img_h",
    "img_w",
    "objects_id",
    "objects_conf",
    "attrs_id",
    "attrs_conf",
    "num_boxes",
    "boxes",
    "features",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_box_arguments(parser)
    add_width_argument(parser)


def open_source(options: argparse.Namespace) -> LxmertTsv:
    """Open the files of ``options.sources``."""
    return LxmertTsv(options.sources, box_rule(options), options.feature_dim)


class LxmertTsv(LineImages):
    """See the module."""

    description = "LXMERT TSV (bottom-up-attention Faster R-CNN, Visual Genome objects and attributes)"

    def is_heading(self, line: Line) -> bool:
        """Tell whether a line names the columns."""
        return line.data.startswith(b"img_id\t")

    def parse(self, line: Line, dim: int | None, classes: int | None) -> ImageRecord:
        """See :class:`LineImages`."""
        fields = named(line, b"\t", _COLUMNS)
        name = word("img_id", fields["img_id"])
        width, height, features, boxes = regions(fields, self.rule, dim, ("img_w", "img_h", "features"))
        count = len(features)
        conf = finite("objects_conf", vector("objects_conf", fields["objects_conf"], count))
        extra = {
            "objects": vector("objects_id", fields["objects_id"], count, "<i8").tolist(),
            "attributes": vector("attrs_id", fields["attrs_id"], count, "<i8").tolist(),
            "attribute_conf": finite("attrs_conf", vector("attrs_conf", fields["attrs_conf"], count)).tolist(),
        }
        return ImageRecord(line.where, name, width, height, features, boxes, conf, extra=extra)
