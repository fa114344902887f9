"""First stage: what is searched, gathered side by side and put together.

Of images the mean region feature, the detected classes and the id; of texts the hashes of their words, the text's and
those of its images' ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.parts import Work
from data_tools.retrieval.detected import Detected, Detections
from data_tools.retrieval.hashes import hash_of, hash_of_text, write_rows
from data_tools.retrieval.vectors import IndexKind, build_index, is_exact, normalise
from data_tools.rewriting.building import chunks, open_texts
from data_tools.rewriting.neighbours import hashes_of, merge_terms
from data_tools.rewriting.reading import decode_rows
from vlscale.data.index import read_array
from vlscale.data.store import ImageStore
from vlscale.data.store_base import within

MOST_REGIONS = 1 << 30
_IMAGES = 128


@dataclass(frozen=True)
class Gathering:
    """What is gathered.

    Attributes:
        images: the image collection; None for none.
        queries: the pairs' images, where they are not the collection itself; None otherwise.
        texts: root of the text collection; None for none.
        terms: also index the words of the texts.
    """

    images: Detections | None
    queries: Detections | None
    texts: Path | None
    terms: bool


class CollectionBuilder:
    """Builds parts of the collections; see :class:`data_tools.parts.PartBuilder`.

    Args:
        gathering: what is gathered.
    """

    def __init__(self, gathering: Gathering) -> None:
        self.gathering = gathering

    def __getstate__(self) -> dict[str, Any]:
        return {"gathering": self.gathering}

    @cached_property
    def _detected(self) -> dict[str, Detected]:
        wanted = {"images": self.gathering.images, "queries": self.gathering.queries}
        return {name: where.open() for name, where in wanted.items() if where is not None}

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the arrays of a part into ``folder``."""
        told = self._texts(part, folder) if part["of"] == "texts" else self._images(part, folder)
        return {"rows": part["end"] - part["begin"], "told": told}

    def _images(self, part: Mapping[str, Any], folder: Path) -> dict[str, int]:
        detected = self._detected[part["of"]]
        vectors, ids, classes, counts = [], [], [], []
        for begin in range(part["begin"], part["end"], _IMAGES):
            rows = range(begin, min(begin + _IMAGES, part["end"]))
            vectors.append(mean_features(detected.images, rows))
            ids += [hash_of(row["id"]) for row in decode_rows(detected.images, rows, ("id",))]
            for names in detected.classes(rows):
                classes += sorted(hash_of(name) for name in names)
                counts.append(len(names))
        _save(folder, vectors=np.concatenate(vectors), ids=np.asarray(ids, np.uint64))
        _save(folder, classes=np.asarray(classes, np.uint64), class_counts=np.asarray(counts, np.int32))
        what = "images of the collection" if part["of"] == "images" else "images of the pairs"
        return {
            f"{what} without detected classes": counts.count(0),
            f"{what} whose mean feature is zero": int((np.concatenate(vectors) == 0).all(1).sum()),
        }

    def _texts(self, part: Mapping[str, Any], folder: Path) -> dict[str, int]:
        assert self.gathering.texts is not None
        texts = open_texts(self.gathering.texts)
        hashes, images, image_counts, terms, per_row = [], [], [], [], []
        for chunk in chunks(part):
            for row in decode_rows(texts, chunk, ("text", "images")):
                hashes.append(hash_of_text(row["text"]))
                images += [hash_of(name) for name in row["images"]]
                image_counts.append(len(row["images"]))
                if self.gathering.terms:
                    terms.append(hashes_of(row["text"]))
                    per_row.append(len(terms[-1]))
        _save(folder, texts=np.asarray(hashes, np.uint64), images=np.asarray(images, np.uint64))
        _save(folder, image_counts=np.asarray(image_counts, np.int32))
        if self.gathering.terms:
            _save(folder, terms=np.concatenate(terms), per_row=np.asarray(per_row, np.int32))
            return {"texts of the collection without words": per_row.count(0)}
        return {}


def mean_features(images: ImageStore, rows: Sequence[int]) -> NDArray[np.float32]:
    """Mean of all region features of each image, at length 1; float32 [B, D]."""
    features, _, counts, _ = images.regions(np.asarray(rows, np.int64), MOST_REGIONS)
    firsts = np.cumsum(counts, dtype=np.int64) - counts
    return normalise(np.add.reduceat(features.astype(np.float32), firsts) / counts[:, None])


