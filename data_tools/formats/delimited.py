"""Image features in lines of fields: what the TSV formats and UNIMO's files have in common."""

from __future__ import annotations

import argparse
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import MAX_WIDTH, BoxRule, FieldError, finite, from_base64, image_size, region_count
from data_tools.formats.lines import PART_BYTES, Line, line_parts, read_lines
from data_tools.options import number
from data_tools.records import BadRow, ImageLayout, ImageRecord
from vlscale.errors import VlscaleError

PROBE = 16
"""Rows at the beginning whose commonest widths D and C all rows must have."""


def add_width_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--feature-dim``."""
    parser.add_argument(
        "--feature-dim",
        type=number(1, MAX_WIDTH),
        metavar="D",
        help=f"width D of the features (default: the commonest of the first {PROBE} rows)",
    )


class LineImages:
    """Base of the sources whose rows are lines: one image each, float32 in base64.

    Args:
        paths: the source's files, plain or ``.gz``.
        rule: how its boxes are spelled.
        feature_dim: width D of the features; default: the commonest of the first rows.
        part_bytes: see :func:`data_tools.formats.lines.line_parts`.
    """

    description = ""
    separator = b"\t"

    def __init__(
        self, paths: Sequence[Path], rule: BoxRule, feature_dim: int | None = None, part_bytes: int = PART_BYTES
    ) -> None:
        self.paths = list(paths)
        self.rule = rule
        self.part_bytes = part_bytes
        self._feature_dim = feature_dim
        self._layout: ImageLayout | None = None

    def layout(self) -> ImageLayout:
        """See :class:`data_tools.records.ImageSource`."""
        if self._layout is None:
            self._layout = self._probe()
        return self._layout

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.ImageSource`."""
        return line_parts(self.paths, self.part_bytes)

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """See :class:`data_tools.records.ImageSource`."""
        layout = self.layout()
        for line in read_lines(self.paths, part):
            if isinstance(line, BadRow):
                yield line
                continue
            try:
                if not self.is_heading(line):
                    yield self.parse(line, layout.feature_dim, layout.num_classes)
            except FieldError as error:
                yield error.at(line.where)

    def is_heading(self, line: Line) -> bool:
        """Tell whether a line names the columns."""
        return False

    @abstractmethod
    def parse(self, line: Line, dim: int | None, classes: int | None) -> ImageRecord:
        """Turn a line into an image.

        Args:
            line: not empty.
            dim: width D that the features must have; None: any.
            classes: number C of class probabilities, likewise.

        Raises:
            FieldError: the row cannot be used.
        """

    def _probe(self) -> ImageLayout:
        widths: Counter[tuple[int, int | None]] = Counter()
        problem: BadRow | None = None
        for line in _first_lines(self.paths, 4 * PROBE):
            try:
                if isinstance(line, BadRow):
                    problem = problem or line
                elif not self.is_heading(line):
                    record = self.parse(line, self._feature_dim, None)
                    classes = None if record.class_probs is None else record.class_probs.shape[1]
                    widths[record.features.shape[1], classes] += 1
            except FieldError as error:
                problem = problem or error.at(line.where)
            if widths.total() == PROBE:
                break
        if not widths:
            raise VlscaleError(str(problem or f"{self.paths[0]}: has no rows") + "; is this the right format?")
        dim, classes = widths.most_common(1)[0][0]
        return ImageLayout(dim, "float32") if classes is None else ImageLayout(dim, "float32", classes, "float32")


def _first_lines(paths: Sequence[Path], count: int) -> Iterator[Line | BadRow]:
    for file in range(len(paths)):
        for line in read_lines(paths, {"file": file, "begin": 0, "end": None}):
            yield line
            count -= 1
            if not count:
                return


def split(line: Line, separator: bytes) -> list[bytes]:
    """Split a line into its fields, without the line feed; the long last field is copied once, not twice."""
    data = line.data
    end = len(data)
    while end and data[end - 1] in b"\r\n":
        end -= 1
    fields, begin = [], 0
    while (stop := data.find(separator, begin, end)) >= 0:
        fields.append(data[begin:stop])
        begin = stop + len(separator)
    return [*fields, data[begin:end]]


def named(line: Line, separator: bytes, columns: Sequence[str]) -> dict[str, bytes]:
    """Split a line into as many fields as there are columns; those named ``_`` are left out."""
    return name_fields(split(line, separator), columns)


def name_fields(fields: Sequence[bytes], columns: Sequence[str]) -> dict[str, bytes]:
    """Name the fields of a line; those named ``_`` are left out."""
    if len(fields) != len(columns):
        raise FieldError("", f"has {len(fields)} fields, expected {len(columns)}; a row that was cut off?")
    return {name: field for name, field in zip(columns, fields, strict=True) if name != "_"}


def regions(
    fields: Mapping[str, bytes],
    rule: BoxRule,
    dim: int | None,
    names: tuple[str, str, str] = ("image_w", "image_h", "features"),
) -> tuple[int, int, NDArray[np.float32], NDArray[np.float32]]:
    """Read what all these formats have: width, height, features [R, D] and boxes [R, 4] in 0..1.

    Args:
        fields: the row; ``num_boxes`` and ``boxes`` have these names in all formats.
        rule: how the boxes are spelled.
        dim: width D that the features must have; None: any.
        names: fields of width, height and features.
    """
    width, height = image_size(names[0], fields[names[0]]), image_size(names[1], fields[names[1]])
    count = region_count("num_boxes", fields["num_boxes"])
    features = finite(names[2], from_base64(names[2], fields[names[2]], count, dim))
    boxes = from_base64("boxes", fields["boxes"], count, 4)
    return width, height, features, rule.apply("boxes", boxes, width, height)


def vector(field: str, text: bytes, rows: int, dtype: str = "<f4") -> NDArray[Any]:
    """Decode base64 to [rows]."""
    return from_base64(field, text, rows, 1, dtype)[:, 0]


def probabilities(field: str, text: bytes, rows: int, classes: int | None) -> NDArray[np.float32]:
    """Decode base64 to class probabilities [rows, C]; values outside 0..1 are refused."""
    found = finite(field, from_base64(field, text, rows, classes))
    if found.min() < 0 or found.max() > 1.001:
        raise FieldError(field, f"spans {found.min():g}..{found.max():g}, expected probabilities in 0..1")
    return found
