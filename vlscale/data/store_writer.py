"""Writers of the three stores: each row is checked, and a folder appears under its name only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ValidationError
from typing_extensions import Self

from vlscale.data.index import read_array
from vlscale.data.mds import open_writer
from vlscale.data.schema import (
    ClassesMeta,
    ImagesMeta,
    TextsMeta,
    Vocabulary,
    class_columns,
    first_problem,
    image_columns,
    text_columns,
)
from vlscale.errors import VlscaleError

SHARD_BYTES = 64 << 20
BOX_SLACK = 1e-5
"""Boxes may leave 0..1 by this much (rounding of pixel coordinates); they are clipped to it."""
_Float = Literal["float16", "float32"]


class StoreWriter:
    """Common part: a context manager that fills ``ROOT/.NAME.tmp-<pid>`` and renames it to ``ROOT/NAME`` at the end.

    When the block raises, the temporary folder is removed and ``ROOT/NAME`` never exists.
    """

    def __init__(self, root: Path | str, name: str, meta: BaseModel, columns: Mapping[str, str], shard_bytes: int):
        self.target = Path(root) / name
        self.folder = self.target.with_name(f".{name}.tmp-{os.getpid()}")
        self.rows_written = 0
        self._meta = meta
        self._columns = columns
        self._shard_bytes = shard_bytes
        self._mds: Any = None

    def __enter__(self) -> Self:
        self._refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.exists():  # left by a killed process that had the same id
                shutil.rmtree(self.folder)
            self._mds = open_writer(self.folder, self._columns, self._shard_bytes)
        except OSError as error:
            raise VlscaleError(f"{self.target}: cannot be written ({error})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._mds.cancel_future_jobs()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finish(self) -> None:
        self._check_complete()
        self._mds.finish()
        for name, array in self._side_files().items():
            np.save(self.folder / name, array, allow_pickle=False)
        (self.folder / "meta.json").write_text(self._meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
        self._refuse_existing()
        os.rename(self.folder, self.target)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.target):
            raise VlscaleError(f"{self.target}: exists already and is not overwritten; remove it or choose another")

    def _append(self, row: dict[str, Any]) -> int:
        """Hand one checked row to MDS and return its number."""
        if self._mds is None:
            raise RuntimeError(f"{type(self).__name__} is a context manager: use it in a with statement")
        try:
            self._mds.write(row)
        except UnicodeEncodeError:  # half a surrogate pair, which JSON escapes can spell
            raise VlscaleError(f"{self.target}: row {self.rows_written}: its id or text is not Unicode") from None
        self.rows_written += 1
        return self.rows_written - 1

    def _check_complete(self) -> None:
        """Raise if what was written does not fit together."""

    @abstractmethod
    def _side_files(self) -> dict[str, NDArray[Any]]:
        """Arrays to save beside the shards, by file name."""


class ImageWriter(StoreWriter):
    """Writes ``ROOT/images``: one row per image.

    Args:
        root: the dataset's folder.
        feature_dim: width D of the region features.
        feature_dtype: dtype the features are stored in; keep the source's.
        source: free text, what computed the features.
        shard_bytes: size at which a new shard is begun.

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
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        meta = _meta(ImagesMeta, feature_dim=feature_dim, feature_dtype=feature_dtype, source=source)
        super().__init__(root, "images", meta, image_columns(meta), shard_bytes)
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
        features = _floats(where, "features", features, self.meta.feature_dtype)
        count = len(features) if features.ndim else 0
        if not count:
            raise VlscaleError(f"{where}: no regions; leave it out, or use the whole image as one region")
        _shape(where, "features", features, (count, self.meta.feature_dim))
        boxes = _floats(where, "boxes", boxes, "float32")
        _shape(where, "boxes", boxes, (count, 4))
        conf = np.ones(count, np.float32) if conf is None else _floats(where, "conf", conf, "float32")
        _shape(where, "conf", conf, (count,))
        row = self._append(
            {
                "id": id,
                "width": int(width),
                "height": int(height),
                "features": features,
                "boxes": _clip_boxes(where, boxes),
                "conf": conf,
                "extra": _json(where, extra),
            }
        )
        self.rows[id] = row
        self._lengths.append(count)
        return row

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {"lengths.npy": np.asarray(self._lengths, "<i4")}


