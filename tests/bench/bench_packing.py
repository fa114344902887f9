"""Encoding a packed batch, beside the same examples padded to the longest (forward and backward, CPU)."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from tests.bench.bench_plan import load_lengths
from vlscale.models.uniter import UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative

ROWS = 48
RUNS = 7
CONFIG = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "feature_dim": 256,
    "num_classes": 16,
}


def make_batch(text: np.ndarray, regions: np.ndarray) -> RaggedBatch:
    """A random batch of examples with the given lengths."""
    tokens, boxes, rows = int(text.sum()), int(regions.sum()), len(text)
    return RaggedBatch(
        task="mlm",
        dataset="bench",
        input_ids=torch.randint(5, 1000, (tokens,)),
        cu_text=cumulative(torch.from_numpy(text)),
        features=torch.randn(boxes, 256),
        boxes=torch.tensor([0.1, 0.1, 0.6, 0.6]).repeat(boxes, 1),
        cu_regions=cumulative(torch.from_numpy(regions)),
        passes=torch.zeros(rows, dtype=torch.long),
        examples=torch.arange(rows),
        images=torch.arange(rows),
        group=torch.arange(rows, dtype=torch.int32),
        region_rows=torch.arange(boxes),
    )


def seconds(model: UniterForPretraining, batch: RaggedBatch) -> float:
    """Time of one forward and backward."""
    begin = time.perf_counter()
    model.encode(batch).hidden.square().mean().backward()
    return time.perf_counter() - begin


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    lengths = load_lengths()
    text, regions = lengths.tokens[:ROWS].astype(np.int64) + 2, lengths.regions[:ROWS].astype(np.int64)
    padded_regions = (text + regions).max() - text
    model = UniterForPretraining(CONFIG)
    ways = {"packed": make_batch(text, regions), "padded to the longest": make_batch(text, padded_regions)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, batch in ways.items():
            times[name].append(seconds(model, batch))
    rival = statistics.median(times["padded to the longest"])
    for name, batch in ways.items():
        print(f"{name:22} {batch.tokens:6d} positions   {rival / statistics.median(times[name]):5.2f}x")


if __name__ == "__main__":
    main()
