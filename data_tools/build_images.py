"""One part of an image import: the source's records, chosen and checked, in an images and a classes store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_tools.exclusion import is_excluded
from data_tools.records import BadRow, ImageLayout, ImageRecord, ImageSource
from data_tools.under_way import counted
from vlscale.data.store_writer import ClassWriter, ImageWriter, are_probabilities
from vlscale.errors import VlscaleError

MAX_ID = 512
CODEC_SAMPLE = 32
"""Of so many images, the error of one is measured."""
PER_REGION = ("objects", "attributes", "attrs", "regions")
"""Beginnings of the names of ``extra`` fields that hold one entry per region, and are shortened with them."""


@dataclass(frozen=True)
class Choice:
    """Which images and regions are kept.

    Attributes:
        max_regions: most regions of an image; the first ones.
        min_confidence: keep as many of the first regions as there are with a confidence above this; None keeps all.
        min_regions: fewest regions that ``min_confidence`` leaves (an image that has fewer keeps those).
        feature_dtype: dtype to store features in; None is the source's.
        codec: of the features column: ``none``, ``lossless`` or ``uint8``.
        excluded: file with one image id a line; images that are left out, or None.
    """

    max_regions: int = 1024
    min_confidence: float | None = None
    min_regions: int = 1
    feature_dtype: str | None = None
    codec: str = "none"
    excluded: Path | None = None

    def count(self, regions: int, conf: NDArray[np.float32] | None) -> int:
        """How many of an image's regions are kept: UNITER's ``clip(#(conf > threshold), min, max)``."""
        kept = regions
        if self.min_confidence is not None and conf is not None:
            kept = max(int((conf > self.min_confidence).sum()), self.min_regions)
        return min(kept, self.max_regions, regions)


@dataclass
class Counts:
    """What happened to the rows of a part."""

    rows: int = 0
    regions: int = 0
    excluded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    histogram: Counter[int] = field(default_factory=Counter)
    sampled: int = 0
    error_sum: float = 0.0
    error_max: float = 0.0


class ImageBuilder:
    """Builds parts of an image import; see :class:`data_tools.parts.PartBuilder`.

    Args:
        open_source: opens the source; called once in each process, and pickled into it.
        layout: what the images share.
        choice: what is kept.
        skip: count and list bad rows; otherwise the first one ends the build.
        again: file that tells, by part, the rows that repeat an id of an earlier part, and what they repeat.
    """

    def __init__(
        self,
        open_source: Callable[[], ImageSource],
        layout: ImageLayout,
        choice: Choice,
        skip: bool,
        again: Path | None = None,
    ) -> None:
        self.open_source = open_source
        self.layout = layout
        self.choice = choice
        self.skip = skip
        self.again = again

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("source", "excluded")}

    @cached_property
    def source(self) -> ImageSource:
        """The opened source."""
        return self.open_source()

    @cached_property
    def excluded(self) -> frozenset[str]:
        """Ids of images that are left out."""
        if self.choice.excluded is None:
            return frozenset()
        return frozenset(self.choice.excluded.read_text(encoding="utf-8").split("\n"))

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write ``images/``, ``classes/``, ``ids.npy``, ``rows.jsonl`` and ``dropped.jsonl`` into ``folder``."""
        repeated = read_repeated(self.again).get(number, {})
        counts, hashes = Counts(), []
        with ExitStack() as stack:
            rows = stack.enter_context((folder / "rows.jsonl").open("w", encoding="utf-8"))
            dropped = stack.enter_context((folder / "dropped.jsonl").open("w", encoding="utf-8"))
            classes = None if self.layout.num_classes is None else stack.enter_context(self._classes(folder))
            images = stack.enter_context(self._images(folder))
            seen: dict[str, str] = {}
            accepted = 0
            for record in counted(self.source.read(part)):
                found = record if isinstance(record, BadRow) else self._prepare(record, seen, counts)
                if found is None:
                    continue
                if isinstance(found, ImageRecord) and accepted in repeated:
                    seen[found.id] = found.where  # as when the part was built with this row
                    found = BadRow(found.where, "id", f"{found.id!r} is also that of {repeated[accepted]}")
                    accepted += 1
                if isinstance(found, ImageRecord):
                    found = _write(found, images, classes)
                if isinstance(found, BadRow):
                    self._drop(found, counts, dropped)
                    continue
                accepted += 1
                seen[found.id] = found.where
                hashes.append(xxhash.xxh3_64_intdigest(found.id))
                rows.write(json.dumps([found.id, found.where]) + "\n")
                _count(found, counts)
                if self.choice.codec == "uint8" and counts.rows % CODEC_SAMPLE == 1:
                    _count_error(found.features, self.choice, counts)
        np.save(folder / "ids.npy", np.asarray(hashes, np.uint64))
        return {
            "rows": counts.rows,
            "regions": counts.regions,
            "excluded": counts.excluded,
            "dropped": dict(counts.reasons),
            "histogram": {str(key): value for key, value in sorted(counts.histogram.items())},
            "repeated": sorted(repeated),
            "codec_error": [counts.sampled, counts.error_sum, counts.error_max],
        }

    def _images(self, folder: Path) -> ImageWriter:
        dtype: Any = self.choice.feature_dtype or self.layout.feature_dtype
        return ImageWriter(
            folder, self.layout.feature_dim, dtype, source=self.source.description, codec=self.choice.codec
        )

    def _classes(self, folder: Path) -> ClassWriter:
        dtype: Any = self.layout.class_dtype
        assert self.layout.num_classes is not None
        return ClassWriter(folder, self.layout.num_classes, dtype, self.layout.class_names)

    def _drop(self, row: BadRow, counts: Counts, dropped: Any) -> None:
        if not self.skip:
            raise VlscaleError(f"{row}; --on-error skip leaves such rows out and lists them")
        counts.reasons[reason(row)] += 1
        dropped.write(dropped_line(row))

    def _prepare(self, record: ImageRecord, seen: Mapping[str, str], counts: Counts) -> ImageRecord | BadRow | None:
        """Choose the regions and look at what the writers cannot see; None for an excluded image."""
        if is_excluded(record.id, self.excluded):
            counts.excluded += 1
            return None
        if record.id in seen:
            return BadRow(record.where, "id", f"{record.id!r} is also that of {seen[record.id]}")
        if len(record.id) > MAX_ID:
            return BadRow(record.where, "id", f"has {len(record.id)} characters, at most {MAX_ID} are allowed")
        problem = self._problem(record)
        if problem:
            return BadRow(record.where, *problem)
        kept = self.choice.count(len(record.features), record.conf)
        return record if kept == len(record.features) else _first(record, kept)

    def _problem(self, record: ImageRecord) -> tuple[str, str] | None:
        layout, features, probs = self.layout, record.features, record.class_probs
        if features.ndim != 2 or features.shape[1] != layout.feature_dim:
            return "features", f"shape {list(features.shape)}, expected [R, {layout.feature_dim}] as the first image's"
        if features.dtype != np.dtype(layout.feature_dtype):
            return "features", f"dtype {features.dtype}, expected {layout.feature_dtype} as the first image's"
        if self.choice.min_confidence is not None and record.conf is None:
            return "conf", "the source has no confidences, which --min-confidence needs"
        if layout.num_classes is None:
            return None
        shape = [len(features), layout.num_classes]
        if probs is None:
            return "class_probs", "missing, though the source's first image has them"
        if list(probs.shape) != shape or probs.dtype != np.dtype(layout.class_dtype):
            return "class_probs", f"{probs.dtype} {list(probs.shape)}, expected {layout.class_dtype} {shape}"
        if not are_probabilities(probs):
            return "class_probs", f"span {probs.min()}..{probs.max()}, expected 0..1"
        return None


def _first(record: ImageRecord, kept: int) -> ImageRecord:
    """The record's first regions."""
    regions = len(record.features)
    extra = {
        key: value[:kept] if key.startswith(PER_REGION) and isinstance(value, list) and len(value) == regions else value
        for key, value in record.extra.items()
    }
    return replace(
        record,
        features=record.features[:kept],
        boxes=record.boxes[:kept],
        conf=None if record.conf is None else record.conf[:kept],
        class_probs=None if record.class_probs is None else record.class_probs[:kept],
        extra=extra,
    )


