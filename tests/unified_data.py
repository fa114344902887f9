"""Random images, texts and pairs with units, rewritten captions and retrieved candidates, for unified steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.rewriting.stores import RewriteWriter, UnitWriter
from tests.helpers import make_dataset, make_vocabulary
from vlscale.data.companion_base import meta_of
from vlscale.data.companion_schema import RETRIEVED_COLUMNS, Collection, RetrievedMeta, Rewrite
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.schema import Vocabulary
from vlscale.data.store_writer import TextWriter
from vlscale.data.writer_base import StoreWriter, make_meta


class _Nothing:
    """Stands for the graph of a text, which training does not read."""

    def to_json(self) -> dict[str, Any]:
        return {}


def write_unified(root: Path, pairs: int = 30, images: int = 12, texts: int = 14) -> None:
    """Write ``root/pairs`` (with everything beside it), ``root/images`` and ``root/texts``; all share a vocabulary."""
    make_dataset(root / "images", images=images, texts_per_image=1, seed=2)
    shutil.rmtree(root / "images" / "texts")
    write_texts(root / "texts", texts)
    make_dataset(root / "pairs", images=pairs, texts_per_image=2, seed=1)
    for name in ("pairs", "texts"):
        write_units(root / name, open_dataset(name, root / name))
    write_rewrites(root / "pairs", open_dataset("pairs", root / "pairs"))
    opened = [open_dataset(name, root / name) for name in ("pairs", "images", "texts")]
    write_retrieved(root / "pairs", *opened)


def write_texts(root: Path, texts: int) -> None:
    """Texts without images, and no store of images."""
    rng, vocabulary = np.random.default_rng(3), make_vocabulary(64)
    with TextWriter(root, vocabulary, {}, shard_bytes=1 << 10) as writer:
        for row in range(texts):
            ids = rng.integers(5, vocabulary.size, rng.integers(3, 15))
            writer.write(f"text-{row}", " ".join(vocabulary.tokens[one] for one in ids), ids, [])


def vocabulary_of(dataset: Dataset) -> Vocabulary:
    """The vocabulary of a dataset that has texts."""
    assert dataset.vocabulary is not None
    return dataset.vocabulary


def write_units(root: Path, dataset: Dataset) -> None:
    """Units of one to four word pieces."""
    rng = np.random.default_rng(4)
    with UnitWriter(root, dataset.texts, "random") as writer:
        for row in range(len(dataset)):
            ends, tokens = [0], int(dataset.lengths.tokens[row])
            while ends[-1] < tokens:
                ends.append(min(ends[-1] + int(rng.integers(1, 5)), tokens))
            kinds = rng.integers(0, 4, len(ends) - 1)
            units = np.stack([ends[:-1], ends[1:], kinds], 1).astype(np.int32)
            writer.write(dataset.texts.row(row)["id"], units, _Nothing())  # type: ignore[arg-type]


def write_rewrites(root: Path, dataset: Dataset) -> None:
    """Up to two captions that say the same, and up to four that do not; some texts have none."""
    rng = np.random.default_rng(5)
    words = vocabulary_of(dataset)
    with RewriteWriter(root, dataset.texts, 0) as writer:
        for row in range(len(dataset)):
            views: list[tuple[Rewrite, list[int]]] = []
            for number in range(0 if row % 7 == 3 else int(rng.integers(1, 7))):
                ids = rng.integers(5, words.size, rng.integers(2, 13)).tolist()
                positive = number < 2 and bool(rng.integers(0, 2))
                text = " ".join(words.tokens[one] for one in ids)
                views.append((Rewrite(text, positive, "sentence" if positive else "object", "a", "b"), ids))
            writer.write(dataset.texts.row(row)["id"], views)


class _RetrievedWriter(StoreWriter):
    """Writes ``ROOT/retrieved``."""

    def __init__(self, root: Path, meta: RetrievedMeta) -> None:
        super().__init__(root, "retrieved", meta, RETRIEVED_COLUMNS, 1 << 11, None)
        self._counts: list[tuple[int, int]] = []

    def write(self, name: str, images: NDArray[np.int32], texts: NDArray[np.int32]) -> None:
        def scores(found: NDArray[np.int32]) -> NDArray[np.float32]:
            return np.linspace(1, 0, max(len(found), 1), dtype=np.float32)

        def stored(found: NDArray[np.int32]) -> NDArray[np.int32]:
            return found if len(found) else np.array([-1], np.int32)

        row = {"images": stored(images), "image_scores": scores(images)}
        row |= {"texts": stored(texts), "text_scores": scores(texts)}
        self._append({"id": name, **row})
        self._counts.append((len(images), len(texts)))

    def _side_files(self) -> dict[str, NDArray[Any]]:
        counts = np.asarray(self._counts, "<i4")
        return {"image_counts.npy": counts[:, 0].copy(), "text_counts.npy": counts[:, 1].copy()}


def write_retrieved(root: Path, pairs: Dataset, images: Dataset, texts: Dataset) -> None:
    """Up to four images of ``images`` and up to four texts of ``texts`` for each caption."""
    rng = np.random.default_rng(6)

    def collection(store: Any) -> Collection:
        return Collection(digest=store.reader.index.digest, rows=len(store))

    meta = make_meta(
        RetrievedMeta,
        **meta_of(pairs.texts),
        image_collection=collection(images.images),
        text_collection=collection(texts.texts),
        k=4,
    )
    with _RetrievedWriter(root, meta) as writer:
        for row in range(len(pairs)):
            found = [rng.permutation(len(store))[: rng.integers(0, 5)] for store in (images.images, texts.texts)]
            writer.write(pairs.texts.row(row)["id"], *(each.astype(np.int32) for each in found))
