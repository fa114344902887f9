"""Datasets for unified steps, on disk or as lengths: pairs with everything beside them, texts, and images alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.toy import toy_lengths
from tests.helpers import make_dataset, make_vocabulary
from vlscale.data.beside import Beside
from vlscale.data.companion_base import meta_of
from vlscale.data.companion_schema import (
    RETRIEVED_COLUMNS,
    REWRITE_COLUMNS,
    UNIT_COLUMNS,
    Collection,
    RetrievedMeta,
    RewritesMeta,
    UnitsMeta,
)
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.lengths import DatasetLengths
from vlscale.data.offsets import Offsets
from vlscale.data.store_writer import TextWriter
from vlscale.data.writer_base import StoreWriter, make_meta

_SHARD = 1 << 11


class _Writer(StoreWriter):
    """Any store: rows as they come, and its side files at the end."""

    def __init__(self, root: Path, name: str, meta: Any, columns: dict[str, str]) -> None:
        super().__init__(root, name, meta, columns, _SHARD, None)
        self.side: dict[str, Any] = {}

    def write(self, **row: Any) -> None:
        self._append(row)

    def _side_files(self) -> dict[str, Any]:
        return self.side


def write_units(root: Path, seed: int = 0) -> None:
    """Units of one to three word pieces for every text."""
    texts, rng = open_dataset("x", root).texts, np.random.default_rng(seed)
    counts = []
    meta = make_meta(UnitsMeta, **meta_of(texts), parser="toy")
    with _Writer(root, "units", meta, UNIT_COLUMNS) as writer:
        for row, tokens in enumerate(texts.lengths.tolist()):
            ends = np.unique(np.r_[np.cumsum(rng.integers(1, 4, tokens)), tokens])
            ends = ends[ends <= tokens]
            units = np.stack([np.r_[0, ends[:-1]], ends, np.zeros_like(ends)], 1).astype("<i4")
            writer.write(id=f"text-{row}", units=units, graph={})
            counts.append(len(units))
        writer.side["lengths.npy"] = np.array(counts, "<i4")


def write_rewrites(root: Path, seed: int = 0, most: int = 6, tokens: tuple[int, int] = (3, 17)) -> None:
    """Up to ``most`` views per text, with ids drawn at random."""
    texts, rng = open_dataset("x", root).texts, np.random.default_rng(seed + 1)
    vocabulary = texts.meta.vocabulary
    meta = make_meta(RewritesMeta, **meta_of(texts), vocabulary_size=vocabulary.size, seed=0)
    counts, sizes, positive = [], [], []
    with _Writer(root, "rewrites", meta, REWRITE_COLUMNS) as writer:
        for row in range(len(texts)):
            lengths = rng.integers(tokens[0], tokens[1] + 1, rng.integers(0, most + 1)).tolist()
            good = (rng.random(len(lengths)) < 0.4).tolist()
            ids = rng.integers(5, vocabulary.size, sum(lengths)) if lengths else np.array([-1])
            views = [[f"view {n}", one, "object", "a", "b", n] for n, one in zip(lengths, good, strict=True)]
            writer.write(id=f"text-{row}", input_ids=ids.astype("<i4"), views=views)
            counts.append(len(lengths))
            sizes += lengths
            positive += good
        writer.side = {
            "lengths.npy": np.array(counts, "<i4"),
            "view_tokens.npy": np.array(sizes, "<i4"),
            "view_positive.npy": np.array(positive, "u1"),
        }


def write_retrieved(root: Path, images: Path, texts: Path, k: int = 4, seed: int = 0, original: bool = False) -> None:
    """Up to k images and texts of other datasets; ``original``: or of this one, each list holding the original."""
    dataset, rng = open_dataset("x", root), np.random.default_rng(seed + 2)
    stores = {"image": open_dataset("i", images).images, "text": open_dataset("t", texts).texts}
    known = {kind: Collection(digest=store.reader.index.digest, rows=len(store)) for kind, store in stores.items()}
    meta = make_meta(
        RetrievedMeta, **meta_of(dataset.texts), k=k,
        **{f"{kind}_collection": collection for kind, collection in known.items()},
    )  # fmt: skip
    counts: dict[str, list[int]] = {"image": [], "text": []}
    own = {"image": dataset.lengths.first_image(np.arange(len(dataset))), "text": np.arange(len(dataset))}
    with _Writer(root, "retrieved", meta, RETRIEVED_COLUMNS) as writer:
        for row in range(len(dataset)):
            columns: dict[str, Any] = {"id": f"text-{row}"}
            for kind, store in stores.items():
                found = rng.permutation(len(store))[: rng.integers(0, k + 1)].astype("<i4")
                if original:
                    found = np.array([own[kind][row]], "<i4")
                counts[kind].append(len(found))
                columns[f"{kind}s"] = found if len(found) else np.array([-1], "<i4")
                columns[f"{kind}_scores"] = np.zeros(max(len(found), 1), "<f4")
            writer.write(**columns)
        writer.side = {f"{kind}_counts.npy": np.array(found, "<i4") for kind, found in counts.items()}


def write_texts(root: Path, count: int = 30, seed: int = 0, vocab_size: int = 64) -> Path:
    """A dataset of texts without images."""
    rng, vocabulary = np.random.default_rng(seed), make_vocabulary(vocab_size)
    with TextWriter(root, vocabulary, {}, shard_bytes=_SHARD) as writer:
        for row in range(count):
            ids = rng.integers(5, vocab_size, rng.integers(2, 15))
            writer.write(f"text-{row}", " ".join(vocabulary.tokens[i] for i in ids), ids, [])
    return root


def write_all(root: Path, seed: int = 0) -> dict[str, Path]:
    """``pairs`` with units, rewrites and retrieved, ``texts`` with units, and ``images``; name -> folder."""
    found = {name: root / name for name in ("pairs", "texts", "images")}
    make_dataset(found["pairs"], seed=seed)
    make_dataset(found["images"], images=9, seed=seed + 1, feature_dtype="float32", codec="lossless")
    for file in sorted((found["images"] / "texts").iterdir()):
        file.unlink()
    (found["images"] / "texts").rmdir()
    write_texts(found["texts"], seed=seed + 2)
    for name in ("pairs", "texts"):
        write_units(found[name], seed)
    write_rewrites(found["pairs"], seed)
    write_retrieved(found["pairs"], found["images"], found["texts"], seed=seed)
    return found


def open_all(folders: dict[str, Path]) -> dict[str, Dataset]:
    """Open what :func:`write_all` has written."""
    return {name: open_dataset(name, folder) for name, folder in folders.items()}


@dataclass
class ToyViews:
    """Lengths of rewritten captions that no store holds; see :class:`vlscale.data.beside.ViewTable`."""

    ptr: Offsets
    view_tokens: np.ndarray
    view_positive: np.ndarray

    def digests(self) -> list[str]:
        return ["toy views"]


class ToyCandidates:
    """Lists of candidates that no store holds; see :class:`vlscale.data.beside.CandidateTable`."""

    def __init__(self, lists: dict[str, list[np.ndarray]], collections: dict[str, Collection]) -> None:
        self.lists, self.collections = lists, collections

    def collection(self, kind: str) -> Collection:
        return self.collections[kind]

    def packed(self, kind: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [self.lists[kind][row] for row in rows.tolist()]
        counts = np.array([len(one) for one in found], np.int32)
        return np.concatenate([*found, np.zeros(0)]).astype(np.int32), counts

    def check_original(self, kind: str, row: int, candidates: np.ndarray, own: np.ndarray) -> None:
        raise AssertionError(f"{kind} of {row} hold the original")

    def digests(self) -> list[str]:
        return ["toy candidates"]


def toy_images(images: int = 20, seed: int = 0, name: str = "images") -> DatasetLengths:
    """Lengths of images without texts."""
    regions = np.random.default_rng(seed).integers(1, 13, images).astype(np.int32)
    shards = np.r_[np.arange(0, images, 7), images]
    lengths = DatasetLengths.of_images(name, regions, shards)
    return dataclasses.replace(lengths, beside=Beside(images="a" * 64))


def toy_texts(texts: int = 30, seed: int = 0, name: str = "texts") -> DatasetLengths:
    """Lengths of texts without images."""
    lengths = toy_lengths(images=0, seed=seed, name=name, without_image=texts)
    return dataclasses.replace(lengths, beside=Beside(texts="b" * 64))


def toy_pairs(
    images: DatasetLengths, texts: DatasetLengths, seed: int = 0, name: str = "pairs", own_images: int = 25,
    without_image: int = 0,
) -> DatasetLengths:  # fmt: skip
    """Lengths of pairs with rewritten captions, and with candidates out of ``images`` and ``texts``."""
    lengths = toy_lengths(images=own_images, seed=seed, name=name, without_image=without_image)
    rng, count = np.random.default_rng(seed + 7), len(lengths)
    sizes = rng.integers(0, 7, count).astype(np.int32)
    total = int(sizes.sum())
    views = ToyViews(
        Offsets(sizes), rng.integers(2, 24, total).astype(np.int32), rng.integers(0, 2, total).astype("u1")
    )
    pools = {"images": len(images.regions), "texts": len(texts)}
    lists = {kind: [rng.permutation(rows)[: rng.integers(0, 5)] for _ in range(count)] for kind, rows in pools.items()}
    known = {
        "images": Collection(digest="a" * 64, rows=pools["images"]),
        "texts": Collection(digest="b" * 64, rows=pools["texts"]),
    }
    return dataclasses.replace(lengths, beside=Beside(views, ToyCandidates(lists, known), "c" * 64, "d" * 64))
