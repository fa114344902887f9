"""Reading warm local shards into batches, beside UNITER's path and a plain StreamingDataset; bytes per task mix.

One process each, or 1 and 2 reader processes whose batches are taken as fast as they come. Counted are the features and
boxes of real regions in the stored float16 and float32. Every run reads all micro-batches once before the clock starts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.reading_paths import (
    make_stores,
    plan_micro_batches,
    read_lmdb,
    read_streaming,
    read_vlscale,
)
from vlscale.config import ObjectivesSection
from vlscale.data import slots
from vlscale.data.collate import collate
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.deal import accumulation, deal_hand
from vlscale.data.image_store import ImageStore
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.random import Draws
from vlscale.objectives import build_objectives

IMAGES = 1500
WIDTH, CLASSES = 2048, 1601
CEILING = 5120
RUNS = 5
MIX = {"itm": 6.0, "mlm": 8.0, "mrfr": 4.0, "mrckl": 4.0}
"""UNITER's steps on COCO."""

PAGE = 4096


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    lengths = np.load(Path(__file__).with_name("uniter_lengths.npz"), allow_pickle=False)
    regions, words = lengths["num_bb"][:IMAGES], lengths["txt_len"][:IMAGES]
    with tempfile.TemporaryDirectory() as folder:
        raw, coded = Path(folder, "raw"), Path(folder, "coded")
        make_stores(raw, regions, words, WIDTH)
        has_codec = _make_coded(coded, regions, words)
        _speeds(raw, coded if has_codec else None)
    with tempfile.TemporaryDirectory() as folder:
        make_stores(Path(folder), regions[:300], words[:300], WIDTH, classes=CLASSES)
        _bytes(Path(folder))


def _make_coded(root: Path, regions: Any, words: Any) -> bool:
    try:
        make_stores(root, regions, words, WIDTH, "lossless")
    except TypeError:
        print("no codec in this version")
        return False
    return True


def _speeds(raw: Path, coded: Path | None) -> None:
    steps, micros = plan_micro_batches(raw, CEILING)
    per_pass = _bytes_per_pass(open_dataset("bench", raw), micros)
    paths: dict[str, Callable[[int], Iterator[Any]]] = {
        "vlscale, raw": lambda workers: read_vlscale(raw, steps, workers, CEILING),
        "vlscale, fresh memory": lambda workers: read_vlscale(raw, steps, workers, CEILING),
        "vlscale, no NaN check": lambda workers: read_vlscale(raw, steps, workers, CEILING),
        "StreamingDataset, padded": lambda workers: read_streaming(raw, micros, workers),
        "LMDB + npz, padded": lambda workers: read_lmdb(raw, micros, workers),
    }
    if coded is not None:
        paths["vlscale, lossless codec"] = lambda workers: read_vlscale(coded, steps, workers, CEILING)
    print(
        f"{per_pass / 1e6:.0f} MB in {len(micros)} micro-batches of at most {CEILING} tokens; GB/s, medians of {RUNS}"
    )
    print(f"{'':26} {'1 process':>10} {'1 worker':>10} {'2 workers':>10}")
    found = {(name, workers): [] for name in paths for workers in (0, 1, 2)}
    for _ in range(RUNS):
        for (name, workers), figures in found.items():
            figures.append(_speed(name, partial(paths[name], workers), len(micros), per_pass))
    medians = {key: statistics.median(figures) for key, figures in found.items()}
    for name in paths:
        print(f"{name:26} " + " ".join(f"{medians[name, workers]:10.2f}" for workers in (0, 1, 2)))
    for name in ("StreamingDataset, padded", "LMDB + npz, padded"):
        ratios = [medians["vlscale, raw", workers] / medians[name, workers] for workers in (0, 1, 2)]
        print(f"{'times ' + name:26} " + " ".join(f"{ratio:10.1f}" for ratio in ratios))