def _write(record: ImageRecord, images: ImageWriter, classes: ClassWriter | None) -> ImageRecord | BadRow:
    try:
        images.write(record.id, record.width, record.height, record.features, record.boxes, record.conf, record.extra)
    except VlscaleError as error:
        return BadRow(record.where, "", str(error))
    if classes is not None:
        assert record.class_probs is not None
        classes.write(record.class_probs)
    return record


def _count_error(features: NDArray[Any], choice: Choice, counts: Counts) -> None:
    """Compare one image's features with what a lossy codec makes of them."""
    from vlscale.data.codec import decode_into, encode

    stored = np.ascontiguousarray(features, choice.feature_dtype or features.dtype)
    found = np.empty_like(stored)
    decode_into(choice.codec, np.frombuffer(encode(choice.codec, stored), np.uint8), found)
    error = np.abs(found.astype(np.float64) - stored)
    counts.sampled += 1
    counts.error_sum += float(error.mean())
    counts.error_max = max(counts.error_max, float(error.max()))


def _count(record: ImageRecord, counts: Counts) -> None:
    counts.rows += 1
    counts.regions += len(record.features)
    counts.histogram[len(record.features)] += 1


def dropped_line(row: BadRow) -> str:
    """A line of dropped-images.jsonl or dropped-texts.jsonl."""
    return json.dumps({"where": row.where, "field": row.field, "why": row.why}) + "\n"


def reason(row: BadRow) -> str:
    """What rows are counted by: the field, without the index of an entry."""
    return row.field.partition("[")[0] or "row"


def read_repeated(path: Path | None) -> dict[int, dict[int, str]]:
    """Read part -> {row: what it repeats} as :func:`write_repeated` wrote it; empty if there is no file."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_bytes())
    return {int(part): {int(row): where for row, where in rows.items()} for part, rows in found.items()}


def find_repeated(
    hashes: Sequence[NDArray[np.uint64]], look_up: Callable[[int, Sequence[int]], Sequence[tuple[str, str]]]
) -> Iterator[tuple[int, int, str, str, str]]:
    """Find rows whose id an earlier row has.

    Args:
        hashes: uint64 [n] of each part's ids.
        look_up: ``(part, rows)`` -> (id, where) of these rows.

    Yields:
        ``(part, row, id, where, where of the first row with this id)`` in the order of parts and rows.
    """
    owners = np.repeat(np.arange(len(hashes), dtype=np.int32), [len(part) for part in hashes])
    begins = np.cumsum([0, *(len(part) for part in hashes)])
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    order = np.argsort(every, kind="stable")
    same = every[order][1:] == every[order][:-1]
    suspects = np.unique(np.concatenate([order[1:][same], order[:-1][same]]))
    names: dict[int, tuple[str, str]] = {}
    for part in np.unique(owners[suspects]).tolist():
        places = suspects[owners[suspects] == part]
        found = look_up(part, (places - begins[part]).tolist())
        names.update(zip(places.tolist(), found, strict=True))
    first: dict[str, str] = {}
    for place in suspects.tolist():
        name, where = names[place]
        if name in first:
            part = int(owners[place])
            yield part, int(place - begins[part]), name, where, first[name]
        else:
            first[name] = where
