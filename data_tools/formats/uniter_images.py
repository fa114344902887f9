"""UNITER's image databases: ``<img_db>/<split>/`` with LMDBs, one per choice of regions, and JSONs of counts.

Sub-folders are ``feat_th{conf}_max{n}_min{n}``, ``feat_numbb{n}`` or ``all``, perhaps with ``_compressed``. A value is
msgpack with msgpack-numpy's arrays, or a compressed npz: ``features`` [n, D], ``norm_bb`` [n, 6] (x1, y1, x2, y2, w,
h in 0..1), ``conf`` [n], ``soft_labels`` [n, C], float16 or float32. ``nbb_th{conf}_max{n}_min{n}.json`` maps the npz
file name (the key) to the number of regions to use of ``all``. An image's size in pixels is not recorded: 1 x 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import (
    FRACTION_SLACK,
    MAX_REGIONS,
    BoxRule,
    FieldError,
    add_box_arguments,
    box_rule,
    finite,
    from_msgpack,
    typed,
    unpack_msgpack,
    whole_number,
    word,
)
from data_tools.formats.lmdb_files import first_part, lmdb_parts, read_range
from data_tools.formats.npz import load_npz
from data_tools.records import BadRow, ImageLayout, ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "UNITER's image LMDBs (feat_th*, feat_numbb*, all; compressed or not)"

PART_IMAGES = 2048
PROBE = 64
"""Records at the beginning of which one must be usable."""
MAX_COUNTS_BYTES = 1 << 30
KEYS = b"__keys__"
"""Key of the list of all keys."""
_FIELDS = ("features", "norm_bb", "conf", "soft_labels")
_FLOATS = ("float16", "float32")
_SIDE_SLACK = 0.02
"""How far ``norm_bb``'s w and h may be from x2 - x1 and y2 - y1, which catches other orders of the six numbers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    parser.add_argument("--variant", help="sub-folder to read where there are several, for example all_compressed")
    parser.add_argument(
        "--nbb", type=Path, help="JSON of region counts: cuts 'all' to them; other variants must have as many"
    )
    add_box_arguments(parser)


def open_source(options: argparse.Namespace) -> UniterImages:
    """Open the databases of ``options.sources``: folders of a split, or of one of its LMDBs."""
    folders = tuple(find_lmdb(path, options.variant) for path in options.sources)
    return UniterImages(folders, options.nbb, box_rule(options))


def find_lmdb(path: Path, variant: str | None, option: str = "--variant") -> Path:
    """Find the LMDB's folder: ``path`` itself, or the sub-folder ``variant`` of a split (or the only one).

    ``option`` is what errors call the choice of a sub-folder.

    Raises:
        VlscaleError: there is none, or several to choose from.
    """
    if (path / "data.mdb").is_file():
        return path
    try:
        names = sorted(item.name for item in path.iterdir() if (item / "data.mdb").is_file())
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); give the folder of an image database") from None
    if variant is None and len(names) == 1:
        return path / names[0]
    if variant in names:
        return path / str(variant)
    found = ", ".join(names) or "none"
    raise VlscaleError(f"{path}: name the sub-folder to read with {option} (found: {found})")


@dataclass(frozen=True)
class UniterImages:
    """See the module.

    Attributes:
        folders: of the LMDBs.
        nbb: JSON of region counts, or None to look for the one that belongs to a folder's name.
        rule: how boxes are checked.
    """

    folders: tuple[Path, ...]
    nbb: Path | None
    rule: BoxRule

    description = "UNITER image database (bottom-up attention: Faster R-CNN ResNet-101, Visual Genome)"

    def layout(self) -> ImageLayout:
        """See :class:`~data_tools.records.ImageSource`."""
        problem = "it holds no records"
        for folder in self.folders:
            for key, value in read_range(first_part(folder, PROBE), folder):
                if key == KEYS:
                    continue
                try:
                    arrays = _arrays(value)
                    features, probs = arrays["features"], arrays.get("soft_labels")
                    typed("features", features, _FLOATS, (len(features), None))
                    if probs is None:
                        return ImageLayout(features.shape[1], features.dtype.name)
                    typed("soft_labels", probs, _FLOATS, (len(features), None))
                    return ImageLayout(features.shape[1], features.dtype.name, probs.shape[1], probs.dtype.name)
                except FieldError as error:
                    problem = str(error.at(where_of(folder, key)))
        raise VlscaleError(f"{self.folders[0]}: no usable record among the first ({problem}); is it an image database?")

    def parts(self) -> list[dict[str, Any]]:
        """Ranges of 2,048 keys."""
        return lmdb_parts(self.folders, PART_IMAGES, "folder")

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """Yield the records of a range, in the order of their keys."""
        folder = self.folders[part["folder"]]
        for key, value in read_range(part, folder):
            if key == KEYS:
                continue
            try:
                yield self.record(folder, key, value)
            except FieldError as error:
                yield error.at(where_of(folder, key))

    def record(self, folder: Path, key: bytes, value: bytes) -> ImageRecord:
        """Decode a record of one of the databases.

        Raises:
            FieldError: it is bad.
            VlscaleError: the file of region counts is.
        """
        cut = folder.name.startswith("all")
        return _record(where_of(folder, key), key, value, self._counts(folder), cut, self.rule)

    def _counts(self, folder: Path) -> Mapping[str, Any] | None:
        name = folder.name.removesuffix("_compressed")
        path = self.nbb or folder.parent / f"nbb_{name.removeprefix('feat_')}.json"
        if self.nbb is None and not (name.startswith("feat_th") and path.is_file()):
            return None
        if path not in self._opened:
            self._opened[path] = _read_counts(path)
        counts: Mapping[str, Any] = self._opened[path]
        return counts

    @cached_property
    def _opened(self) -> dict[Path, Any]:
        return {}


