"""Lengths built by hand, for tests that read no store."""

from __future__ import annotations

import numpy as np

from vlscale.data.lengths import DatasetLengths


def toy_lengths(
    images: int = 40,
    texts_per_image: tuple[int, int] = (1, 5),
    seed: int = 0,
    name: str = "toy",
    tokens: tuple[int, int] = (3, 20),
    regions: tuple[int, int] = (2, 12),
    shard: int = 9,
    second_image: bool = False,
    without_image: int = 0,
) -> DatasetLengths:
    """Random lengths (ranges are inclusive); texts ordered by image, then those without one."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(texts_per_image[0], texts_per_image[1] + 1, images)
    first = np.repeat(np.arange(images), counts)
    refs = [[image] for image in first.tolist()] + [[] for _ in range(without_image)]
    if second_image:
        for row in range(0, len(first), 3):
            refs[row].append((int(first[row]) + 1) % images)
    total = len(refs)
    return DatasetLengths(
        name=name,
        tokens=rng.integers(tokens[0], tokens[1] + 1, total).astype(np.int32),
        image_ptr=np.cumsum([0, *map(len, refs)]).astype(np.int64),
        image_refs=np.array([image for row in refs for image in row], np.int64),
        regions=rng.integers(regions[0], regions[1] + 1, images).astype(np.int32),
        text_shards=np.r_[np.arange(0, total, shard), total].astype(np.int64),
    )
