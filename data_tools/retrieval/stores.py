"""Writer of ``ROOT/retrieved``; the reader is :class:`vlscale.data.companions.RetrievedStore`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.companion_base import meta_of
from vlscale.data.companion_schema import RETRIEVED_COLUMNS, Collection, RetrievedMeta
from vlscale.data.store import TextStore
from vlscale.data.writer_base import StoreWriter, make_meta

SHARD_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class Found:
    """Candidates of a text: int32 [k] rows, best first, and float32 [k] similarities."""

    rows: NDArray[np.int32]
    scores: NDArray[np.float32]


NOTHING = Found(np.empty(0, np.int32), np.empty(0, np.float32))


class RetrievedWriter(StoreWriter):
    """Writes ``ROOT/retrieved``.

    Args:
        root: the dataset's folder.
        beside: the texts that candidates are for, all of them.
        images, texts: what candidates are rows of; None where none are retrieved.
        k: most candidates per text.
    """

    def __init__(
        self, root: Path, beside: TextStore, images: Collection | None, texts: Collection | None, k: int
    ) -> None:
        meta = make_meta(RetrievedMeta, **meta_of(beside), image_collection=images, text_collection=texts, k=k)
        super().__init__(root, "retrieved", meta, RETRIEVED_COLUMNS, SHARD_BYTES, None)
        self._images: list[int] = []
        self._texts: list[int] = []

    def write(self, name: str, images: Found, texts: Found) -> None:
        """Append the candidates of a text; an empty list is stored as one -1, because arrays have values."""
        self._append(
            {
                "id": name,
                "images": _some(images.rows, -1, "<i4"),
                "image_scores": _some(images.scores, 0, "<f4"),
                "texts": _some(texts.rows, -1, "<i4"),
                "text_scores": _some(texts.scores, 0, "<f4"),
            }
        )
        self._images.append(len(images.rows))
        self._texts.append(len(texts.rows))

    def _side_files(self) -> dict[str, NDArray[Any]]:
        return {"image_counts.npy": np.asarray(self._images, "<i4"), "text_counts.npy": np.asarray(self._texts, "<i4")}


def _some(values: NDArray[Any], instead: int, dtype: str) -> NDArray[Any]:
    return np.ascontiguousarray(values, dtype) if len(values) else np.full(1, instead, dtype)
