"""The three levers of UNITER's "limited GPUs" section, each on and off: real tokens per second of training.

Dynamic batching: the plan's micro-batches of a token budget, packed; off: a fixed number of examples in random order,
padded to the longest of them. Both keep under the same ceiling of positions per micro-batch, which for a fixed number
means that so many of the longest examples must fit. Accumulation: one optimiser step per window; off: one per
micro-batch. Mixed precision: bf16, or fp16 on a GPU without bf16; off: fp32.

Every way runs the same model through DeepSpeed at ZeRO stage 2. Tokens are those of real examples (text and regions):
padding is work, but not counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.bench.bench_plan import load_lengths
from tests.helpers import make_vocabulary
from tests.multiprocess.launcher import run_together
from vlscale.config import ObjectivesSection, OptimizerSection
from vlscale.data.deal import accumulation, deal
from vlscale.data.lengths import SPECIALS, DatasetLengths
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.random import Draws
from vlscale.models.uniter import UniterForPretraining
from vlscale.objectives import build_objectives
from vlscale.ragged import RaggedBatch, cumulative
from vlscale.train.ds_config import DeepSpeedSettings, resolve_ds_config
from vlscale.train.engine import Engine, connect
from vlscale.train.environment import choose_accelerator, compute_capability
from vlscale.train.optim import build_optimizer, build_param_groups
from vlscale.train.pretraining import PretrainingModule
from vlscale.train.processes import Processes, run_and_exit

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Tokens ([CLS] and [SEP] included) and regions of the examples of a micro-batch, int64 [B] each."""


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        examples: how many of the longest examples fit under the ceiling; the fixed number per micro-batch.
        window: micro-batches per timed run and process, and per optimiser step with accumulation.
        rounds: timed runs of each way, interleaved, after one that is not counted.
        hidden, layers, vocabulary, width: the model's size and that of its features.
    """

    examples: int = 8
    window: int = 4
    rounds: int = 5
    hidden: int = 384
    layers: int = 4
    vocabulary: int = 4000
    width: int = 512


SMOKE = Setting(examples=2, window=2, rounds=1, hidden=32, layers=1, vocabulary=64, width=8)
ON_GPU = Setting(examples=64, window=4, rounds=9, hidden=768, layers=12, vocabulary=28996, width=2048)


@dataclass(frozen=True)
class Micro:
    """A micro-batch ready to run.

    Attributes:
        batch: masked and on the device.
        real: tokens and regions of its examples, without padding.
        targets: masked word pieces.
    """

    batch: RaggedBatch
    real: int
    targets: float


def ceiling_of(lengths: DatasetLengths, examples: int) -> int:
    """Positions of ``examples`` of the longest example."""
    return examples * int((lengths.tokens + lengths.regions).max() + SPECIALS)


def fixed(lengths: DatasetLengths, setting: Setting, rank: int, world_size: int, count: int) -> list[Lengths]:
    """``count`` micro-batches of a fixed number of examples in random order."""
    order = np.random.default_rng(0).permutation(len(lengths))
    wanted = count * world_size * setting.examples
    rows = order[:wanted].reshape(count, world_size, setting.examples)[:, rank]
    return [(lengths.tokens[row].astype(np.int64) + SPECIALS, lengths.regions[row].astype(np.int64)) for row in rows]


def dynamic(lengths: DatasetLengths, setting: Setting, rank: int, world_size: int, count: int) -> list[Lengths]:
    """``count`` micro-batches as the plan deals them: packed under a token budget."""
    ceiling = ceiling_of(lengths, setting.examples)
    longest = ceiling // setting.examples
    total = world_size * setting.window * (ceiling - longest) + longest
    plan = Plan([(lengths, {"mlm": 1.0})], PlanSettings(0, global_batch_tokens=total, micro_batch_tokens=ceiling))
    gas = accumulation(plan, world_size)
    assert gas == setting.window
    found: list[Lengths] = []
    for step, _ in plan.steps(plan.start()):
        for micro in deal(step, world_size, gas, ceiling)[rank]:
            assert micro.weight == 1.0
            assert micro.tokens <= ceiling
            regions = lengths.regions[micro.images].astype(np.int64)
            found.append((lengths.tokens[micro.texts].astype(np.int64) + SPECIALS, regions))
        if len(found) >= count:
            return found[:count]
    raise AssertionError("unreachable")


def make_batch(text: NDArray[np.int64], regions: NDArray[np.int64], setting: Setting, number: int) -> RaggedBatch:
    """A random batch of examples with the given lengths."""
    generator = torch.Generator().manual_seed(number)
    boxes, rows = int(regions.sum()), len(text)
    ids = torch.randint(5, setting.vocabulary, (int(text.sum()),), generator=generator)
    cu_text = cumulative(torch.from_numpy(text))
    ids[cu_text[:-1].long()], ids[cu_text[1:].long() - 1] = 2, 3
    return RaggedBatch(
        task="mlm",
        dataset="bench",
        input_ids=ids,
        cu_text=cu_text,
        features=torch.randn(boxes, setting.width, generator=generator),
        boxes=torch.tensor([0.1, 0.1, 0.6, 0.6]).repeat(boxes, 1),
        cu_regions=cumulative(torch.from_numpy(regions)),
        passes=torch.zeros(rows, dtype=torch.long),
        examples=torch.arange(rows),
        images=torch.arange(rows),
        group=torch.arange(rows, dtype=torch.int32),
        region_rows=torch.arange(boxes),
    )


def make_micro(lengths: Lengths, padded: bool, setting: Setting, objective: Any, number: int, device: Any) -> Micro:
    """Build a micro-batch; ``padded`` gives every example as many more regions as the longest is longer."""
    text, regions = lengths
    real = int(text.sum() + regions.sum())
    shown = (text + regions).max() - text if padded else regions
    batch = objective.prepare(make_batch(text, shown, setting, number), Draws(0, "bench"))
    (targets,) = objective.counts(batch).values()
    return Micro(batch.to(device), real, targets)


def half_precision(accelerator: str) -> str:
    """``bf16``, or ``fp16`` on a GPU that has no bf16."""
    capability = compute_capability(accelerator)
    return "fp16" if capability is not None and capability < (8, 0) else "bf16"


def make_engine(processes: Processes, setting: Setting, objectives: Any, gas: int, precision: str) -> Engine:
    """An engine around a fresh model with the same weights everywhere."""
    torch.manual_seed(0)
    shape = {"hidden_size": setting.hidden, "num_hidden_layers": setting.layers, "vocab_size": setting.vocabulary}
    heads = {"num_attention_heads": max(1, setting.hidden // 64), "intermediate_size": 4 * setting.hidden}
    model = UniterForPretraining({**shape, **heads, "feature_dim": setting.width, "num_classes": 16})
    raw: dict[str, Any] = {"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}
    if precision != "fp32":
        raw[precision] = {"enabled": True}
    config = resolve_ds_config(DeepSpeedSettings(Path("bench.json"), raw), gas, processes.world_size, None)
    rule = OptimizerSection(lr=1e-4)

    def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(build_param_groups(module, "correct"), rule, fused=processes.device.type == "cuda")

    return Engine(processes, PretrainingModule(model, objectives), make_optimizer, config, ("mlm",))


def timed(engine: Engine, micros: list[Micro]) -> float:
    """Seconds for training on the micro-batches of one window, until the slowest process is done."""
    processes, gas = engine.processes, engine.accumulation
    processes.barrier()
    begin = time.perf_counter()
    for first in range(0, len(micros), gas):
        engine.begin("mlm", 1e-4)
        window = micros[first : first + gas]
        slots = processes.world_size * len(window)
        (targets,) = processes.total([sum(micro.targets for micro in window)])
        for micro in window:
            loss = engine.forward("mlm", micro.batch)["mlm"].sum * (slots / targets)
            engine.backward(loss)
        engine.step()
    if processes.device.type == "cuda":
        torch.cuda.synchronize()
    processes.barrier()
    return time.perf_counter() - begin


def measure(processes: Processes, setting: Setting, half: str) -> dict[str, Any]:
    """Time the eight ways in turn; returns what :func:`main` prints."""
    lengths = load_lengths()
    objectives = build_objectives(ObjectivesSection(), ("mlm",), make_vocabulary(setting.vocabulary))
    engines = {
        (gas, precision): make_engine(processes, setting, objectives, gas, precision)
        for gas in (1, setting.window)
        for precision in ("fp32", half)
    }
    count = setting.window * (setting.rounds + 1)
    micros: dict[bool, list[Micro]] = {}
    for packed, cut in ((False, fixed), (True, dynamic)):
        parts = enumerate(cut(lengths, setting, processes.rank, processes.world_size, count))
        micros[packed] = [
            make_micro(part, not packed, setting, objectives["mlm"], number, processes.device) for number, part in parts
        ]
    ways = list(itertools.product((False, True), repeat=3))
    seconds: dict[tuple[bool, ...], list[float]] = {way: [] for way in ways}
    tokens: dict[bool, list[float]] = {False: [], True: []}
    positions: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(setting.rounds + 1):
        part = slice(turn * setting.window, (turn + 1) * setting.window)
        for packed, found in micros.items():
            real, run = sum(m.real for m in found[part]), sum(m.batch.tokens for m in found[part])
            real_of_all, run_of_all = processes.total([float(real), float(run)])
            tokens[packed].append(real_of_all)
            positions[packed].append(run_of_all)
        for way in ways:
            packed, accumulate, mixed = way
            engine = engines[setting.window if accumulate else 1, half if mixed else "fp32"]
            seconds[way].append(timed(engine, micros[packed][part]))
    rows = [
        {
            "batching": packed,
            "accumulation": accumulate,
            "mixed": mixed,
            "tokens": tokens[packed][1:],
            "positions": positions[packed][1:],
            "seconds": seconds[packed, accumulate, mixed][1:],
        }
        for packed, accumulate, mixed in ways
    ]
    return {"rows": rows, "half": half, "ceiling": ceiling_of(lengths, setting.examples), "machine": machine(processes)}


def machine(processes: Processes) -> str:
    """What this ran on, without the machine's name."""
    if processes.device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        kind = torch.backends.cpu.get_cpu_capability()
        where = f"CPU ({platform.machine()}, {kind}, {cores} cores), {torch.get_num_threads()} thread per process"
    return f"{processes.world_size} processes on {where}, PyTorch {torch.__version__.split('+')[0]}"


