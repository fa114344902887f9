"""Planning and dealing unified steps (UNIMO) for 1 to 1024 processes, and collating their micro-batches."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.bench_plan import BUDGET, HIDDEN, RUNS, WORLDS, load_lengths
from tests.data.unified_data import write_rewrites
from tests.helpers import make_dataset
from vlscale.data.beside import Beside
from vlscale.data.collate_views import collate_views
from vlscale.data.companion_schema import Collection
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import MicroBatch, Rule, accumulation, deal_hand
from vlscale.data.lengths import DatasetLengths
from vlscale.data.offsets import Offsets
from vlscale.data.packing import Block
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.views import UNIFIED, ViewSettings

VIEWS, CANDIDATES = 100, 100
"""Rewritten captions and retrieved candidates of each pair, as the authors prepared them."""


class _Views:
    """Rewritten captions as long as their captions, three in a hundred positive."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.ptr = Offsets(np.full(len(tokens), VIEWS, np.int32))
        self.view_tokens = np.repeat(tokens, VIEWS)
        self.view_positive = np.tile((np.arange(VIEWS) < 3).astype("u1"), len(tokens))

    def digests(self) -> list[str]:
        """Of nothing on disk."""
        return ["bench"]


class _Candidates:
    """Candidates drawn at random."""

    def __init__(self, rows: dict[str, int], digests: dict[str, str]) -> None:
        rng = np.random.default_rng(0)
        self._lists = {
            kind: rng.integers(0, count, (1000, CANDIDATES)).astype(np.int32) for kind, count in rows.items()
        }
        self._known = {kind: Collection(digest=digests[kind], rows=count) for kind, count in rows.items()}

    def collection(self, kind: str) -> Collection:
        """What they are rows of."""
        return self._known[kind]

    def packed(self, kind: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A list per row, the same every 1000 rows."""
        return self._lists[kind][rows % 1000].reshape(-1), np.full(len(rows), CANDIDATES, np.int32)

    def digests(self) -> list[str]:
        """Of nothing on disk."""
        return ["bench"]


def corpora() -> list[tuple[DatasetLengths, dict[str, float]]]:
    """100,000 pairs as UNITER's, as many texts of up to 510 word pieces and images; 5 : 1 : 1."""
    pairs, rng = load_lengths(), np.random.default_rng(0)
    count = len(pairs)
    texts = DatasetLengths(
        "texts", rng.integers(8, 511, count).astype(np.int32), np.zeros(count + 1, np.int64), np.zeros(0, np.int64),
        np.zeros(0, np.int32), np.append(np.arange(0, count, 2000), count),
    )  # fmt: skip
    images = DatasetLengths.of_images("images", pairs.regions, np.append(np.arange(0, count, 2000), count))
    digests = {"images": "a" * 64, "texts": "b" * 64}
    beside = Beside(_Views(pairs.tokens), _Candidates(dict.fromkeys(digests, count), digests))
    return [
        (dataclasses.replace(pairs, beside=beside), {UNIFIED: 5.0}),
        (dataclasses.replace(texts, beside=Beside(texts=digests["texts"])), {UNIFIED: 1.0}),
        (dataclasses.replace(images, beside=Beside(images=digests["images"])), {UNIFIED: 1.0}),
    ]


def measured(world_size: int, least: int = 20_000) -> dict[str, Any]:
    """Plan and deal at least ``least`` rows and two steps, for steps of world_size x 4 micro-batches."""
    settings = PlanSettings(
        seed=42, global_batch_tokens=world_size * 4 * BUDGET, micro_batch_tokens=BUDGET + 4096, max_text_tokens=510,
        views=ViewSettings(),
    )  # fmt: skip
    plan, rule = Plan(corpora(), settings), Rule("packed", HIDDEN)
    gas, position = accumulation(plan, world_size), plan.start()
    plan.step(position)
    rows = units = steps = 0
    began = time.process_time()
    while rows < least or steps < 2:
        step, position = plan.step(position)
        deal_hand(step, 0, world_size, gas, settings.micro_batch_tokens, rule)
        rows, units, steps = rows + len(step), units + int(step.group[-1]) + 1, steps + 1
    seconds = time.process_time() - began
    return {
        "ranks": world_size,
        "rows per second": rows / seconds,
        "units per second": units / seconds,
        "ms per step": 1000 * seconds / steps,
        "rows per step": rows / steps,
    }


def collated(images: int = 150) -> dict[str, float]:
    """Milliseconds per micro-batch: each image decoded once and copied, and decoded for every row that shows it."""
    settings = PlanSettings(
        seed=1, global_batch_tokens=BUDGET, micro_batch_tokens=BUDGET, views=ViewSettings(images=0, texts=0)
    )
    spent: dict[str, list[float]] = {"once": [], "for every row": []}
    with tempfile.TemporaryDirectory() as folder:
        root = make_dataset(
            Path(folder) / "pairs", images, 2, feature_dim=2048, shard_bytes=1 << 26, min_regions=10, max_regions=100,
            codec="lossless", classes=False,
        )  # fmt: skip
        write_rewrites(root)
        dataset = open_dataset("pairs", root)
        plan = Plan([(dataset.lengths, {UNIFIED: 1.0})], settings)
        micros, position = list[MicroBatch](), plan.start()
        for _ in range(6):
            step, position = plan.step(position)
            micros += deal_hand(step, 0, 1, 1, BUDGET)
        block = torch.zeros(256 << 20, dtype=torch.uint8)
        for _ in range(RUNS + 1):  # the first one touches the pages
            for way, found in spent.items():
                began = time.process_time()
                for micro in micros:
                    if way == "once":
                        collate_views({"pairs": dataset}, micro, 100, Block(block))
                    else:
                        store = dataset.images
                        counts = store.counts_of(micro.images, 100)
                        memory, total = Block(block), int(counts.sum())
                        features = memory.empty((total, 2048), torch.float16).numpy()
                        store.write_regions(
                            micro.images, counts, features, memory.empty((total, 4), torch.float32).numpy()
                        )
                found.append((time.process_time() - began) / len(micros) * 1000)
    return {way: statistics.median(found[1:]) for way, found in spent.items()}


def main() -> list[dict[str, Any]]:
    """Print the tables; seconds are those of one core."""
    print(
        f"{VIEWS} rewritten captions and {CANDIDATES} candidates per pair; {BUDGET:,} tokens x 4 per process and step"
    )
    print(f"{'ranks':>6} {'rows/s':>12} {'units/s':>12} {'ms/step':>9} {'rows/step':>11}")
    found = []
    for world_size in WORLDS:
        runs = [measured(world_size) for _ in range(RUNS)]
        row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        found.append(row)
        print(
            f"{world_size:6d} {row['rows per second']:12,.0f} {row['units per second']:12,.0f} "
            f"{row['ms per step']:9.1f} {row['rows per step']:11,.0f}",
            flush=True,
        )
    spent = collated()
    print(f"\nms per micro-batch of {BUDGET:,} tokens, images decoded once: {spent['once']:.1f} (whole batch); "
          f"for every row: {spent['for every row']:.1f} (features alone)")  # fmt: skip
    return [*found, {"collation ms": spent}]


if __name__ == "__main__":
    main()
