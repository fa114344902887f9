"""Nearest vectors by inner product, through faiss: exact, or an inverted file where that would take too long.

Both are shared by processes through memory maps. faiss runs on one thread: what it finds then depends on the vectors
alone, and parts are searched side by side anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlscale.errors import VlscaleError

IndexKind = Literal["auto", "flat", "ivf"]
EXACT_UP_TO = 100_000
"""Vectors that are searched exactly by default."""

LISTS_PER_ROOT = 4
_TRAINING_PER_LIST = 40
_ADDED = 1 << 16
_QUERIES = 64
_PROJECTED = 256


def load_faiss() -> Any:
    """Import faiss, on one thread.

    Raises:
        VlscaleError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise VlscaleError("faiss is missing; pip install 'vlscale[rewrite]'") from None
    faiss.omp_set_num_threads(1)
    return faiss


def normalise(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of [n, D] at length 1, float32; zeros stay zeros."""
    long = vectors.astype(np.float64)
    norms = np.linalg.norm(long, axis=1, keepdims=True)
    return np.asarray(long / np.where(norms > 0, norms, 1), np.float32)


def is_exact(kind: IndexKind, rows: int) -> bool:
    """Whether an index over ``rows`` vectors is exact."""
    return kind == "flat" or (kind == "auto" and rows <= EXACT_UP_TO)


def build_index(vectors: NDArray[np.float32], path: Path, lists: int = 0) -> None:
    """Write an inverted file of float32 [n, D] ``vectors``.

    Vectors are projected to at most 256 dimensions (PCA) and kept in float16: 3 million take 1.5 GB on disk. Training
    takes 40 vectors per list, spread evenly: some 3.5 GB of memory for 3 million of 2048 dimensions.

    Args:
        vectors: of length 1; may be memory-mapped.
        path: to write.
        lists: number of lists; 0 for four times the square root of n.
    """
    faiss = load_faiss()
    count, width = vectors.shape
    lists = min(lists or LISTS_PER_ROOT * int(count**0.5), max(1, count // _TRAINING_PER_LIST))
    projected = f"PCA{_PROJECTED}," if width > _PROJECTED and count > _PROJECTED else ""
    # Of vectors of length 1 the nearest have the largest cosines; distances, unlike products, outlive PCA's centring.
    index = faiss.index_factory(width, f"{projected}IVF{lists},SQfp16", faiss.METRIC_L2)
    training = np.linspace(0, count - 1, min(count, max(_TRAINING_PER_LIST * lists, 2 * _PROJECTED))).astype(np.int64)
    index.train(np.ascontiguousarray(vectors[np.unique(training)]))
    for begin in range(0, count, _ADDED):
        index.add(np.ascontiguousarray(vectors[begin : begin + _ADDED]))
    faiss.write_index(index, str(path))


class VectorIndex:
    """Nearest vectors of a collection.

    Args:
        vectors: float32 [n, D] of length 1, memory-mapped.
        inverted: file that :func:`build_index` wrote; None searches all vectors.
        probes: lists of the inverted file that are searched per query.
    """

    def __init__(self, vectors: NDArray[np.float32], inverted: Path | None, probes: int) -> None:
        self._faiss = load_faiss()
        self._vectors = vectors
        self._index: Any = None
        if inverted is not None:
            self._index = self._faiss.read_index(str(inverted), self._faiss.IO_FLAG_MMAP)
            self._faiss.extract_index_ivf(self._index).nprobe = probes

    def __len__(self) -> int:
        return len(self._vectors)

    def nearest(self, queries: NDArray[np.float32], count: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Rows and cosines of the nearest vectors of each of float32 [q, D] ``queries``, best first, then by row.

        An inverted file only chooses: cosines are those of the vectors themselves.
        """
        found = []
        count = min(count, len(self))
        for begin in range(0, len(queries) if count else 0, _QUERIES):
            block = np.ascontiguousarray(queries[begin : begin + _QUERIES])
            if self._index is None:
                metric = self._faiss.METRIC_INNER_PRODUCT
                cosines, rows = self._faiss.knn(block, self._vectors, count, metric=metric)
            else:
                cosines, rows = self._index.search(block, count)
            for number in range(len(block)):
                found.append(self._ordered(block[number], rows[number], cosines[number]))
        return found or [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]

    def nearest_of(
        self, queries: NDArray[np.float32], counts: Sequence[int]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """:meth:`nearest`, with a count for each query, so that one that needs many does not slow the others down.

        What is found of a query does not depend on the other ones: it is searched as deep as the next power of two.
        """
        depths = np.asarray([1 << max(0, int(count) - 1).bit_length() for count in counts], np.int64)
        found: dict[int, tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
        for depth in np.unique(depths).tolist():
            some = np.flatnonzero(depths == depth)
            for number, (rows, cosines) in zip(some.tolist(), self.nearest(queries[some], depth), strict=True):
                found[number] = rows[: counts[number]], cosines[: counts[number]]
        return [found[number] for number in range(len(queries))]

    def _ordered(
        self, query: NDArray[np.float32], rows: NDArray[np.int64], cosines: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        present = rows >= 0
        rows, cosines = rows[present], cosines[present]
        if self._index is not None:
            cosines = self._vectors[rows] @ query
        order = np.lexsort((rows, -np.round(cosines, 6)))
        return rows[order], cosines[order]