def _read_counts(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_COUNTS_BYTES:
            raise VlscaleError(f"{path}: larger than {MAX_COUNTS_BYTES} bytes; that is no file of region counts")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise VlscaleError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise VlscaleError(f"{path}: holds no JSON object; expected npz file name -> number of regions")
    return found


def where_of(folder: Path, key: bytes) -> str:
    """Name a record, for errors."""
    return f"{folder}: key {key.decode('utf-8', 'backslashreplace')[:512]}"


def _arrays(value: bytes) -> dict[str, Any]:
    """The arrays of a record, from npz or msgpack; scalars that the public script left behind are passed over."""
    if value[:2] == b"PK":
        arrays: dict[str, Any] = dict(load_npz("record", value, _FIELDS))
    else:
        found = unpack_msgpack("record", value)
        if not isinstance(found, dict):
            raise FieldError("record", "is no map of arrays")
        arrays = {name: from_msgpack(name, found[name.encode()]) for name in _FIELDS if name.encode() in found}
    arrays = {name: array for name, array in arrays.items() if not isinstance(array, np.ndarray) or array.ndim}
    for name in _FIELDS[:2]:
        if not isinstance(arrays.get(name), np.ndarray):
            raise FieldError(name, "is missing, or is no array")
    return arrays


def _record(
    where: str, key: bytes, value: bytes, counts: Mapping[str, Any] | None, cut: bool, rule: BoxRule
) -> ImageRecord:
    name = word("key", key)
    arrays = _arrays(value)
    rows = len(arrays["features"])
    if not 1 <= rows <= MAX_REGIONS:
        raise FieldError("features", f"has {rows} regions, expected 1..{MAX_REGIONS}")
    kept = _kept(name, rows, counts, cut)
    features = finite("features", typed("features", arrays["features"], _FLOATS, (rows, None)))
    six = typed("norm_bb", arrays["norm_bb"], _FLOATS, (rows, 6)).astype(np.float32)
    conf = probs = None
    if "conf" in arrays:
        conf = typed("conf", arrays["conf"], _FLOATS, (rows,)).astype(np.float32)[:kept]
    if "soft_labels" in arrays:
        probs = typed("soft_labels", arrays["soft_labels"], _FLOATS, (rows, None))[:kept]
    return ImageRecord(where, name, 1, 1, features[:kept], _boxes(six[:kept], rule), finite_or_none(conf), probs)


def finite_or_none(conf: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """Refuse confidences that are NaN or infinite."""
    return None if conf is None else finite("conf", conf)


def _kept(name: str, rows: int, counts: Mapping[str, Any] | None, cut: bool) -> int:
    """Regions that the count file grants an image."""
    if counts is None:
        return rows
    if name not in counts:
        raise FieldError("nbb", "the file of region counts does not have this image")
    kept = whole_number("nbb", counts[name], 1, MAX_REGIONS)
    if kept > rows or (kept < rows and not cut):
        raise FieldError("features", f"has {rows} regions, expected {kept} by the file of region counts")
    return kept


def _boxes(six: NDArray[np.float32], rule: BoxRule) -> NDArray[np.float32]:
    finite("norm_bb", six)
    boxes = rule.apply("norm_bb", six[:, :4], 1, 1, FRACTION_SLACK)
    if rule.order == "xyxy" and not rule.swap and not rule.clip:
        off = np.abs(six[:, 4:] - (six[:, 2:4] - six[:, :2])).max(1) > _SIDE_SLACK
        if off.any():
            row = int(np.argmax(off))
            raise FieldError(
                f"norm_bb[{row}]", f"{six[row].tolist()} are not x1, y1, x2, y2, w, h with w = x2 - x1 and h = y2 - y1"
            )
    return boxes


def source_of(folders: Sequence[Path], nbb: Path | None = None) -> UniterImages:
    """The source of LMDB folders with the default rule for boxes."""
    return UniterImages(tuple(folders), nbb, BoxRule())