def worker(setting: Setting) -> None:
    """Measure in this process, together with the others; the main one prints one line of JSON."""
    accelerator = choose_accelerator("auto")
    processes = connect(accelerator, timeout_s=120)
    found = measure(processes, setting, half_precision(accelerator))
    if processes.main:
        print("FOUND " + json.dumps(found), flush=True)


def run(setting: Setting, processes: int, timeout: float = 400, **variables: str) -> dict[str, Any]:
    """Measure in ``processes`` new processes."""
    content = json.dumps(dataclasses.asdict(setting))
    finished = run_together(Path(__file__), content, processes=processes, timeout=timeout, **variables)
    for done in finished:
        assert done.status == 0, done.tail
    return json.loads(next(line for line in finished[0].out.splitlines() if line.startswith("FOUND "))[6:])


def speed(row: dict[str, Any]) -> float:
    """Median of real tokens per second."""
    return statistics.median(count / time for count, time in zip(row["tokens"], row["seconds"], strict=True))


def main() -> None:
    """Print the table."""
    setting, processes, variables = Setting(), 2, {}
    if torch.cuda.is_available():
        setting, processes, variables = ON_GPU, min(2, torch.cuda.device_count()), {"DS_ACCELERATOR": "cuda"}
    found = run(setting, processes, **variables)
    print(f"{found['machine']}; ZeRO stage 2; {setting.layers} layers, hidden size {setting.hidden}")
    fixed_size = f"fixed: {setting.examples} examples, padded to the longest"
    print(f"at most {found['ceiling']} positions per micro-batch; {fixed_size}")
    names = {
        "batching": ("fixed", "dynamic"),
        "accumulation": ("1", str(setting.window)),
        "mixed": ("fp32", found["half"]),
    }
    print(
        f"{'batching':>9} {'accumulation':>13} {'precision':>10} {'padding':>8} {'real tokens/s':>14} {'relative':>9}"
    )
    off = speed(found["rows"][0])
    for row in found["rows"]:
        batching, gas, precision = (names[name][row[name]] for name in names)
        padding = 1 - sum(row["tokens"]) / sum(row["positions"])
        print(f"{batching:>9} {gas:>13} {precision:>10} {padding:8.1%} {speed(row):14,.0f} {speed(row) / off:8.2f}x")


if __name__ == "__main__":
    run_and_exit(lambda: worker(Setting(**json.loads(sys.argv[1]))))
