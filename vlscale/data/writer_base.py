"""What the writers of the three stores share: a folder that appears when it is complete, and checks of values."""

from __future__ import annotations

import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ValidationError
from typing_extensions import Self

from vlscale.data.index import record_side_files
from vlscale.data.mds import open_writer
from vlscale.data.schema import first_problem
from vlscale.errors import VlscaleError

BOX_SLACK = 1e-5
"""Boxes may leave 0..1 by this much (rounding of pixel coordinates); they are clipped to it."""


class StoreWriter:
    """Common part: a context manager that fills ``ROOT/.NAME.tmp-<pid>`` and renames it to ``ROOT/NAME`` at the end.

    When the block raises, the temporary folder is removed and ``ROOT/NAME`` never exists.
    """

    def __init__(
        self,
        root: Path | str,
        name: str,
        meta: BaseModel,
        columns: Mapping[str, str],
        shard_bytes: int,
        compression: str | None,
    ) -> None:
        self.target = Path(root) / name
        self.folder = self.target.with_name(f".{name}.tmp-{os.getpid()}")
        self.rows_written = 0
        self._meta = meta
        self._columns = columns
        self._shard_bytes = shard_bytes
        self._compression = compression
        self._mds: Any = None

    def __enter__(self) -> Self:
        self._refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.exists():  # left by a killed process that had the same id
                shutil.rmtree(self.folder)
            self._mds = open_writer(self.folder, self._columns, self._shard_bytes, self._compression)
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
        record_side_files(self.folder)
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

    def _append_encoded(self, rows: list[Any]) -> None:
        """Hand over checked rows of a store with one column of fixed size, as their bytes."""
        if self._mds is None:
            raise RuntimeError(f"{type(self).__name__} is a context manager: use it in a with statement")
        self._mds.write_encoded(rows)
        self.rows_written += len(rows)

    def _check_complete(self) -> None:
        """Raise if what was written does not fit together."""

    @abstractmethod
    def _side_files(self) -> dict[str, NDArray[Any]]:
        """Arrays to save beside the shards, by file name."""


def make_meta(model: Any, **values: Any) -> Any:
    """Build a meta.json model.

    Raises:
        VlscaleError: a value is out of range.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise VlscaleError(f"{model.__name__}: {first_problem(error)}") from None


def floats(where: str, name: str, values: ArrayLike, dtype: str) -> NDArray[Any]:
    """Return ``values`` as little-endian ``dtype``; NaN and infinity, also by overflow, are refused."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(values).astype(np.dtype(dtype), casting="same_kind")
    except (TypeError, ValueError) as error:
        raise VlscaleError(f"{where}: {name} are not numbers that fit {dtype} ({error})") from None
    # NumPy looks at float16 one by one; an exponent of ones is NaN or infinity.
    good = array.view(np.uint16) & 0x7C00 != 0x7C00 if array.itemsize == 2 else np.isfinite(array)
    if not good.all():
        raise VlscaleError(f"{where}: {name} contain NaN or infinity, or exceed {dtype}; mend them, or store float32")
    return array


def require_shape(where: str, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise a :class:`VlscaleError` unless ``array`` has ``shape``."""
    if array.shape != shape:
        raise VlscaleError(f"{where}: {name} have shape {list(array.shape)}, expected {list(shape)}")


def clip_boxes(where: str, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return boxes float32 [R, 4] clipped to 0..1, which they may leave by :data:`BOX_SLACK`.

    Raises:
        VlscaleError: a box lies outside or has no area.
    """
    clipped = np.clip(boxes, 0.0, 1.0)
    bad = (np.abs(boxes - clipped) > BOX_SLACK).any(1) | (clipped[:, 2:] <= clipped[:, :2]).any(1)
    if bad.any():
        region = int(np.argmax(bad))
        raise VlscaleError(
            f"{where}: box {boxes[region].tolist()} of region {region} is not x1 < x2, y1 < y2 inside 0..1; "
            f"divide pixel coordinates by width and height"
        )
    return clipped


def plain_json(where: str, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``extra`` as a dict of JSON types.

    Raises:
        VlscaleError: it is anything else.
    """
    value = dict(extra or {})
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise VlscaleError(f"{where}: extra is not JSON ({error})") from None
    return value
