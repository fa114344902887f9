"""VinVL and Oscar TSV: a feature file, and perhaps a file of predictions or labels beside it.

Feature rows, tab-separated, in any of the forms that are about:

* key, JSON ``{"num_boxes": R, "features": base64 float32 [R, D]}``;
* key, R, base64 float32 [R, D];
* key, JSON ``[{"feature": base64 float32 [D], ...}, ...]``, or ``{"objects": [the same], ...}``.

D is 2054 in the released files: 2048 of the detector and 6 numbers of the box as fractions of the image (x1, y1, x2,
y2, width, height). The width is kept as it is. Boxes come from ``rect`` (corners in pixels) of the predictions or of
the row itself, else from the last six columns; then the image's size is unknown, and stored as 1 x 1, unless
``--sizes`` gives it.

Prediction rows: key, JSON list of ``{"class", "rect", "conf"}``, or a JSON map with that list as ``objects`` and
``image_h``, ``image_w``. Size rows: key, JSON ``[{"height": h, "width": w}]``. A ``.lineidx`` beside a file is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import (
    FRACTION_SLACK,
    BoxRule,
    FieldError,
    add_box_arguments,
    box_rule,
    finite,
    from_base64,
    image_size,
    region_count,
    sentence,
    show,
    word,
)
from data_tools.formats.delimited import LineImages, add_width_argument, split
from data_tools.formats.lines import Line, indexed_parts, read_line_index, read_lines
from data_tools.records import BadRow, ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "VinVL/Oscar feature TSV (+ .lineidx), boxes from the last six columns or from --predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_box_arguments(parser)
    add_width_argument(parser)
    parser.add_argument("--predictions", type=Path, help="TSV of objects (class, rect, conf) with the same keys")
    parser.add_argument("--sizes", type=Path, help="TSV of image sizes (height, width) with the same keys: *.hw.tsv")


def open_source(options: argparse.Namespace) -> VinvlTsv:
    """Open the files of ``options.sources``."""
    return VinvlTsv(
        options.sources, box_rule(options), options.feature_dim, predictions=options.predictions, sizes=options.sizes
    )


class VinvlTsv(LineImages):
    """See the module."""

    description = "VinVL/Oscar TSV (ResNeXt-152 C4, Visual Genome objects and attributes)"

    def __init__(
        self,
        paths: Sequence[Path],
        rule: BoxRule,
        *args: Any,
        predictions: Path | None = None,
        sizes: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(paths, rule, *args, **options)
        self._predictions = None if predictions is None else Companion(predictions)
        self._sizes = None if sizes is None else Companion(sizes)

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.ImageSource`."""
        return indexed_parts(self.paths, self.part_bytes)

    def parse(self, line: Line, dim: int | None, classes: int | None) -> ImageRecord:
        """See :class:`LineImages`."""
        fields = split(line, b"\t")
        key = word("key", fields[0])
        features, about = _features(fields, dim)
        if self._predictions is not None:
            about = self._predictions.find("--predictions", key, line.row)
        described: Mapping[str, Any] = about if isinstance(about, dict) else {"objects": about}
        width, height = self._size(key, line.row, described)
        objects = described.get("objects")
        if not isinstance(objects, list) or not all(isinstance(each, dict) and "rect" in each for each in objects):
            if self._predictions is not None:
                raise FieldError("objects", "is not a list of objects with rect")
            boxes = self._boxes_of_columns(features)
            return ImageRecord(line.where, key, width or 1, height or 1, features, boxes)
        if len(objects) != len(features):
            raise FieldError("objects", f"has {len(objects)} objects for {len(features)} rows of features")
        if width is None or height is None:
            raise FieldError("image_w", "is missing, and rect is in pixels; give --sizes")
        boxes = self.rule.apply("rect", _numbers("rect", [each["rect"] for each in objects], 4), width, height)
        conf = _numbers("conf", [[each["conf"]] for each in objects], 1)[:, 0] if _all(objects, "conf") else None
        names = [sentence("class", each["class"], 512) for each in objects] if _all(objects, "class") else None
        extra = {} if names is None else {"objects": names}
        return ImageRecord(line.where, key, width, height, features, boxes, conf, extra=extra)

    def _size(self, key: str, row: int | None, described: Mapping[str, Any]) -> tuple[int | None, int | None]:
        """Width and height in pixels, or None and None."""
        if self._sizes is not None:
            found = self._sizes.find("--sizes", key, row)
            described = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
            names = ("width", "height")
        else:
            names = ("image_w", "image_h")
            if not set(names) & set(described):
                return None, None
        return image_size(names[0], described.get(names[0])), image_size(names[1], described.get(names[1]))

    def _boxes_of_columns(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        field = "the last six columns of features"
        if features.shape[1] < 7:
            raise FieldError("features", f"are {features.shape[1]} wide, too narrow to hold boxes; give --predictions")
        boxes, sides = features[:, -6:-2], features[:, -2:]
        if not np.allclose(boxes[:, 2:] - boxes[:, :2], sides, rtol=0, atol=0.02):
            raise FieldError(field, "are not x1, y1, x2, y2, width, height; give --predictions")
        return dataclasses.replace(self.rule, order="xyxy").apply(field, boxes, 1, 1, FRACTION_SLACK)


def _features(fields: Sequence[bytes], dim: int | None) -> tuple[NDArray[np.float32], Any]:
    """Return the features [R, D] of a row, and its JSON (None in the form without any)."""
    if len(fields) == 3:
        count = region_count("num_boxes", fields[1])
        return finite("features", from_base64("features", fields[2], count, dim)), None
    if len(fields) != 2:
        raise FieldError("", f"has {len(fields)} fields, expected 2 or 3; a row that was cut off?")
    about = parse_json("the second column", fields[1])
    if isinstance(about, dict) and "features" in about:
        count = region_count("num_boxes", about.get("num_boxes"))
        return finite("features", from_base64("features", _ascii("features", about.pop("features")), count, dim)), about
    objects = about.get("objects") if isinstance(about, dict) else about
    if not isinstance(objects, list) or not all(isinstance(each, dict) and "feature" in each for each in objects):
        raise FieldError("features", "is missing in the JSON of the second column")
    region_count("objects", len(objects))
    rows = []
    for number, each in enumerate(objects):
        rows.append(from_base64(f"feature[{number}]", _ascii("feature", each.pop("feature")), 1, dim))
        dim = rows[0].shape[1]
    return finite("feature", np.concatenate(rows)), about


def _ascii(field: str, value: Any) -> bytes:
    if not isinstance(value, str) or not value.isascii():
        raise FieldError(field, f"{show(value)} is not base64")
    return value.encode("ascii")


def _all(objects: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Tell whether all objects have an item; that only some have it is an error."""
    having = sum(name in each for each in objects)
    if 0 < having < len(objects):
        raise FieldError(name, f"stands in {having} of {len(objects)} objects")
    return having > 0


def _numbers(field: str, rows: list[Any], width: int) -> NDArray[np.float32]:
    """Turn JSON numbers into float32 [R, width]."""
    for number, row in enumerate(rows):
        plain = isinstance(row, list) and all(type(each) in (int, float) and abs(each) < 1e30 for each in row)
        if not plain or len(row) != width:
            raise FieldError(f"{field}[{number}]", f"{show(row)} is not {width} numbers")
    return np.array(rows, np.float32).reshape(len(rows), width)


def parse_json(field: str, text: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        FieldError: it is not, or is nested absurdly.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FieldError(field, f"is not JSON ({str(error)[:80]}): {show(text)}") from None


class Companion:
    """A TSV of key and JSON, looked up by key.

    With a ``.lineidx`` and rows in the feature file's order, a look-up is one seek. Otherwise the keys of the whole
    file are read once and kept (about 150 bytes each).
    """

    def __init__(self, path: Path) -> None:
        if path.suffix == ".gz":
            raise VlscaleError(f"{path}: rows are looked up by position; unpack it first")
        self._path = path
        self._starts: NDArray[np.int64] | None = None
        self._by_key: dict[str, int] | None = None

    def find(self, option: str, key: str, row: int | None) -> Any:
        """Return the JSON of a key; ``row`` (from 1) is where it probably is.

        Raises:
            FieldError: no row has this key, or it is not JSON.
        """
        index = self._path.with_suffix(".lineidx")
        if self._starts is None:
            self._starts = read_line_index(index) if index.exists() else np.zeros(0, np.int64)
        fields = self._row(int(self._starts[row - 1])) if row is not None and row <= len(self._starts) else None
        if fields is None or fields[0] != key.encode():
            if self._by_key is None:
                self._by_key = dict(self._keys())
            if key not in self._by_key:
                raise FieldError("key", f"{key!r} stands in no row of {option} {self._path.name}")
            fields = self._row(self._by_key[key])
        if len(fields) < 2:
            raise FieldError(f"{option} {self._path.name}", f"has no second column for {key!r}")
        return parse_json(f"{option} {self._path.name}", fields[1])

    def _row(self, begin: int) -> list[bytes]:
        for line in read_lines([self._path], {"file": 0, "begin": 0, "end": None, "rows": [(begin, None)]}):
            if isinstance(line, Line):
                return split(line, b"\t")
        return [b""]

    def _keys(self) -> Iterator[tuple[str, int]]:
        for line in read_lines([self._path], {"file": 0, "begin": 0, "end": None}):
            if not isinstance(line, BadRow):
                key = line.data[:2048].split(b"\t", 1)[0].rstrip(b"\r\n")
                yield key.decode("utf-8", "replace"), line.begin
