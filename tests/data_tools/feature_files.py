"""Writes public feature formats from their descriptions, with nothing of the readers'."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.records import BadRow, ImageRecord


@dataclass
class Picture:
    """What a detector knows of an image: boxes are corners in pixels."""

    id: str
    width: int = 640
    height: int = 480
    regions: int = 5
    dim: int = 16
    classes: int = 7
    seed: int = 0
    features: NDArray[np.float32] = field(init=False)
    boxes: NDArray[np.float32] = field(init=False)
    probs: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, self.width, self.regions])
        self.features = rng.standard_normal((self.regions, self.dim)).astype(np.float32)
        low = rng.uniform(0, 0.5, (self.regions, 2))
        unit = np.concatenate([low, low + rng.uniform(0.1, 0.5, (self.regions, 2))], 1)
        self.boxes = (unit * [self.width, self.height, self.width, self.height]).astype(np.float32)
        self.probs = rng.dirichlet(np.ones(self.classes), self.regions).astype(np.float32)

    @property
    def unit_boxes(self) -> NDArray[np.float32]:
        """The boxes that a store should have."""
        return self.boxes / np.array([self.width, self.height] * 2, np.float32)


def b64(array: NDArray[Any]) -> str:
    """Base64 of an array's bytes."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def bottom_up_row(picture: Picture, probs: bool = False, **other: str) -> str:
    """image_id, image_w, image_h, num_boxes, boxes, features, cls_prob."""
    fields = {
        "image_id": picture.id,
        "image_w": str(picture.width),
        "image_h": str(picture.height),
        "num_boxes": str(picture.regions),
        "boxes": b64(picture.boxes),
        "features": b64(picture.features),
    }
    if probs:
        fields["cls_prob"] = b64(picture.probs)
    return "\t".join({**fields, **other}.values())


def write_lines(path: Path, rows: Iterable[str], end: str = "\n") -> Path:
    """Write rows, each with a line's end."""
    path.write_bytes("".join(row + end for row in rows).encode())
    return path


def write_line_index(path: Path, rows: Sequence[str]) -> None:
    """Write the ``.lineidx`` of a TSV: the byte at which each row begins."""
    starts = np.cumsum([0, *(len(row.encode()) + 1 for row in rows)])[:-1]
    path.with_suffix(".lineidx").write_text("".join(f"{start}\n" for start in starts))


def json_row(key: str, value: Any) -> str:
    """Key, JSON."""
    return f"{key}\t{json.dumps(value)}"


def read_all(source: Any) -> list[ImageRecord | BadRow]:
    """All records of a source, part by part; parts survive a trip through JSON."""
    return [row for part in json.loads(json.dumps(source.parts())) for row in source.read(part)]


def good(source: Any) -> list[Any]:
    """All records, none of which may be bad."""
    rows = read_all(source)
    bad = [str(row) for row in rows if isinstance(row, BadRow)]
    assert not bad, bad
    return rows


def only_bad(source: Any) -> str:
    """The one bad row's message: one line, without the folder of its file (which test_import_lines looks at)."""
    bad = [row for row in read_all(source) if isinstance(row, BadRow)]
    assert len(bad) == 1, bad
    assert "\n" not in str(bad[0])
    return without_folder(str(bad[0]))


def without_folder(message: str) -> str:
    """A message that begins with a path, beginning with the file's name."""
    path, colon, rest = message.partition(": ")
    return path.rpartition("/")[2] + colon + rest


def assert_same(record: ImageRecord, picture: Picture) -> None:
    """The record holds the picture's arrays, bit by bit, in float32."""
    assert (record.id, record.width, record.height) == (picture.id, picture.width, picture.height)
    assert record.features.dtype == np.float32
    assert record.boxes.dtype == np.float32
    np.testing.assert_array_equal(record.features, picture.features)
    np.testing.assert_array_equal(record.boxes, picture.unit_boxes)
