"""Second stage: the candidates of each text of one part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.retrieval.gathering import ClassSets
from data_tools.retrieval.hashes import HashRows, hash_of, hash_of_text
from data_tools.retrieval.stores import NOTHING, Found, RetrievedWriter
from data_tools.retrieval.vectors import VectorIndex, normalise
from data_tools.rewriting.building import chunks, open_texts
from data_tools.rewriting.neighbours import TermIndex
from data_tools.rewriting.reading import decode_rows
from data_tools.under_way import counted
from vlscale.data.companion_schema import Collection
from vlscale.data.store import TextStore

MOST_OWN = 4096
"""Rows of a text's own beyond which candidates are looked for no deeper: of a text that stands in a corpus a hundred
thousand times, each copy would otherwise sort a hundred thousand."""

_POOL = 4
"""Texts per candidate whose cosines are computed exactly, where not all texts of each word are looked at."""


@dataclass(frozen=True)
class Search:
    """What is looked for, and how.

    Attributes:
        k: most candidates per text.
        overlap: least overlap of detected classes; 0: classes do not count.
        share: overlap is the share of the pair's classes, not the Jaccard index.
        fill: where too few overlap, take the most similar of the others too.
        pool: most similar images among which overlapping ones are looked for.
        postings: texts that are looked at per word.
        probes: lists of an inverted file that are searched.
        captions: embeddings of the texts, .npy; None: words are compared.
        images, texts: the collections; None for none.
    """

    k: int
    overlap: float
    share: bool
    fill: bool
    pool: int
    postings: int
    probes: int
    captions: Path | None
    images: Collection | None
    texts: Collection | None


def load_vectors(folder: Path, probes: int) -> VectorIndex:
    """Open what :func:`data_tools.retrieval.gathering.write_vectors` wrote."""
    vectors = np.asarray(np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False))
    inverted = folder / "vectors.faiss"
    return VectorIndex(vectors, inverted if inverted.exists() else None, probes)


class RetrievalBuilder:
    """Builds parts of ``retrieved``; see :class:`data_tools.parts.PartBuilder`.

    Args:
        root: the dataset's folder.
        collections: where the first stage has put everything.
        search: what is looked for.
    """

    def __init__(self, root: Path, collections: Path, search: Search) -> None:
        self.root = root
        self.collections = collections
        self.search = search

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "collections": self.collections, "search": self.search}

    @cached_property
    def _texts(self) -> TextStore:
        return open_texts(self.root)

    @cached_property
    def _image_search(self) -> ImageSearch:
        return ImageSearch(self.collections, self.search)

    @cached_property
    def _text_search(self) -> TextSearch:
        return TextSearch(self.collections / "texts", self.search, len(self._texts))

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write the part's ``retrieved`` into ``folder``."""
        told, texts, search = Counter[str](), self._texts, self.search
        rows = counted(range(part["begin"], part["end"]))
        with RetrievedWriter(folder, texts, search.images, search.texts, search.k) as writer:
            for chunk in chunks(part):
                found = decode_rows(texts, chunk, ("id", "text", "images"))
                images = [NOTHING] * len(found)
                if search.images is not None:
                    images = self._image_search.of(self._first_images(chunk), [row["images"] for row in found], told)
                others = [NOTHING] * len(found)
                if search.texts is not None:
                    others = self._text_search.of(chunk, found, told)
                for row, mine, theirs in zip(found, images, others, strict=True):
                    next(rows)
                    writer.write(row["id"], mine, theirs)
        return {"rows": writer.rows_written, "told": {name: count for name, count in told.items() if count}}

    def _first_images(self, rows: Sequence[int]) -> list[int]:
        """Row of each text's first image; -1 if it has none."""
        ptr, refs = self._texts.image_ptr, self._texts.image_refs
        return [int(refs[ptr[row]]) if ptr[row + 1] > ptr[row] else -1 for row in rows]


def count_lengths(what: str, found: Sequence[Found], k: int, told: Counter[str]) -> None:
    """Count candidates, and lists that are shorter than asked for."""
    sizes = [len(each.rows) for each in found]
    told[f"{what}: candidates"] += sum(sizes)
    told[f"{what}: shorter lists than asked for"] += sum(size < k for size in sizes)
    told[f"{what}: empty lists"] += sizes.count(0)


def depths_of(what: str, own: Sequence[NDArray[Any]], wanted: int, told: Counter[str]) -> list[int]:
    """How many of the nearest rows to look at, so that ``wanted`` are left without ``own``; counts where not all are.

    Args:
        what: is looked for.
        own: of each query, the rows that are its own.
        wanted: rows per query.
        told: counts.
    """
    told[f"{what}: lists of texts with more than {MOST_OWN:,} rows of their own"] += sum(
        len(each) > MOST_OWN for each in own
    )
    return [wanted + min(len(each), MOST_OWN) for each in own]


