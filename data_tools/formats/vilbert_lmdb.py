"""ViLBERT's LMDBs: Conceptual Captions (msgpack lists) and downstream (pickled dicts); the first byte tells them apart.

* Conceptual Captions (``training_feat_all.lmdb``, ``training_feat_part_<rank>.lmdb``, written by tensorpack): a list of
  features [R, 2048], cls_prob [R, 1601], boxes [R, 4] (arrays as msgpack-numpy writes them), num_boxes, image_h,
  image_w, image_id, caption. The captions are imported by ``vilbert_captions``.
* Downstream: a pickled dict of image_id, image_h, image_w, num_boxes, boxes [R, 4], features [R, 2048] and perhaps
  cls_prob, and the key ``keys``, which is not needed. Nothing is unpickled: see :mod:`data_tools.formats.pickled`.

Boxes are corners in pixels; the ground-truth LMDBs made by the published extractor have xywh (``--boxes xywh``).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import (
    MAX_LINE,
    BoxRule,
    FieldError,
    add_box_arguments,
    box_rule,
    finite,
    from_msgpack,
    image_size,
    region_count,
    show,
    typed,
    unpack_msgpack,
    word,
)
from data_tools.formats.delimited import PROBE, add_width_argument
from data_tools.formats.lmdb_files import first_part, lmdb_parts, read_range
from data_tools.formats.pickled import read_pickle
from data_tools.records import BadRow, ImageLayout, ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "ViLBERT LMDB: Conceptual Captions (tensorpack) or downstream (pickled dicts, read without unpickling)"

_NOT_RECORDS = {b"keys", b"__keys__"}  # they hold lists of keys
RECORDS_PER_PART = 2048
_ITEMS = ("features", "cls_prob", "boxes", "num_boxes", "image_h", "image_w", "image_id", "caption")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_box_arguments(parser)
    add_width_argument(parser)


def open_source(options: argparse.Namespace) -> VilbertLmdb:
    """Open the LMDBs of ``options.sources``."""
    return VilbertLmdb(options.sources, box_rule(options), options.feature_dim)


class VilbertLmdb:
    """See the module.

    Args:
        paths: LMDB files or folders.
        rule: how the boxes are spelled.
        feature_dim: width D of the features; default: the commonest of the first records.
        per_part: records in a part.
    """

    description = "ViLBERT LMDB (Faster R-CNN, Visual Genome)"

    def __init__(
        self,
        paths: Sequence[Path],
        rule: BoxRule,
        feature_dim: int | None = None,
        per_part: int = RECORDS_PER_PART,
    ) -> None:
        self.paths = list(paths)
        self.rule = rule
        self.per_part = per_part
        self._feature_dim = feature_dim
        self._layout: ImageLayout | None = None

    def layout(self) -> ImageLayout:
        """See :class:`data_tools.records.ImageSource`."""
        if self._layout is None:
            self._layout = self._probe()
        return self._layout

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.ImageSource`."""
        return lmdb_parts(self.paths, self.per_part)

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """See :class:`data_tools.records.ImageSource`."""
        layout = self.layout()
        for where, value in records(self.paths[part["file"]], part):
            try:
                yield self._record(where, value, layout.feature_dim, layout.num_classes, layout.feature_dtype)
            except FieldError as error:
                yield error.at(where)

    def _record(self, where: str, value: bytes, dim: int | None, classes: int | None, dtype: str | None) -> ImageRecord:
        fields = parse_record(value)
        name = word("image_id", fields["image_id"])
        width, height = image_size("image_w", fields["image_w"]), image_size("image_h", fields["image_h"])
        count = region_count("num_boxes", fields["num_boxes"])
        dtypes = ("float32", "float16") if dtype is None else (dtype,)
        features = finite("features", typed("features", fields["features"], dtypes, (count, dim)))
        boxes = typed("boxes", fields["boxes"], ("float32", "float64", "int32", "int64"), (count, 4))
        probs = None
        if fields.get("cls_prob") is not None:
            probs = finite("cls_prob", typed("cls_prob", fields["cls_prob"], ("float32", "float16"), (count, classes)))
            if probs.min() < 0 or probs.max() > 1.001:
                raise FieldError("cls_prob", f"spans {probs.min():g}..{probs.max():g}, expected 0..1")
        elif classes is not None:
            raise FieldError("cls_prob", "is missing, other records have it")
        unit = self.rule.apply("boxes", boxes, width, height)
        return ImageRecord(where, name, width, height, features, unit, class_probs=probs)

    def _probe(self) -> ImageLayout:
        layouts: Counter[ImageLayout] = Counter()
        problem = ""
        for path in self.paths:
            for where, value in records(path, first_part(path, 4 * PROBE)):
                try:
                    record = self._record(where, value, self._feature_dim, None, None)
                    layouts[_layout(record.features, record.class_probs)] += 1
                except FieldError as error:
                    problem = problem or str(error.at(where))
                if layouts.total() == PROBE:
                    break
            if layouts:
                return layouts.most_common(1)[0][0]
        raise VlscaleError((problem or f"{self.paths[0]}: has no records") + "; is this the right format?")


def _layout(features: NDArray[Any], probs: NDArray[Any] | None) -> ImageLayout:
    if probs is None:
        return ImageLayout(features.shape[1], features.dtype.name)
    return ImageLayout(features.shape[1], features.dtype.name, probs.shape[1], probs.dtype.name)


def records(path: Path, part: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name (for errors) and value of the records in a range of keys."""
    for key, value in read_range(part, path):
        if key not in _NOT_RECORDS:
            yield f"{path}: key {show(key.decode('utf-8', 'backslashreplace'))}", value


def parse_record(blob: bytes) -> dict[str, Any]:
    """Turn a record of either kind into a dict, arrays as arrays, texts perhaps as bytes.

    Raises:
        FieldError: it is neither, or lacks a field.
    """
    if len(blob) > MAX_LINE:
        raise FieldError("record", f"has {len(blob)} bytes, at most {MAX_LINE} are allowed")
    if blob[:1] == b"\x80" and blob[1:2] <= b"\x05":
        found = read_pickle("record", blob)
        if not isinstance(found, dict):
            raise FieldError("record", f"is a pickled {type(found).__name__}, expected a dict")
        fields = {key.decode("latin-1") if isinstance(key, bytes) else key: each for key, each in found.items()}
        wanted = set(_ITEMS) - {"cls_prob", "caption"}
    else:
        items = unpack_msgpack("record", blob)
        if not isinstance(items, list) or len(items) not in (len(_ITEMS), len(_ITEMS) - 1):
            raise FieldError("record", f"is not a list of the {len(_ITEMS)} items {', '.join(_ITEMS)}")
        fields = {name: from_msgpack(name, item) for name, item in zip(_ITEMS, items, strict=False)}
        wanted = set(_ITEMS[:-1])
    missing = sorted(wanted - set(fields))
    if missing:
        raise FieldError(missing[0], "is missing")
    return {name: _plain(fields[name]) for name in _ITEMS if name in fields}


def _plain(value: Any) -> Any:
    """Unwrap an array of one number, which tensorpack and numpy leave for scalars."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value