def _speed(name: str, open_path: Callable[[], Iterator[Any]], count: int, per_pass: int) -> float:
    """GB/s of whole passes, after a first one."""
    most, check = slots.MAX_BYTES, ImageStore._check_finite
    if "fresh" in name:
        slots.MAX_BYTES = 0
    if "no NaN" in name:
        ImageStore._check_finite = lambda *_: None  # type: ignore[assignment]
    passes = 4 if "vlscale" in name else 1
    try:
        batches = open_path()
        for _ in range(count):
            next(batches)
        begin = time.perf_counter()
        for _ in range(passes * count):
            next(batches)
        seconds = time.perf_counter() - begin
        batches.close()  # type: ignore[attr-defined]
    finally:
        slots.MAX_BYTES, ImageStore._check_finite = most, check  # type: ignore[method-assign]
    return passes * per_pass / seconds / 1e9


def _bytes_per_pass(dataset: Dataset, micros: list[Any]) -> int:
    counts = sum(int(dataset.images.lengths[micro.images].sum()) for micro in micros)
    return counts * (dataset.feature_dim * dataset.images.feature_dtype.itemsize + 16)


@dataclass
class MixBytes:
    """Bytes and 4 KiB pages of the images and classes stores that a mix of tasks reads, and those of whole rows.

    ``features``: features and boxes alone; ``read``: with the probabilities that are read; ``whole``: with those of
    every region.
    """

    regions: int
    features: int
    read: int
    whole: int
    pages_read: int
    pages_whole: int


def bytes_of_mix(root: Path, steps: int, ceiling: int) -> MixBytes:
    """Read ``steps`` steps of UNITER's mix and count."""
    dataset = open_dataset("bench", root)
    assert dataset.classes is not None
    settings = PlanSettings(seed=1, global_batch_tokens=ceiling, micro_batch_tokens=ceiling)
    plan = Plan([(dataset.lengths, MIX)], settings)
    objectives = build_objectives(ObjectivesSection(), MIX, dataset.vocabulary)
    words, draws = dataset.vocabulary, Draws(1, "bench")
    found = MixBytes(0, 0, 0, 0, 0, 0)
    position = plan.start()
    for _ in range(steps):
        step, position = plan.step(position)
        for micro in deal_hand(step, 0, 1, accumulation(plan, 1), ceiling):
            batch = objectives[step.task].prepare(collate(dataset, micro, 100, words.cls, words.sep), draws)
            every = batch.region_rows.numpy()
            rows = every[batch.targets["region_positions"].numpy()] if step.task == "mrckl" else every[:0]
            dataset.classes.probs(rows)
            images = _pages(dataset, "images", micro.images)
            found.regions += len(every)
            found.pages_read += images + _pages(dataset, "classes", rows)
            found.pages_whole += images + _pages(dataset, "classes", every)
    found.features = dataset.images.bytes_read
    found.read = found.features + dataset.classes.bytes_read
    found.whole = found.features + found.regions * dataset.classes.dtype.itemsize * dataset.classes.meta.num_classes
    return found


def _pages(dataset: Dataset, store: str, rows: Any) -> int:
    """Different 4 KiB pages that rows of a store lie in."""
    total = 0
    for shard, _, local in getattr(dataset, store).reader.by_shard(np.unique(rows[rows >= 0])):
        first, last = shard.offsets[local] // PAGE, (shard.offsets[local + 1] - 1) // PAGE
        total += len(np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])))
    return total


def _bytes(root: Path) -> None:
    found = bytes_of_mix(root, 60, CEILING)
    print(
        f"\nUNITER's mix ({', '.join(f'{task} {share:.0f}' for task, share in MIX.items())}), widths {WIDTH}/{CLASSES}"
    )
    print(f"{'':26} {'kB/region':>10} {'pages/region':>13}")
    for name, size, pages in (
        ("probabilities if masked", found.read, found.pages_read),
        ("probabilities always", found.whole, found.pages_whole),
    ):
        print(f"{name:26} {size / found.regions / 1e3:10.2f} {pages / found.regions:13.2f}")
    print(f"{'share':26} {found.read / found.whole:10.2f} {found.pages_read / found.pages_whole:13.2f}")


if __name__ == "__main__":
    main()
