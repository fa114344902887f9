"""Region extraction as a source of images: pictures in, records out, part by part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.records import BadRow, ImageLayout, ImageRecord
from data_tools.regions.pictures import decode, find
from data_tools.regions.types import Choice, Extractor, Regions
from vlscale.errors import VlscaleError

PART = 1024
MAX_BOXES = 1024
MAX_LINE = 1 << 20


@dataclass(frozen=True)
class RegionSource:
    """An :class:`~data_tools.records.ImageSource` over a folder of pictures.

    Attributes:
        folder: the pictures, in any depth; a picture's id is its name relative to the folder, without suffix.
        make: builds the extractor with its weights; called once in each process that reads.
        boxes: JSON lines ``{"image": id, "boxes": [[x1, y1, x2, y2], ...]}`` in pixels, or None to detect.
        box_format: ``xyxy``, or ``xywh`` (left, top, width, height).
        choice: which detections are kept.
        batch: pictures that run together.
        feature_dtype: dtype that features and probabilities are stored in.
        device: where the network runs.
        description: of the extractor, for images/meta.json.
        follow_links: read linked folders, and links to pictures outside the folder.
    """

    folder: Path
    make: Callable[[], Extractor]
    boxes: Path | None = None
    box_format: str = "xyxy"
    choice: Choice = field(default_factory=Choice)
    batch: int = 8
    feature_dtype: str = "float16"
    device: str = "cpu"
    description: str = ""
    follow_links: bool = False

    def layout(self) -> ImageLayout:
        """See :class:`~data_tools.records.ImageSource`."""
        _ = self._names, self._given  # mistakes in them are told before the network is built
        extractor = self._extractor
        return ImageLayout(extractor.feature_dim, self.feature_dtype, extractor.num_classes, self.feature_dtype)

    def parts(self) -> list[dict[str, Any]]:
        """Parts of 1,024 pictures, by name."""
        names = self._names
        return [{"begin": begin, "end": min(begin + PART, len(names))} for begin in range(0, len(names), PART)]

    def read(self, part: Mapping[str, Any]) -> Iterator[ImageRecord | BadRow]:
        """Yield a record per picture, in the order of their names."""
        names = self._names[int(part["begin"]) : int(part["end"])]
        for begin in range(0, len(names), self.batch):
            yield from self._extract(names[begin : begin + self.batch])

    @cached_property
    def _found(self) -> dict[str, str]:
        return find(self.folder, self.follow_links)

    @cached_property
    def _names(self) -> list[str]:
        seen: set[str] = set()
        for name in (name for name, why in self._found.items() if not why):
            if _id(name) in seen:
                raise VlscaleError(
                    f"{self.folder / name}: another picture has the same name up to its suffix; rename it"
                )
            seen.add(_id(name))
        return list(self._found)

    @cached_property
    def _extractor(self) -> Extractor:
        extractor = self.make()
        if isinstance(extractor, torch.nn.Module):
            with self._memory():
                extractor.to(self.device)
        return extractor

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Say in one line that the device's memory is too small."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            cure = f"give a smaller --batch than {self.batch}" if self.batch > 1 else "use another --device"
            raise VlscaleError(
                f"--device {self.device}: its memory is too small for --batch {self.batch}; {cure} and the same command"
            ) from None

    @cached_property
    def _given(self) -> dict[str, NDArray[np.float32]] | None:
        return None if self.boxes is None else read_boxes(self.boxes, self.box_format)

    def _extract(self, names: list[str]) -> Iterator[ImageRecord | BadRow]:
        decoded = [self._decode(name) for name in names]
        given = [self._boxes_of(name, picture) for name, picture in zip(names, decoded, strict=True)]
        usable = [
            place
            for place in range(len(names))
            if not isinstance(decoded[place], BadRow) and not isinstance(given[place], BadRow)
        ]
        found: dict[int, Regions] = {}
        if usable:
            pictures: Any = [decoded[place] for place in usable]
            boxes: Any = [given[place] for place in usable]
            with self._memory():
                found = dict(zip(usable, self._extractor.extract(pictures, boxes, self.choice), strict=True))
        for place, name in enumerate(names):
            picture, box = decoded[place], given[place]
            if isinstance(picture, BadRow):
                yield picture
            elif isinstance(box, BadRow):
                yield box
            else:
                yield self._record(name, picture, found[place])

    def _decode(self, name: str) -> NDArray[np.uint8] | BadRow:
        why = self._found[name]
        return BadRow(str(self.folder / name), "", why) if why else decode(self.folder / name)

    def _boxes_of(self, name: str, picture: NDArray[np.uint8] | BadRow) -> NDArray[np.float32] | BadRow | None:
        if self._given is None or isinstance(picture, BadRow):
            return None
        boxes = self._given.get(_id(name))
        where = str(self.folder / name)
        if boxes is None:
            return BadRow(where, "boxes", f"{self.boxes} has no boxes for image {_id(name)!r}")
        height, width = picture.shape[:2]
        inside = (boxes >= 0).all(1) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
        good = inside & (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
        if not good.all():
            bad = boxes[int(np.argmin(good))].tolist()
            return BadRow(
                where, "boxes", f"{bad} is not x1 < x2, y1 < y2 inside {width} x {height}; is it --box-format?"
            )
        return boxes

    def _record(self, name: str, picture: NDArray[np.uint8], regions: Regions) -> ImageRecord:
        height, width = picture.shape[:2]
        boxes = np.clip(regions.boxes / np.array([width, height] * 2, np.float32), 0, 1)
        extra: dict[str, Any] = {}
        if regions.objects is not None:
            extra["objects"] = regions.objects.tolist()
        if regions.attributes is not None:
            extra["attributes"] = regions.attributes[0].tolist()
            extra["attributes_conf"] = np.round(regions.attributes[1], 4).tolist()
        dtype = np.dtype(self.feature_dtype)
        return ImageRecord(
            where=str(self.folder / name),
            id=_id(name),
            width=width,
            height=height,
            features=regions.features.astype(dtype),
            boxes=boxes.astype(np.float32),
            conf=regions.conf.astype(np.float32),
            class_probs=None if regions.class_probs is None else regions.class_probs.astype(dtype),
            extra=extra,
        )


def read_boxes(path: Path, box_format: str) -> dict[str, NDArray[np.float32]]:
    """Read given boxes: image id -> float32 [R, 4], (x1, y1, x2, y2) in pixels.

    Raises:
        VlscaleError: the file is missing, a line is not as it should be, or an image stands twice.
    """
    found: dict[str, NDArray[np.float32]] = {}
    try:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                image, boxes = _parse_line(f"{path}: line {number}", line)
                if image in found:
                    raise VlscaleError(
                        f"{path}: line {number}: image {image!r} stands there twice; put its boxes together"
                    )
                if box_format == "xywh":
                    boxes[:, 2:] += boxes[:, :2]
                found[image] = boxes
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); give --boxes a JSON-lines file") from None
    return found


def _parse_line(where: str, line: bytes) -> tuple[str, NDArray[np.float32]]:
    expected = 'expected {"image": id, "boxes": [[x1, y1, x2, y2], ...]}'
    if len(line) > MAX_LINE:
        raise VlscaleError(f"{where}: longer than {MAX_LINE} bytes; {expected}")
    try:
        row = json.loads(line)
        with np.errstate(over="ignore"):
            image, boxes = row["image"], np.asarray(row["boxes"], np.float32)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise VlscaleError(f"{where}: {type(error).__name__}: {str(error)[:100]}; {expected}") from None
    if not isinstance(image, str) or boxes.ndim != 2 or boxes.shape[1] != 4 or not 1 <= len(boxes) <= MAX_BOXES:
        raise VlscaleError(f"{where}: found {str(row)[:100]}; {expected}, 1 to {MAX_BOXES} boxes")
    if not np.isfinite(boxes).all():
        raise VlscaleError(f"{where}: a box holds NaN or infinity; {expected}")
    return image, boxes


def _id(name: str) -> str:
    return name.rpartition(".")[0]
