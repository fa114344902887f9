"""Remotes for tests: a folder that is read through a cache, with every transfer counted in a file."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.helpers import make_vocabulary
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.fetch import Check, Fetcher
from vlscale.data.remote import CachedFiles, CacheSettings
from vlscale.data.store_writer import ImageWriter, TextWriter


@dataclass(frozen=True)
class CountingFetcher(Fetcher):
    """Writes the name of each transfer into a log, from whatever process."""

    log: str = ""

    def _try(self, source: Path | str, target: Path, most: int, check: Check) -> None:
        line = f"{Path(source).parent.name}/{Path(source).name}\n".encode()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line)
        os.close(descriptor)
        super()._try(source, target, most, check)


def counted(log: Path) -> Counter[str]:
    """Transfers per shard (``images/shard.00000.mds``) so far."""
    return Counter(log.read_text().split()) if log.exists() else Counter()


def files_of(dataset: Dataset) -> dict[str, CachedFiles]:
    """The shards of a dataset's stores."""
    stores = {"texts": dataset.texts, "images": dataset.images, "classes": dataset.classes}
    return {name: store.reader.files for name, store in stores.items() if store is not None}  # type: ignore[misc]


def open_counting(root: Path | str, cache: Path, log: Path, limit: int | None = None, **options) -> Dataset:
    """Open a dataset through a cache; transfers of its shards are counted in ``log``."""
    settings = CacheSettings(cache, limit, **options)
    dataset = open_dataset("toy", root, True, settings)
    for files in files_of(dataset).values():
        files.fetcher = CountingFetcher(**dataclasses.asdict(files.fetcher), log=str(log))
    return dataset


def write_large(
    root: Path, images: int, image_shard: int, text_shard: int, feature_dim: int = 32, texts: int = 2
) -> Path:
    """A dataset whose text shards need several image shards each, as real ones do."""
    rng = np.random.default_rng(0)
    vocabulary = make_vocabulary()
    box = np.array([[0.1, 0.1, 0.5, 0.5]])
    with ImageWriter(root, feature_dim, shard_bytes=image_shard) as writer:
        for row in range(images):
            count = int(rng.integers(3, 9))
            features = rng.standard_normal((count, feature_dim))
            writer.write(f"i{row}", 9, 9, features, box.repeat(count, 0), np.ones(count), {"row": row})
    with TextWriter(root, vocabulary, writer.rows, shard_bytes=text_shard) as text_writer:
        for row in range(images * texts):
            ids = rng.integers(5, 64, rng.integers(3, 12))
            text_writer.write(f"t{row}", "x", ids, [f"i{row // texts}"], {"row": row})
    return root


def total_bytes(dataset: Dataset) -> int:
    """Bytes of all shards."""
    return sum(shard.bytes for files in files_of(dataset).values() for shard in files.index.shards)