class TextWriter(StoreWriter):
    """Writes ``ROOT/texts``: one row per text.

    Texts come in the order of the first image that they refer to, those that refer to none last. Then a shard of texts
    needs few shards of images.

    Args:
        root: the dataset's folder.
        vocabulary: what the ids mean.
        image_rows: image id -> row of the images store (:attr:`ImageWriter.rows`).
        tokenizer_json: content of a ``tokenizer.json`` to keep beside the texts.
        shard_bytes: size at which a new shard is begun.

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
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        meta = TextsMeta(vocabulary=vocabulary)
        super().__init__(root, "texts", meta, text_columns(meta), shard_bytes)
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
    ) -> int:
        """Append a text and return its row.

        Args:
            id: name of the text.
            text: as people read it.
            input_ids: [t] word pieces without [CLS] and [SEP], t >= 1.
            images: ids of the images it refers to; pre-training pairs it with the first.
            extra: task fields, JSON types.

        Raises:
            VlscaleError: no tokens, an id outside the vocabulary, an unknown or repeated image, or texts out of order.
        """
        where = f"text {id!r}"
        size = self.meta.vocabulary.size
        try:
            ids = np.asarray(input_ids)
        except ValueError as error:
            raise VlscaleError(f"{where}: input_ids are not one row of integers ({error})") from None
        _shape(where, "input_ids", ids, (ids.size,))
        if not ids.size:
            raise VlscaleError(f"{where}: no tokens; leave the text out, or look at the tokenizer")
        if ids.dtype.kind not in "iu":
            raise VlscaleError(f"{where}: input_ids have the dtype {ids.dtype}, expected integers")
        if ids.min() < 0 or ids.max() >= size:
            raise VlscaleError(f"{where}: input_ids span {ids.min()}..{ids.max()}, expected 0..{size - 1}")
        if isinstance(images, str) or len(set(images)) != len(images):
            raise VlscaleError(f"{where}: images must be a list of different image ids, found {images!r}")
        unknown = [image for image in images if image not in self._image_rows]
        if unknown:
            raise VlscaleError(f"{where}: refers to image {unknown[0]!r}, which the images store does not have")
        refs = [int(self._image_rows[image]) for image in images]
        first = refs[0] if refs else float("inf")
        if first < self._last:
            last = "no image" if self._last == float("inf") else f"row {self._last:.0f}"
            raise VlscaleError(
                f"{where}: its first image is row {first:.0f}, after a text of {last}; write texts sorted by the row "
                f"of their first image, texts without images last"
            )
        row = self._append(
            {
                "id": str(id),
                "text": str(text),
                "input_ids": ids.astype("<i4"),
                "images": list(images),
                "extra": _json(where, extra),
            }
        )
        self._last = first
        self._lengths.append(ids.size)
        self._refs.extend(refs)
        self._ptr.append(len(self._refs))
        return row

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
    ) -> None:
        names = None if class_names is None else list(class_names)
        meta = _meta(ClassesMeta, num_classes=num_classes, dtype=dtype, class_names=names)
        super().__init__(root, "classes", meta, class_columns(meta), shard_bytes)
        self.meta = meta

    def write(self, probs: ArrayLike) -> None:
        """Append the probabilities [R, C] of all regions of the next image (any number of rows is taken).

        Raises:
            VlscaleError: a wrong width, or values that are NaN, infinite or outside 0..1.
        """
        where = f"classes row {self.rows_written}"
        probs = _floats(where, "probs", probs, self.meta.dtype)
        _shape(where, "probs", probs, (len(probs) if probs.ndim else 0, self.meta.num_classes))
        if len(probs) and (probs.min() < 0 or probs.max() > 1.001):
            span = f"{probs.min()}..{probs.max()}"
            raise VlscaleError(f"{where}: probs span {span}, expected 0..1; apply the softmax first")
        for row in probs:
            self._append({"probs": row})

    def _check_complete(self) -> None:
        lengths = self.target.parent / "images" / "lengths.npy"
        if lengths.exists():
            regions = int(read_array(lengths, "int32").sum(dtype=np.int64))
            if regions != self.rows_written:
                raise VlscaleError(f"{self.target}: {self.rows_written} rows, but the images have {regions} regions")

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {}


def _meta(model: Any, **values: Any) -> Any:
    try:
        return model(**values)
    except ValidationError as error:
        raise VlscaleError(f"{model.__name__}: {first_problem(error)}") from None


def _floats(where: str, name: str, values: ArrayLike, dtype: str) -> NDArray[Any]:
    """Return ``values`` as little-endian ``dtype``; NaN and infinity, also by overflow, are refused."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values).astype(np.dtype(dtype), casting="same_kind")
    except (TypeError, ValueError) as error:
        raise VlscaleError(f"{where}: {name} are not numbers that fit {dtype} ({error})") from None
    if not np.isfinite(array).all():
        raise VlscaleError(f"{where}: {name} contain NaN or infinity, or exceed {dtype}; mend them, or store float32")
    return array


def _shape(where: str, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise VlscaleError(f"{where}: {name} have shape {list(array.shape)}, expected {list(shape)}")


def _clip_boxes(where: str, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    clipped = np.clip(boxes, 0.0, 1.0)
    bad = (np.abs(boxes - clipped) > BOX_SLACK).any(1) | (clipped[:, 2:] <= clipped[:, :2]).any(1)
    if bad.any():
        region = int(np.argmax(bad))
        raise VlscaleError(
            f"{where}: box {boxes[region].tolist()} of region {region} is not x1 < x2, y1 < y2 inside 0..1; "
            f"divide pixel coordinates by width and height"
        )
    return clipped


def _json(where: str, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    value = dict(extra or {})
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise VlscaleError(f"{where}: extra is not JSON ({error})") from None
    return value