def _save(folder: Path, **arrays: NDArray[Any]) -> None:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def collection_parts(gathering: Gathering, size: int) -> list[dict[str, Any]]:
    """Row ranges of everything that is gathered.

    Raises:
        VlscaleError: a store is missing or damaged.
    """
    counts = {
        name: len(where.open().images)
        for name, where in (("images", gathering.images), ("queries", gathering.queries))
        if where is not None
    }
    if gathering.texts is not None:
        counts["texts"] = len(open_texts(gathering.texts))
    return [
        {"of": of, "begin": begin, "end": min(begin + size, rows)}
        for of, rows in counts.items()
        for begin in range(0, rows, size)
    ]


def put_together(
    work: Work, parts: Sequence[Mapping[str, Any]], index: IndexKind, embeddings: NDArray[Any] | None, folder: Path
) -> None:
    """Make one set of arrays of all parts, and the inverted files of large collections.

    Args:
        work: where the parts are.
        parts: see :func:`collection_parts`.
        index: which kind for vectors.
        embeddings: of the texts, [n, E]; None where words are compared.
        folder: empty.
    """
    for of in ("images", "queries"):
        mine = [work.part(number) for number, part in enumerate(parts) if part["of"] == of]
        if mine:
            (folder / of).mkdir()
            _join_images(mine, folder / of, index if of == "images" else "flat")
    mine = [work.part(number) for number, part in enumerate(parts) if part["of"] == "texts"]
    if mine:
        (folder / "texts").mkdir()
        _join_texts(mine, folder / "texts")
        if embeddings is not None:
            write_vectors(folder / "texts", _normalised(embeddings), embeddings.shape, index)


def _join_images(parts: Sequence[Path], folder: Path, index: IndexKind) -> None:
    vectors = [np.load(part / "vectors.npy", mmap_mode="r", allow_pickle=False) for part in parts]
    write_vectors(folder, iter(vectors), (sum(map(len, vectors)), vectors[0].shape[1]), index)
    ids = _concatenated(parts, "ids")
    write_rows(folder, "ids", ids, np.arange(len(ids)))
    _save(folder, classes=_concatenated(parts, "classes"), class_counts=_concatenated(parts, "class_counts"))


def _join_texts(parts: Sequence[Path], folder: Path) -> None:
    hashes, counts = _concatenated(parts, "texts"), _concatenated(parts, "image_counts")
    write_rows(folder, "texts", hashes, np.arange(len(hashes)))
    write_rows(folder, "images", _concatenated(parts, "images"), np.repeat(np.arange(len(counts)), counts))
    if (parts[0] / "terms.npy").exists():
        merge_terms(parts, folder)


def _concatenated(parts: Sequence[Path], name: str) -> NDArray[Any]:
    return np.concatenate([np.load(part / f"{name}.npy", allow_pickle=False) for part in parts])


def _normalised(embeddings: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
    for begin in range(0, len(embeddings), 1 << 14):
        yield normalise(embeddings[begin : begin + (1 << 14)])


def write_vectors(
    folder: Path, blocks: Iterator[NDArray[np.float32]], shape: tuple[int, ...], index: IndexKind
) -> None:
    """Write ``vectors.npy`` float32 of ``shape`` from blocks of rows and, if it is large, ``vectors.faiss``."""
    target = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.dtype("<f4"), shape)
    place = 0
    for block in blocks:
        target[place : place + len(block)] = block
        place += len(block)
    target.flush()
    if not is_exact(index, shape[0]):
        build_index(target, folder / "vectors.faiss")


class ClassSets:
    """The detected classes of images, packed.

    Args:
        folder: where :func:`put_together` wrote.

    Raises:
        VlscaleError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._counts = np.asarray(read_array(folder / "class_counts.npy", "int32"))
        self._ptr = np.concatenate([[0], np.cumsum(self._counts, dtype=np.int64)])
        self._classes = np.asarray(read_array(folder / "classes.npy", "uint64", int(self._ptr[-1])))

    def of(self, row: int) -> NDArray[np.uint64]:
        """Hashes of the classes of one image, sorted."""
        return self._classes[self._ptr[row] : self._ptr[row + 1]]

    def overlap(self, own: NDArray[np.uint64], rows: NDArray[np.int64], share: bool) -> NDArray[np.float64]:
        """How far the classes of images agree with ``own``, float64 [B] in 0..1; 0 where one of both has none.

        Args:
            own: from :meth:`of` of the query.
            rows: int64 [B].
            share: the share of ``own`` that an image has too; otherwise the Jaccard index (common ones among all).
        """
        counts = self._counts[rows].astype(np.int64)
        packed = self._classes[np.repeat(self._ptr[rows], counts) + within(counts)]
        of = np.repeat(np.arange(len(rows)), counts)
        common = np.bincount(of, np.isin(packed, own), len(rows))
        every = len(own) if share else len(own) + counts - common
        return np.asarray(common / np.maximum(every, 1))
