"""Writers of the three stores: each row is checked, and a folder appears under its name only when it is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlscale.data.codec import encode
from vlscale.data.index import INDEX_NAME, read_array, read_index, read_meta
from vlscale.data.schema import (
    ClassesMeta,
    ImagesMeta,
    TextsMeta,
    Vocabulary,
    class_columns,
    image_columns,
    text_columns,
)
from vlscale.data.writer_base import StoreWriter, clip_boxes, floats, make_meta, plain_json, require_shape
from vlscale.errors import VlscaleError

SHARD_BYTES = 64 << 20
TEXT_SHARD_BYTES = 8 << 20
LEAST_SHARD_BYTES = 64 << 10
"""A text shard does not end with the images' before it has so many bytes."""

_Float = Literal["float16", "float32"]


class ImageWriter(StoreWriter):
    """Writes ``ROOT/images``: one row per image.

    Args:
        root: the dataset's folder.
        feature_dim: width D of the region features.
        feature_dtype: dtype the features are stored in; keep the source's.
        source: free text, what computed the features.
        codec: ``lossless`` (default), ``uint8`` (see :mod:`vlscale.data.codec`) or ``none``.
        shard_bytes: size at which a new shard is begun.
        compression: of whole shards (``zstd:3``), for features that are not coded.

    Attributes:
        rows: image id -> row, for :class:`TextWriter`.

    Raises:
        VlscaleError: the folder exists, or a setting is out of range.
    """

    def __init__(
        self,
        root: Path | str,
        feature_dim: int,
        feature_dtype: _Float = "float16",
        *,
        source: str = "",
        codec: str = "lossless",
        shard_bytes: int = SHARD_BYTES,
        compression: str | None = None,
    ) -> None:
        meta = make_meta(
            ImagesMeta, feature_dim=feature_dim, feature_dtype=feature_dtype, feature_codec=codec, source=source
        )
        if codec != "none" and compression is not None:
            raise VlscaleError(
                f"{root}: codec {codec!r} has compressed the features already, compressing the shards again would only "
                f"cost time; drop compression {compression!r}, or set codec='none'"
            )
        super().__init__(root, "images", meta, image_columns(meta), shard_bytes, compression)
        self.meta = meta
        self.rows: dict[str, int] = {}
        self._lengths: list[int] = []

    def write(
        self,
        id: str,
        width: int,
        height: int,
        features: ArrayLike,
        boxes: ArrayLike,
        conf: ArrayLike | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> int:
        """Append an image and return its row.

        Args:
            id: unique name of the image.
            width: of the image in pixels.
            height: of the image in pixels.
            features: [R, D] region features, best regions first (a run uses the first n).
            boxes: [R, 4], (x1, y1, x2, y2) in 0..1 of width and height.
            conf: [R] detection confidences; default 1.
            extra: task fields, JSON types.

        Raises:
            VlscaleError: no regions, wrong shapes, NaN or infinite values (also after conversion to the stored dtype),
                boxes outside 0..1 or without area, or an id that was written before.
        """
        where = f"image {id!r}"
        if not isinstance(id, str) or not id or id in self.rows:
            raise VlscaleError(f"{where}: the id must be a non-empty string that no other image has")
        if not (1 <= width < 1 << 31 and 1 <= height < 1 << 31):  # NaN fails too
            raise VlscaleError(f"{where}: size {width} x {height}, expected at least 1 x 1 pixels")
        features = floats(where, "features", features, self.meta.feature_dtype)
        count = len(features) if features.ndim else 0
        if not count:
            raise VlscaleError(f"{where}: no regions; leave it out, or use the whole image as one region")
        require_shape(where, "features", features, (count, self.meta.feature_dim))
        boxes = floats(where, "boxes", boxes, "float32")
        require_shape(where, "boxes", boxes, (count, 4))
        conf = np.ones(count, np.float32) if conf is None else floats(where, "conf", conf, "float32")
        require_shape(where, "conf", conf, (count,))
        codec = self.meta.feature_codec
        row = self._append(
            {
                "id": id,
                "width": int(width),
                "height": int(height),
                "features": features if codec == "none" else encode(codec, features),
                "boxes": clip_boxes(where, boxes),
                "conf": conf,
                "extra": plain_json(where, extra),
            }
        )
        self.rows[id] = row
        self._lengths.append(count)
        return row

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {"lengths.npy": np.asarray(self._lengths, "<i4")}


class TextWriter(StoreWriter):
    """Writes ``ROOT/texts``: one row per text.

    Texts come in the order of the first image that they refer to, those that refer to none last. A shard of texts ends
    where a shard of images does, if that is there already: then a window of text shards needs whole image shards, and
    no other.

    Args:
        root: the dataset's folder.
        vocabulary: what the ids mean.
        image_rows: image id -> row of the images store (:attr:`ImageWriter.rows`).
        tokenizer_json: content of a ``tokenizer.json`` to keep beside the texts.
        shard_bytes: size at which a new shard is begun.
        compression: of whole shards (``zstd:3``).
        num_types: kinds of segments that texts have; 1: none.

    Raises:
        VlscaleError: the folder exists, or a setting is out of range.
    """

    def __init__(
        self,
        root: Path | str,
        vocabulary: Vocabulary,
        image_rows: Mapping[str, int],
        tokenizer_json: str | None = None,
        *,
        shard_bytes: int = TEXT_SHARD_BYTES,
        compression: str | None = None,
        num_types: int = 1,
    ) -> None:
        meta = make_meta(TextsMeta, vocabulary=vocabulary, num_types=num_types)
        super().__init__(root, "texts", meta, text_columns(meta), shard_bytes, compression)
        self._image_ends = _shard_ends(Path(root) / "images")
        self.meta = meta
        self._image_rows = image_rows
        self._tokenizer_json = tokenizer_json
        self._lengths: list[int] = []
        self._refs: list[int] = []
        self._ptr: list[int] = [0]
        self._last: float = -1

    def write(
        self,
        id: str,
        text: str,
        input_ids: ArrayLike,
        images: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
        type_ids: ArrayLike | None = None,
    ) -> int:
        """Append a text and return its row.

        Args:
            id: name of the text.
            text: as people read it.
            input_ids: [t] word pieces without the first [CLS] and the last [SEP], t >= 1.
            images: ids of the images it refers to; pre-training pairs it with the first.
            extra: task fields, JSON types.
            type_ids: [t] type of each word piece; a run of equal types is a segment. None: all 0.

        Raises:
            VlscaleError: no tokens, an id outside the vocabulary, types that do not fit them or ``num_types``, an
                unknown or repeated image, or texts out of order.
        """
        where = f"text {id!r}"
        ids = self._checked_ids(where, input_ids)
        types = self._checked_types(where, type_ids, ids.size)
        refs = self._rows_of(where, images)
        first = refs[0] if refs else float("inf")
        if first < self._last:
            last = "no image" if self._last == float("inf") else f"row {self._last:.0f}"
            raise VlscaleError(
                f"{where}: its first image is row {first:.0f}, after a text of {last}; write texts sorted by the row "
                f"of their first image, texts without images last"
            )
        if refs and self._crosses(first):
            self._mds.end_shard(LEAST_SHARD_BYTES)
        row = self._append(
            {
                "id": str(id),
                "text": str(text),
                "input_ids": ids,
                **types,
                "images": list(images),
                "extra": plain_json(where, extra),
            }
        )
        self._last = first
        self._lengths.append(ids.size)
        self._refs.extend(refs)
        self._ptr.append(len(self._refs))
        return row

    def _checked_ids(self, where: str, input_ids: ArrayLike) -> NDArray[np.int32]:
        ids = _integers(where, "input_ids", input_ids)
        if not ids.size:
            raise VlscaleError(f"{where}: no tokens; leave the text out, or look at the tokenizer")
        return _below(where, "input_ids", ids, self.meta.vocabulary.size)

    def _checked_types(self, where: str, type_ids: ArrayLike | None, count: int) -> dict[str, NDArray[np.int32]]:
        """The column of types; empty where the store has none."""
        if self.meta.num_types == 1:
            if type_ids is not None:
                raise VlscaleError(f"{where}: has type_ids, but the store was begun without; set num_types")
            return {}
        types = np.zeros(count, np.int32) if type_ids is None else _integers(where, "type_ids", type_ids)
        require_shape(where, "type_ids", types, (count,))
        return {"type_ids": _below(where, "type_ids", types, self.meta.num_types)}

    def _rows_of(self, where: str, images: Sequence[str]) -> list[int]:
        if isinstance(images, str) or len(set(images)) != len(images):
            raise VlscaleError(f"{where}: images must be a list of different image ids, found {images!r}")
        unknown = [image for image in images if image not in self._image_rows]
        if unknown:
            raise VlscaleError(f"{where}: refers to image {unknown[0]!r}, which the images store does not have")
        return [int(self._image_rows[image]) for image in images]

    def _crosses(self, image: float) -> bool:
        """Does ``image`` lie in another shard of images than the last text's?"""
        ends = self._image_ends
        return self._last >= 0 and bool(np.diff(np.searchsorted(ends, [self._last, image], side="right"))[0])

    def _side_files(self) -> dict[str, NDArray[Any]]:
        if self._tokenizer_json is not None:
            (self.folder / "tokenizer.json").write_text(self._tokenizer_json, encoding="utf-8")
        return {
            "lengths.npy": np.asarray(self._lengths, "<i4"),
            "image_refs.npy": np.asarray(self._refs, "<i8"),
            "image_ptr.npy": np.asarray(self._ptr, "<i8"),
        }


class ClassWriter(StoreWriter):
    """Writes ``ROOT/classes``: one row of class probabilities per region, in the order of the images store.

    Args:
        root: the dataset's folder.
        num_classes: number C of the detector's classes.
        dtype: dtype the probabilities are stored in.
        class_names: names of the C classes.
        shard_bytes: size at which a new shard is begun.
        compression: of whole shards (``zstd:3``).

    Raises:
        VlscaleError: the folder exists, or a setting is out of range.
    """

    def __init__(
        self,
        root: Path | str,
        num_classes: int,
        dtype: _Float = "float16",
        class_names: Sequence[str] | None = None,
        *,
        shard_bytes: int = SHARD_BYTES,
        compression: str | None = None,
    ) -> None:
        names = None if class_names is None else list(class_names)
        meta = make_meta(ClassesMeta, num_classes=num_classes, dtype=dtype, class_names=names)
        super().__init__(root, "classes", meta, class_columns(meta), shard_bytes, compression)
        self.meta = meta

    def write(self, probs: ArrayLike) -> None:
        """Append the probabilities [R, C] of all regions of the next image (any number of rows is taken).

        Raises:
            VlscaleError: a wrong width, or values that are NaN, infinite or outside 0..1.
        """
        where = f"classes row {self.rows_written}"
        probs = floats(where, "probs", probs, self.meta.dtype)
        require_shape(where, "probs", probs, (len(probs) if probs.ndim else 0, self.meta.num_classes))
        if len(probs) and not are_probabilities(probs):
            span = f"{probs.min()}..{probs.max()}"
            raise VlscaleError(f"{where}: probs span {span}, expected 0..1; apply the softmax first")
        if len(probs):
            flat, width = np.ascontiguousarray(probs).data.cast("B"), probs.itemsize * probs.shape[1]
            self._append_encoded([flat[begin : begin + width] for begin in range(0, len(flat), width)])

    def _check_complete(self) -> None:
        lengths = self.target.parent / "images" / "lengths.npy"
        if lengths.exists():
            regions = int(read_array(lengths, "int32").sum(dtype=np.int64))
            if regions != self.rows_written:
                raise VlscaleError(f"{self.target}: {self.rows_written} rows, but the images have {regions} regions")

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {}


def _integers(where: str, name: str, values: ArrayLike) -> NDArray[Any]:
    """``values`` as one row of integers."""
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise VlscaleError(f"{where}: {name} are not one row of integers ({error})") from None
    require_shape(where, name, found, (found.size,))
    if found.size and found.dtype.kind not in "iu":
        raise VlscaleError(f"{where}: {name} have the dtype {found.dtype}, expected integers")
    return found


def _below(where: str, name: str, values: NDArray[Any], size: int) -> NDArray[np.int32]:
    """``values`` as int32, which must lie in 0..size-1."""
    if values.min() < 0 or values.max() >= size:
        raise VlscaleError(f"{where}: {name} span {values.min()}..{values.max()}, expected 0..{size - 1}")
    return values.astype("<i4")


def are_probabilities(probs: NDArray[Any]) -> bool:
    """Whether all values lie in 0..1.001; ``probs`` is float16 or float32 and not empty.

    Compared as integers at first, which is much faster for float16: the bits of numbers from 0 on rise with them, those
    of negative numbers and NaN lie above.
    """
    bits = {2: np.uint16, 4: np.uint32}[probs.dtype.itemsize]
    if probs.flags.c_contiguous and probs.view(bits).max() <= probs.dtype.type(1.001).view(bits):
        return True
    return bool(probs.min() >= 0 and probs.max() <= 1.001)  # NaN fails both


def _shard_ends(folder: Path) -> NDArray[np.int64]:
    """Rows at which the shards of a store end; empty if there is no store yet."""
    if not (folder / INDEX_NAME).exists():
        return np.zeros(0, np.int64)
    columns = image_columns(read_meta(ImagesMeta, folder / "meta.json"))
    return read_index(folder, columns, on_disk=False).ends  # compressed ones are counted like others
