"""Images without texts (OpenImages, COCO unlabeled): a folder of one ``.npz`` per image, as detectors leave them.

Each holds ``features`` (or ``x``) [R, D] and boxes: ``norm_bb`` [R, 4 or 6] in 0..1 (UNITER's detector scripts), or
``boxes`` (or ``bbox``) [R, 4] in pixels with ``image_w`` and ``image_h`` (or ``width`` and ``height``); perhaps
``conf`` [R] and ``soft_labels`` (or ``cls_prob``) [R, C]. The id is the path below the folder without ``.npz``.

``--list`` takes only the images of a list: OpenImages' CSV (column ``ImageID``), COCO's ``image_info_*.json``, or one
id a line; an image of the list without a file is a bad row. Pictures themselves go through ``extract_regions``.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.formats.arrays import (
    FRACTION_SLACK,
    MAX_ARRAY_BYTES,
    MAX_REGIONS,
    PIXEL_SLACK,
    BoxRule,
    FieldError,
    add_box_arguments,
    box_rule,
    finite,
    image_size,
    typed,
    word,
)
from data_tools.formats.captions import ImageNames, add_image_id_argument, mapping, member, stem
from data_tools.formats.json_stream import read_elements
from data_tools.formats.lines import file_size, line_parts, read_lines
from data_tools.formats.npz import load_npz
from data_tools.formats.numbered_lines import MAX_ROW
from data_tools.records import BadRow, ImageLayout, ImageRecord
from vlscale.errors import VlscaleError

KIND = "images"
HELP = "one .npz of features and boxes per image, perhaps chosen by a list (OpenImages, COCO unlabeled)"
LIST_FIELDS = ("id", "file", "stem")
_FLOATS = ("float16", "float32")
_NAMES = {
    "features": ("features", "x"),
    "unit boxes": ("norm_bb",),
    "boxes": ("boxes", "bbox"),
    "width": ("image_w", "width"),
    "height": ("image_h", "height"),
    "conf": ("conf",),
    "class_probs": ("soft_labels", "cls_prob"),
}
_WANTED = tuple(name for names in _NAMES.values() for name in names)
_PART = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_box_arguments(parser)
    parser.add_argument("--list", type=Path, action="append", default=[], metavar="FILE", help="take only its images")
    add_image_id_argument(parser, "what --list says: {id}, {file}, {stem}")


def open_source(options: argparse.Namespace) -> ImageOnly:
    """Open the folders of ``options.sources``."""
    return ImageOnly(options.sources, box_rule(options), options.list, ImageNames(options.image_id, LIST_FIELDS))


class ImageOnly:
    """See the module."""

    description = "features from one npz per image"

    def __init__(
        self, folders: Sequence[Path], rule: BoxRule, lists: Sequence[Path] = (), names: ImageNames | None = None
    ) -> None:
        self.folders = list(folders)
        self.rule = rule
        self.lists = list(lists)
        self.names = names or ImageNames("{id}", LIST_FIELDS)

    def layout(self) -> ImageLayout:
        """See :class:`data_tools.records.ImageSource`."""
        problem: BadRow | None = None
        for _, found in zip(range(64), self.read({"begin": 0, "end": 64}), strict=False):
            if isinstance(found, ImageRecord):
                dim, kind = found.features.shape[1], found.features.dtype.name
                if found.class_probs is None:
                    return ImageLayout(dim, kind)
                return ImageLayout(dim, kind, found.class_probs.shape[1], found.class_probs.dtype.name)
            problem = problem or found
        raise VlscaleError(f"{self.folders[0]}: no usable .npz among the first ({problem})")

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.ImageSource`."""
        count = len(self._files)
        return [{"begin": begin, "end": min(begin + _PART, count)} for begin in range(0, count, _PART)]

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """See :class:`data_tools.records.ImageSource`."""
        for name, path in self._files[part["begin"] : part["end"]]:
            try:
                if path is None:
                    raise FieldError("id", f"is listed, but there is no {name}.npz")
                yield self._record(name, path)
            except FieldError as error:
                yield error.at(name if path is None else f"{path}: image {name!r}")

    @cached_property
    def _files(self) -> list[tuple[str, Path | None]]:
        """Ids and files of all images, in the order of their ids."""
        found: dict[str, Path | None] = {}
        for folder in self.folders:
            for name, path in _below(folder):
                if name in found:
                    raise VlscaleError(f"{path}: image {name!r} is also in {found[name]}; import one of them")
                found[name] = path
        if not found:
            raise VlscaleError(f"{self.folders[0]}: no .npz in it or below; pictures go through extract_regions")
        if self.lists:
            wanted = sorted({name for path in self.lists for name in read_list(path, self.names)})
            return [(name, found.get(name)) for name in wanted]
        return sorted(found.items())

    def _record(self, name: str, path: Path) -> ImageRecord:
        try:
            size = path.stat().st_size
            if size > MAX_ARRAY_BYTES:
                raise FieldError("npz", f"has {size} bytes, at most {MAX_ARRAY_BYTES} are allowed")
            arrays = load_npz("npz", path.read_bytes(), _WANTED)
        except OSError as error:
            raise FieldError("npz", f"cannot be read ({error.strerror})") from None
        field, features = _pick(arrays, "features", path)
        rows = len(features) if features.ndim else 0
        if not 1 <= rows <= MAX_REGIONS:
            raise FieldError(field, f"has {rows} regions, expected 1..{MAX_REGIONS}")
        features = finite(field, typed(field, features, _FLOATS, (rows, None)))
        width, height, boxes = self._boxes(arrays, rows, path)
        conf = arrays.get("conf")
        if conf is not None:
            conf = finite("conf", typed("conf", conf, _FLOATS, (rows,))).astype(np.float32)
        probs = None
        if any(each in arrays for each in _NAMES["class_probs"]):
            field, probs = _pick(arrays, "class_probs", path)
            probs = finite(field, typed(field, probs, _FLOATS, (rows, None)))
        return ImageRecord(f"{path}: image {name!r}", name, width, height, features, boxes, conf, probs)

    def _boxes(self, arrays: Mapping[str, NDArray[Any]], rows: int, path: Path) -> tuple[int, int, NDArray[np.float32]]:
        if "norm_bb" in arrays:
            columns = 6 if arrays["norm_bb"].shape[-1:] == (6,) else 4
            boxes = typed("norm_bb", arrays["norm_bb"], _FLOATS, (rows, columns))[:, :4]
            return 1, 1, self.rule.apply("norm_bb", boxes, 1, 1, FRACTION_SLACK)
        field, boxes = _pick(arrays, "boxes", path)
        boxes = typed(field, boxes, (*_FLOATS, "float64"), (rows, 4))
        sides = []
        for side in ("width", "height"):
            spelled, value = _pick(arrays, side, path)
            if value.shape:
                raise FieldError(spelled, f"has shape {value.shape}, expected one number")
            sides.append(image_size(spelled, value[()]))
        return sides[0], sides[1], self.rule.apply(field, boxes, sides[0], sides[1], PIXEL_SLACK)


