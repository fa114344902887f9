"""Reader of the images store: region features and boxes, straight to their place in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.codec import decode_into
from vlscale.data.index import read_array, read_meta
from vlscale.data.offsets import Offsets
from vlscale.data.reader import FilesOf
from vlscale.data.schema import ImagesMeta, image_columns
from vlscale.data.shard import Shard
from vlscale.data.store_base import Store, check_lengths, lengths_of, owner, within

_BOX = np.dtype("V16")  # four float32 at once
_LIMITS: dict[int, tuple[type[Any], int, type[Any], int]] = {
    2: (np.int16, 0x7C00, np.uint16, 0xFC00),
    4: (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}
"""Bits of positive and negative infinity by bytes per element."""


@dataclass(frozen=True, eq=False)
class _Found:
    """The images of a batch that one shard holds, B of them.

    Attributes:
        shard: the shard.
        local: int64 [B], their rows in the shard.
        rows: int64 [B], their rows in the store.
        counts: int64 [B], how many of their regions are wanted.
        firsts: int64 [B], where their regions begin in the packed arrays.
    """

    shard: Shard
    local: NDArray[np.int64]
    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    firsts: NDArray[np.int64]


class ImageStore(Store):
    """Reader of ``ROOT/images``.

    Raises:
        VlscaleError: a file is missing or damaged, or files do not fit together.
    """

    meta: ImagesMeta
    _cached = ("lengths",)

    def __init__(self, folder: Path, verify: bool = True, files: FilesOf | None = None) -> None:
        self.meta = read_meta(ImagesMeta, folder / "meta.json")
        super().__init__(folder, image_columns(self.meta), verify, files)
        check_lengths(self.folder, self.lengths, "image", "regions")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "region_ptr"}

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [M], regions of each image."""
        return read_array(self.folder / "lengths.npy", "int32", len(self))

    @cached_property
    def region_ptr(self) -> Offsets:
        """[M+1]; the regions of image i are rows ``region_ptr[i]..region_ptr[i+1]`` of the classes store."""
        return Offsets(self.lengths)

    @property
    def feature_dtype(self) -> np.dtype[Any]:
        """Element type of the stored features."""
        return np.dtype(self.meta.feature_dtype)

    def counts_of(self, rows: NDArray[np.int64], max_regions: int) -> NDArray[np.int32]:
        """Regions, int32 [B], that the first ``max_regions`` of int64 [B] ``rows`` are (0 for -1); no shard is read.

        Raises:
            IndexError: there is no such row.
        """
        counts = np.zeros(len(rows), np.int32)
        present = rows >= 0
        counts[present] = np.minimum(lengths_of(self.folder, self.lengths, rows[present]), max_regions)
        return counts

    def region_rows(self, rows: NDArray[np.int64], counts: NDArray[np.int32]) -> NDArray[np.int64]:
        """Rows in the classes store, int64 [sum of counts], of the first ``counts`` (int32 [B]) regions of ``rows``."""
        return np.repeat(self.region_ptr[np.maximum(rows, 0)], counts) + within(counts)

    def regions(
        self, rows: NDArray[np.int64], max_regions: int
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.int32], NDArray[np.int64]]:
        """The first ``max_regions`` regions of each image, packed.

        Args:
            rows: int64 [B] image rows, in any order and repeated as you like; -1 is no image and gives no regions.
            max_regions: at least 1.

        Returns:
            ``(features, boxes, counts, region_rows)``: [K, D] in the stored dtype, float32 [K, 4], int32 [B] with sum
            K, and int64 [K], each region's row in the classes store.

        Raises:
            VlscaleError: features that are NaN, infinite or of another width than meta.json says, boxes outside 0..1 or
                without area, or another number of regions than lengths.npy says.
        """
        rows = np.asarray(rows, np.int64)
        counts = self.counts_of(rows, max_regions)
        total = int(counts.sum(dtype=np.int64))
        features = np.empty((total, self.meta.feature_dim), self.feature_dtype)
        boxes = np.empty((total, 4), np.float32)
        self.write_regions(rows, counts, features, boxes)
        return features, boxes, counts, self.region_rows(rows, counts)

    def write_regions(
        self,
        rows: NDArray[np.int64],
        counts: NDArray[np.int32],
        features: NDArray[Any],
        boxes: NDArray[np.float32],
        firsts: NDArray[np.int64] | None = None,
    ) -> None:
        """Write the first ``counts`` (see :meth:`counts_of`) regions of each image.

        Args:
            rows: int64 [B]; -1 is no image.
            counts: int32 [B].
            features: [K, D] in the stored dtype, C-contiguous.
            boxes: float32 [K, 4], C-contiguous.
            firsts: int64 [B], where each image's regions begin in them; default: one image after the other.

        Raises:
            VlscaleError: see :meth:`regions`.
        """
        present = np.flatnonzero(rows >= 0)
        firsts = (np.cumsum(counts, dtype=np.int64) - counts if firsts is None else firsts)[present]
        used, kept = rows[present], counts[present].astype(np.int64)
        for shard, at, local in self._reader.by_shard(used):
            found = _Found(shard, local, used[at], kept[at], firsts[at])
            self._write_boxes(found, boxes)
            self._write_features(found, features)

    def _write_boxes(self, found: _Found, out: NDArray[np.float32]) -> None:
        ((starts, shapes),) = found.shard.shapes(found.local, ["boxes"], [2])
        self._check_shapes(found.rows, "boxes", shapes, 4)
        inside = within(found.counts)
        places = np.repeat(starts, found.counts) + 16 * inside
        boxes = found.shard.elements(places, _BOX).view(np.float32).reshape(-1, 4)
        low, high = boxes[:, :2], boxes[:, 2:]
        good = ((low >= 0) & (high <= 1) & (low < high)).all(1)
        if not good.all():
            bad = int(np.argmin(good))
            box = boxes[bad].tolist()
            self.fail(owner(found.rows, found.counts, bad), f"box {box} is not x1 < x2, y1 < y2 inside 0..1")
        out[np.repeat(found.firsts, found.counts) + inside] = boxes
        self.bytes_read += boxes.nbytes

    def _write_features(self, found: _Found, out: NDArray[Any]) -> None:
        if self.meta.feature_codec != "none":
            self._decode_features(found, out)
            return
        ((starts, shapes),) = found.shard.shapes(found.local, ["features"], [2])
        self._check_shapes(found.rows, "features", shapes, self.meta.feature_dim)
        width = self.meta.feature_dim * self.feature_dtype.itemsize
        target, source = out.reshape(-1).view(np.uint8), found.shard.bytes
        spans = (found.rows, starts, found.counts * width, found.firsts * width)
        for row, start, size, first in zip(*(each.tolist() for each in spans), strict=True):
            copied = target[first : first + size]
            copied[:] = source[start : start + size]
            self._check_finite(row, copied)
            self.bytes_read += size

    def _decode_features(self, found: _Found, out: NDArray[Any]) -> None:
        codec = self.meta.feature_codec
        ((starts, sizes),) = found.shard.spans(found.local, ["features"])
        spans = (found.rows, starts, sizes, found.counts, found.firsts, self.lengths[found.rows])
        for row, start, size, count, first, length in zip(*(each.tolist() for each in spans), strict=True):
            target = out[first : first + count]
            whole = target if count == length else np.empty((length, self.meta.feature_dim), self.feature_dtype)
            try:
                decode_into(codec, found.shard.bytes[start : start + size], whole)
            except ValueError as error:
                self.fail(row, f"features cannot be decoded ({error}) as {length} regions of {self.meta.feature_dim}")
            if whole is not target:
                target[:] = whole[:count]
            self._check_finite(row, target.reshape(-1).view(np.uint8))
            self.bytes_read += size

    def _check_shapes(self, rows: NDArray[np.int64], name: str, found: NDArray[np.int64], width: int) -> None:
        lengths = np.asarray(self.lengths[rows], np.int64)
        good = (found[:, 0] == lengths) & (found[:, 1] == width)
        if not good.all():
            bad = int(np.argmin(good))
            self.fail(
                int(rows[bad]),
                f"{name} {found[bad].tolist()}, expected [{lengths[bad]}, {width}] by lengths.npy and meta.json "
                f"(feature_dim)",
            )

    def _check_finite(self, row: int, copied: NDArray[np.uint8]) -> None:
        """Look at the bits of one image's features while they are in the processor's cache.

        As signed integers, positive infinity and NaN lie above every other value; as unsigned ones, negative ones do.
        Both maxima add about a quarter to the time of the copy, where a test of floating-point values would take ten
        times as long as the copy. They are taken of every row every time: a hash says that a shard is what somebody
        wrote, not that it holds numbers, and a single NaN ends a training run far from its cause.
        """
        signed, positive, unsigned, negative = _LIMITS[self.feature_dtype.itemsize]
        if copied.view(signed).max() >= positive or copied.view(unsigned).max() >= negative:
            self.fail(row, "features contain NaN or infinity")