class ImageSearch:
    """Images like those of the pairs: by the mean of region features, among those whose detected classes overlap.

    Args:
        folder: where the first stage has put everything.
        search: what is looked for.
    """

    def __init__(self, folder: Path, search: Search) -> None:
        self._search = search
        self._index = load_vectors(folder / "images", search.probes)
        self._ids = HashRows(folder / "images", "ids")
        self._classes = ClassSets(folder / "images")
        queries = folder / "queries" if (folder / "queries").is_dir() else folder / "images"
        self._queries = np.load(queries / "vectors.npy", mmap_mode="r", allow_pickle=False)
        self._own_classes = ClassSets(queries)

    def of(self, rows: Sequence[int], names: Sequence[Sequence[str]], told: Counter[str]) -> list[Found]:
        """Candidates of each text of a chunk.

        Args:
            rows: of each text's first image; -1 for none.
            names: ids of all its images, which are never candidates.
            told: counts what fell short.
        """
        keys = [(row, tuple(each)) for row, each in zip(rows, names, strict=True)]
        distinct = [key for key in dict.fromkeys(keys) if key[0] >= 0]
        own = [self._ids.of([hash_of(name) for name in names]) for _, names in distinct]
        search = self._search
        pool = search.k if not search.overlap else max(search.pool, search.k)
        queries = np.asarray(self._queries[[row for row, _ in distinct]])
        nearest = self._index.nearest_of(queries, depths_of("images", own, pool, told))
        known: dict[Any, tuple[Found, int]] = {(-1, ()): (NOTHING, 0)}
        for key, mine, (found, cosines) in zip(distinct, own, nearest, strict=True):
            others = np.flatnonzero(~np.isin(found, mine))[:pool]
            known[key] = self._chosen(key[0], found[others], cosines[others])
        chosen = [known[key if key[0] >= 0 else (-1, ())] for key in keys]
        told["images: texts that have no image"] += sum(row < 0 for row in rows)
        told["images: candidates that fill up lists"] += sum(filled for _, filled in chosen)
        count_lengths("images", [found for found, _ in chosen], search.k, told)
        return [found for found, _ in chosen]

    def _chosen(self, row: int, found: NDArray[np.int64], cosines: NDArray[np.float32]) -> tuple[Found, int]:
        """The candidates of one image, and how many of them only fill up its list."""
        search, order, filled = self._search, np.arange(len(found)), 0
        if search.overlap:
            overlap = self._classes.overlap(self._own_classes.of(row), found, search.share)
            enough = overlap >= search.overlap
            order = np.flatnonzero(enough)
            if search.fill:
                filled = max(0, min(search.k, len(found)) - len(order))
                order = np.concatenate([order, np.flatnonzero(~enough)])
        order = order[: search.k]
        return Found(found[order].astype(np.int32), cosines[order].astype(np.float32)), filled


class TextSearch:
    """Texts like the captions, by their words (TF-IDF) or by given embeddings.

    Args:
        folder: where the first stage has put the texts.
        search: what is looked for.
        captions: number of captions.
    """

    def __init__(self, folder: Path, search: Search, captions: int) -> None:
        assert search.texts is not None
        self._search, self._captions = search, captions
        self._texts, self._images = HashRows(folder, "texts"), HashRows(folder, "images")
        self._count = search.texts.rows
        self._terms = self._vectors = None
        if search.captions is None:
            self._terms = TermIndex(folder, self._count, search.postings)
        else:
            self._vectors = load_vectors(folder, search.probes)
            self._embeddings = np.load(search.captions, mmap_mode="r", allow_pickle=False)

    def of(self, rows: Sequence[int], captions: Sequence[Mapping[str, Any]], told: Counter[str]) -> list[Found]:
        """Candidates of each caption of a chunk; never itself, an equal text, or one that shares an image with it."""
        own = [
            np.union1d(
                self._texts.of([hash_of_text(caption["text"])]),
                self._images.of([hash_of(name) for name in caption["images"]]),
            )
            for caption in captions
        ]
        depths = depths_of("texts", own, self._search.k, told)
        if self._terms is None:
            found = self._by_vectors(rows, own, depths)
        else:
            found = self._by_words(rows, captions, own, depths)
        count_lengths("texts", found, self._search.k, told)
        return found

    def _by_words(
        self,
        rows: Sequence[int],
        captions: Sequence[Mapping[str, Any]],
        own: Sequence[NDArray[Any]],
        depths: Sequence[int],
    ) -> list[Found]:
        assert self._terms is not None
        found = []
        for row, caption, mine, depth in zip(rows, captions, own, depths, strict=True):
            text, start = caption["text"], row * self._count // self._captions
            cut = self._terms.is_cut(text)
            nearest = self._terms.nearest(text, depth + (_POOL - 1) * self._search.k * cut, start)
            others = np.asarray([one for one, _ in nearest], np.int32)
            cosines = np.asarray([cosine for _, cosine in nearest])
            if cut:  # these are lower bounds: words were passed over
                cosines = self._terms.cosines(text, others)
                order = np.lexsort((others, -np.round(cosines, 6)))
                others, cosines = others[order], cosines[order]
            found.append(self._without(others, cosines, mine))
        return found

    def _by_vectors(self, rows: Sequence[int], own: Sequence[NDArray[Any]], depths: Sequence[int]) -> list[Found]:
        assert self._vectors is not None
        queries = normalise(np.asarray(self._embeddings[rows[0] : rows[-1] + 1]))
        nearest = self._vectors.nearest_of(queries, depths)
        return [self._without(*each, mine) for each, mine in zip(nearest, own, strict=True)]

    def _without(self, rows: NDArray[Any], cosines: NDArray[Any], own: NDArray[Any]) -> Found:
        kept = np.flatnonzero(~np.isin(rows, own))[: self._search.k]
        return Found(rows[kept].astype(np.int32), cosines[kept].astype(np.float32))