def _pick(arrays: Mapping[str, NDArray[Any]], role: str, path: Path) -> tuple[str, NDArray[Any]]:
    name = next((each for each in _NAMES[role] if each in arrays), None)
    if name is None:
        raise FieldError(_NAMES[role][0], f"is missing (has {', '.join(sorted(arrays)) or 'nothing that is known'})")
    return name, arrays[name]


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Ids and files of the ``.npz`` in a folder and below; links to folders are not followed."""
    if not folder.is_dir():
        raise VlscaleError(f"{folder}: no such folder; give the folder of the .npz files")
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(place, file)
            if path.suffix == ".npz" and not path.is_symlink():
                yield path.relative_to(folder).as_posix().removesuffix(".npz"), path


def read_list(path: Path, names: ImageNames) -> Iterator[str]:
    """Ids of the images that a list names.

    Raises:
        VlscaleError: it is missing, damaged, or has no images.
    """
    count = 0
    rows = _json_rows(path) if path.suffix == ".json" else _line_rows(path)
    for where, values in rows:
        try:
            yield names.name("id", values)
        except FieldError as error:
            raise VlscaleError(str(error.at(where))) from None
        count += 1
    if not count:
        raise VlscaleError(f"{path}: names no images")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, index, element in read_elements(path):
        if key != "images":
            continue
        where = f"{path}: images[{index}]"
        try:
            row = mapping("", element)
            file = word("file_name", member(row, "file_name"))
            yield where, {"id": word("id", member(row, "id")), "file": file, "stem": stem(file)}
        except FieldError as error:
            raise VlscaleError(str(error.at(where))) from None


def _line_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV with a column ImageID, or of a file with an id (or a picture's name) a line."""
    file_size(path)
    column: int | None = None
    for part in line_parts([path]):
        for line in read_lines([path], part, MAX_ROW):
            if isinstance(line, BadRow):
                raise VlscaleError(str(line))
            try:
                fields = next(csv.reader([line.data.decode("utf-8-sig").strip()]))
            except (UnicodeDecodeError, csv.Error) as error:
                raise VlscaleError(f"{line.where}: cannot be read ({error})") from None
            if line.begin == 0 and "ImageID" in fields:
                column = fields.index("ImageID")
                continue
            if len(fields) <= (column or 0) or (column is None and len(fields) != 1):
                raise VlscaleError(f"{line.where}: has {len(fields)} fields; expected ids, or a column ImageID")
            value = fields[column or 0].strip()
            yield line.where, {"id": value, "file": value, "stem": stem(value)}
