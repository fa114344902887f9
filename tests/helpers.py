"""Small synthetic data that several tests need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlscale.data.schema import Vocabulary
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter


def make_vocabulary(size: int = 64) -> Vocabulary:
    """A vocabulary of ``size`` tokens whose special ones come first, as the demo's do."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return Vocabulary.from_tokens(special + [f"w{index}" for index in range(len(special), size)])


def make_dataset(
    root: Path | str,
    images: int = 12,
    texts_per_image: int = 3,
    seed: int = 0,
    feature_dim: int = 8,
    num_classes: int = 7,
    vocab_size: int = 64,
    shard_bytes: int = 1 << 11,
    *,
    feature_dtype: str = "float16",
    min_tokens: int = 3,
    max_tokens: int = 14,
    min_regions: int = 2,
    max_regions: int = 9,
    classes: bool = True,
    texts_without_image: int = 0,
    codec: str = "none",
    compression: str | None = None,
) -> Path:
    """Write a random dataset whose images are shared by texts, with ragged lengths and several shards.

    Every fifth text refers to a second image, too. ``num_classes`` counts the background (class 0).

    Returns:
        ``root`` as a path.
    """
    root = Path(root)
    rng = np.random.default_rng(seed)
    vocabulary = make_vocabulary(vocab_size)
    counts = rng.integers(min_regions, max_regions + 1, images)
    options: dict[str, Any] = {"shard_bytes": shard_bytes, "compression": compression}
    with ImageWriter(root, feature_dim, feature_dtype, codec=codec, **options) as image_writer:
        for row, count in enumerate(counts):
            corner = rng.uniform(0, 0.6, (count, 2))
            boxes = np.concatenate([corner, corner + rng.uniform(0.05, 0.4, (count, 2))], 1)
            features = rng.standard_normal((count, feature_dim))
            image_writer.write(f"image-{row}", 640, 480, features, boxes, rng.uniform(0.2, 1, count), {"row": row})
    with TextWriter(root, vocabulary, image_writer.rows, **options) as text_writer:
        total = images * texts_per_image + texts_without_image
        for row in range(total):
            own = row // texts_per_image
            ids = rng.integers(5, vocab_size, rng.integers(min_tokens, max_tokens + 1))
            refs = [f"image-{own}"] if row < images * texts_per_image else []
            if refs and row % 5 == 4 and images > 1:
                refs.append(f"image-{(own + 1) % images}")
            text_writer.write(f"text-{row}", " ".join(vocabulary.tokens[i] for i in ids), ids, refs, {"row": row})
    if classes:
        with ClassWriter(root, num_classes, **options) as class_writer:
            for count in counts:
                class_writer.write(rng.dirichlet(np.ones(num_classes), count))
    return root
