"""Planning and dealing token-budget steps for 1 to 1024 processes, beside UNITER's token-bucket sampler."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlscale.data.dataset import open_dataset
from vlscale.data.deal import Rule, accumulation, deal, deal_hand
from vlscale.data.lengths import SPECIALS, DatasetLengths
from vlscale.data.plan import Plan, PlanSettings, Step
from vlscale.data.reference import token_buckets

BUDGET = 10_240
HIDDEN = 768
WORLDS = (1, 8, 64, 256, 1024)
RUNS = 3
ROOT = Path(__file__).parents[2]


@dataclass
class Figures:
    """One row of the table.

    Attributes:
        speed: lengths per second, planned and dealt, on one core.
        fill: what the micro-batches hold of what they may, in what the ceiling counts.
        padding: share of padded positions that hold nothing (0 where nothing is padded).
        straggler: tokens of the busiest rank over the mean, mean over steps; work: the same in FLOPs.
    """

    speed: float
    fill: float
    padding: float
    straggler: float
    work: float


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


def demo_lengths() -> DatasetLengths:
    """The demo's training texts, or those of the tests' small version of it."""
    built = ROOT / "runs/demo/data/train"
    return open_dataset("demo", built if built.is_dir() else ROOT / "tests/fixtures/demo/train").lengths


def ours(lengths: DatasetLengths, world_size: int, mode: str, budget: int, least: int) -> Figures:
    """Plan and deal at least ``least`` lengths and one step, for steps of world_size x 4 micro-batches.

    Every rank deals for itself; rank 0 is timed here, and all ranks' shares are read off the same layout afterwards.
    """
    # The ceiling leaves room for the longest example, so that every step is sure to fit.
    longest = int((lengths.tokens + lengths.regions[lengths.first_image(np.arange(len(lengths)))]).max()) + SPECIALS
    settings = PlanSettings(
        seed=42, global_batch_tokens=world_size * 4 * budget, micro_batch_tokens=budget + longest, mode=mode
    )
    rule = Rule(mode, HIDDEN)
    began = time.perf_counter()
    plan = Plan([(lengths, {"mlm": 1.0})], settings)
    gas = accumulation(plan, world_size)
    position, steps = plan.start(), list[Step]()
    while sum(map(len, steps)) < least:
        step, position = plan.step(position)
        deal_hand(step, 0, world_size, gas, settings.micro_batch_tokens, rule)
        steps.append(step)
    speed = sum(map(len, steps)) / (time.perf_counter() - began)
    return _figures(speed, steps[-2:], world_size, gas, settings.micro_batch_tokens, rule)


def _figures(speed: float, steps: list[Step], world_size: int, gas: int, ceiling: int, rule: Rule) -> Figures:
    fill, padding, tokens, work = [], [], [], []
    for step in steps:
        hands = deal(step, world_size, gas, ceiling, rule)
        micro_batches = [micro for hand in hands for micro in hand if micro.weight]
        real = sum(micro.tokens for micro in micro_batches)
        padded = sum(micro.padded for micro in micro_batches)
        held = padded if rule.mode == "padded" else real
        fill.append(held / (world_size * gas * ceiling))
        padding.append(1 - real / padded if rule.mode == "padded" else 0.0)
        work_of = np.zeros(int(step.examples.max()) + 1, np.int64)
        work_of[step.examples] = rule.work(step.costs)
        loads = [
            (sum(micro.tokens for micro in hand), sum(int(work_of[micro.examples].sum()) for micro in hand))
            for hand in hands
        ]
        for found, place in ((tokens, 0), (work, 1)):
            values = np.array([load[place] for load in loads], np.float64)
            found.append(values.max() / values.mean())
    return Figures(speed, *(statistics.mean(values) for values in (fill, padding, tokens, work)))


def reference(lengths: DatasetLengths, world_size: int, budget: int) -> Figures:
    """UNITER's own way: every rank samples from its share of the texts, one batch per rank and micro-step."""
    joint = lengths.tokens + lengths.regions[lengths.first_image(np.arange(len(lengths)))]
    began = time.perf_counter()
    hands: list[list[np.ndarray]] = []
    for rank in range(world_size):
        mine = joint[rank::world_size]
        found = token_buckets(mine, budget, random.Random(42 + rank))
        hands.append([mine[part] for part in np.split(found.rows, found.ends[:-1]) if len(part)])
    speed = len(joint) / (time.perf_counter() - began)
    batches = [batch for hand in hands for batch in hand]
    if not batches:  # fewer texts per rank than fit one batch: all are dropped
        return Figures(speed, 0.0, 0.0, float("nan"), float("nan"))
    padded = sum(len(batch) * int(batch.max()) for batch in batches)
    real = np.array([[batch.sum() for batch in hand[: min(map(len, hands))]] for hand in hands], np.float64)
    work = Rule("packed", HIDDEN)
    loads = np.array([[work.work(batch).sum() for batch in hand[: min(map(len, hands))]] for hand in hands], np.float64)
    straggler = [float((one.max(0) / one.mean(0)).mean()) if one.size else float("nan") for one in (real, loads)]
    total = sum(int(batch.sum()) for batch in batches)
    return Figures(speed, padded / (len(batches) * budget), 1 - total / padded, *straggler)


def main() -> None:
    """Print the tables."""
    for title, lengths, budget in (("UNITER-like", load_lengths(), BUDGET), ("demo", demo_lengths(), 2048)):
        print(f"\n{title}: {len(lengths):,} texts, {budget} tokens per micro-batch")
        print(
            f"{'ranks':>6} {'mode':20} {'lengths/s':>12} {'fill':>7} {'padding':>8} {'straggler':>10} {'in FLOPs':>9}"
        )
        for world_size in WORLDS:
            rows: dict[str, list[Figures]] = {}
            for _ in range(RUNS):
                for mode in ("packed", "padded"):
                    rows.setdefault(mode, []).append(ours(lengths, world_size, mode, budget, len(lengths)))
                rows.setdefault("reference (UNITER's)", []).append(reference(lengths, world_size, budget))
            for mode, found in rows.items():
                if found[0].straggler != found[0].straggler:
                    print(f"{world_size:6d} {mode:20} a pass has fewer batches than ranks")
                    continue
                speed = statistics.median(one.speed for one in found)
                one = found[0]
                print(
                    f"{world_size:6d} {mode:20} {speed:12,.0f} {one.fill:7.1%} {one.padding:8.2%} "
                    f"{one.straggler:10.4f} {one.work:9.4f}",
                    flush=True,
                )
    print("\nfill: of what the ceiling counts (packed: real tokens; else longest x examples)")
    print("straggler: tokens of the busiest rank / mean over ranks, mean over steps; UNITER's: one batch per rank")


if __name__ == "__main__":
    main()
