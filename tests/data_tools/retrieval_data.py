"""Scenes with captions for build_retrieval, and what it should find there, by plain NumPy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tests.data_tools.rewriting_captions import CAPTIONS
from tests.helpers import make_vocabulary
from vlscale.data.store import ImageStore, TextStore
from vlscale.data.store_writer import ImageWriter, TextWriter

WIDTH = 6
SCENES = 40
NAMES = ("dog", "cat", "bus", "tree", "man", "boat")


def write(
    root: Path,
    scenes: int = SCENES,
    seed: int = 0,
    prefix: str = "i",
    field: str | None = "objects",
    texts: bool = True,
) -> Path:
    """Scenes of one to four regions with classes in ``extra``, and two captions each; a last one has no image."""
    rng = np.random.default_rng(seed)
    with ImageWriter(root, WIDTH, codec="none") as images:
        for scene in range(scenes):
            count = int(rng.integers(1, 5))
            objects = rng.choice(NAMES, count).tolist()
            images.write(
                f"{prefix}{scene}", 9, 9, rng.standard_normal((count, WIDTH)),
                np.tile([0.1, 0.1, 0.5, 0.5], (count, 1)), np.ones(count), {field: objects} if field else {},
            )  # fmt: skip
    if texts:
        with TextWriter(root, make_vocabulary(), images.rows) as writer:
            for number in range(2 * scenes):
                text = CAPTIONS[(number + seed) % len(CAPTIONS)]
                writer.write(f"t{number}", text, [5, 6], [f"{prefix}{number // 2}"])
            writer.write("alone", "A kite, alone.", [7])
    return root


def features_of(root: Path) -> np.ndarray:
    images = ImageStore(root / "images")
    means = np.stack([images.row(row)["features"].astype(np.float64).mean(0) for row in range(len(images))])
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def objects_of(root: Path) -> list[set[str]]:
    images = ImageStore(root / "images")
    return [set(images.row(row)["extra"].get("objects", ())) for row in range(len(images))]


def captions_of(root: Path) -> list[str]:
    texts = TextStore(root / "texts")
    return [texts.row(row)["text"] for row in range(len(texts))]


def tf_idf(collection: list[str], queries: list[str]) -> np.ndarray:
    """Cosines [queries, collection], written independently."""
    words = [re.findall(r"\w\w+", text.lower()) for text in collection]
    known = sorted({word for several in words for word in several})
    counts = np.asarray([[several.count(word) for word in known] for several in words], np.float64)
    idf = np.log((1 + len(collection)) / (1 + (counts > 0).sum(0))) + 1
    asked = np.asarray([[re.findall(r"\w\w+", text.lower()).count(word) for word in known] for text in queries]) * idf
    weights = counts * idf
    norms = [np.linalg.norm(each, axis=1, keepdims=True) for each in (asked, weights)]
    return (asked / np.maximum(norms[0], 1e-12)) @ (weights / np.maximum(norms[1], 1e-12)).T
