"""Planning and dealing token-budget steps, beside UNITER's token-bucket sampler on the same lengths."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

import numpy as np

from vlscale.data.deal import accumulation, deal, straggler
from vlscale.data.lengths import DatasetLengths
from vlscale.data.plan import Plan, PlanSettings

BUDGET = 10_240
WORLD_SIZE = 8
RUNS = 5


def load_lengths() -> DatasetLengths:
    """100,000 synthetic lengths after those of COCO and Visual Genome; one text per image."""
    stored = np.load(Path(__file__).with_name("uniter_lengths.npz"), allow_pickle=False)
    count = len(stored["txt_len"])
    return DatasetLengths(
        name="bench",
        tokens=stored["txt_len"].astype(np.int32),
        image_ptr=np.arange(count + 1),
        image_refs=np.arange(count),
        regions=stored["num_bb"].astype(np.int32),
        text_shards=np.append(np.arange(0, count, 2000), count),
    )


def ours(lengths: DatasetLengths) -> tuple[float, float, float, float]:
    """Return lengths/s, fill, padded share and straggler factor of one pass in steps of 8 x 4 micro-batches."""
    # The ceiling leaves room for the longest example, so that every step is sure to fit.
    settings = PlanSettings(seed=42, global_batch_tokens=WORLD_SIZE * 4 * BUDGET, micro_batch_tokens=BUDGET + 200)
    begin = time.perf_counter()
    plan = Plan([(lengths, {"mlm": 1.0})], settings)
    gas = accumulation(plan, WORLD_SIZE)
    position, done, fills, stragglers = plan.start(), 0, [], []
    while done < len(lengths):
        step, position = plan.step(position)
        dealt = deal(step, WORLD_SIZE, gas, settings.micro_batch_tokens)
        done += len(step)
        fills.append(step.tokens / (WORLD_SIZE * gas * settings.micro_batch_tokens))
        stragglers.append(straggler(dealt))
    seconds = time.perf_counter() - begin
    return done / seconds, statistics.mean(fills), 0.0, max(stragglers)


def reference(lengths: DatasetLengths) -> tuple[float, float, float, float]:
    """The same figures of UNITER's sampler: buckets of 8192, groups of 8, a running maximum that is never reset."""
    joint = (lengths.tokens + lengths.regions).tolist()
    begin = time.perf_counter()
    random.seed(42)
    order = list(range(len(joint)))
    random.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 8192):
        bucket = sorted(order[start : start + 8192], key=joint.__getitem__, reverse=True)
        longest, batch = 0, []
        for group in (bucket[i : i + 8] for i in range(0, len(bucket), 8)):
            longest = max(longest, *(joint[i] for i in group))
            if longest * (len(batch) + 8) > BUDGET:
                batches.append(batch)
                batch = []
            batch = batch + group
    random.shuffle(batches)
    seconds = time.perf_counter() - begin
    real = [sum(joint[i] for i in batch) for batch in batches]
    padded = [len(batch) * max(joint[i] for i in batch) for batch in batches]
    windows = [real[i : i + WORLD_SIZE] for i in range(0, len(real) - WORLD_SIZE, WORLD_SIZE)]
    worst = statistics.mean(max(window) / statistics.mean(window) for window in windows)
    return len(joint) / seconds, sum(padded) / (len(batches) * BUDGET), 1 - sum(real) / sum(padded), worst


def main() -> None:
    """Print the table."""
    lengths = load_lengths()
    runs = [(ours(lengths), reference(lengths)) for _ in range(RUNS)]
    print(f"{'':22} {'lengths/s':>12} {'fill':>7} {'padding':>8} {'straggler':>10}")
    for name, side in (("vlscale, packed", 0), ("UNITER's sampler", 1)):
        speed, fill, padding, slowest = (statistics.median(run[side][i] for run in runs) for i in range(4))
        print(f"{name:22} {speed:12,.0f} {fill:7.1%} {padding:8.2%} {slowest:10.3f}")
    print("straggler: most tokens of a rank / mean over ranks in a step; UNITER's: mean over steps of 1 micro-batch")


if __name__ == "__main__":
    main()
