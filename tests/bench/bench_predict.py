"""`vlscale plan` beside measurements on this CPU: peak memory, FLOPs, and step times after one probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.plan.loads import make_batch, measure, objective, small
from vlscale.config import Recipe, load_recipe
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.plan.activations import activation_bytes
from vlscale.plan.calibrate import Calibrator
from vlscale.plan.memory import GIB, Zero
from vlscale.plan.predict import Assumptions, Job, predict
from vlscale.plan.probe import Allowance, Probe
from vlscale.plan.probe_command import gpu_here
from vlscale.plan.workload import Planner, read_source
from vlscale.train.metrics import model_flops

ROOT = Path(__file__).parents[2]
TURNS, STEPS_PER_TURN = 3, 3
TASKS = ("mlm", "mrfr", "mrc", "mrckl", "itm")
SIZES: dict[str, tuple[UniterConfig, int]] = {
    "3 layers of 128": (small(), 16),
    "3 layers of 192": (small(hidden_size=192, num_attention_heads=6, intermediate_size=768), 12),
    "6 layers, 30,000 words": (small(num_hidden_layers=6, vocab_size=30000, norm="pre"), 4),
}
WIDER = ("model.config.hidden_size=256", "model.config.intermediate_size=1024")
STEPS: dict[str, tuple[str, ...]] = {
    "as probed": (),
    "ceiling 900: accumulation 2": ("batch.micro_batch_tokens=900",),
    "activation checkpointing": ("activation_checkpointing=full",),
    "2 layers of 256": (*WIDER, "model.config.num_hidden_layers=2"),
    "4 layers of 256, checkpointed": (
        *WIDER, "model.config.num_hidden_layers=4", "activation_checkpointing=full",
    ),
    "2 layers of 512": (
        "model.config.hidden_size=512", "model.config.num_attention_heads=8", "model.config.intermediate_size=2048",
        "model.config.num_hidden_layers=2",
    ),
    "mrfr and mrc only": ("data.datasets.0.mix={mrfr: 1, mrc: 1}",),
    "itm only": ("data.datasets.0.mix={itm: 1}",),
}  # fmt: skip


def row(kind: str, what: str, predicted: float, measured: float) -> dict[str, Any]:
    """Print a line and return it for the file."""
    off = predicted / measured - 1
    print(f"{kind:>6}  {what:<42} {predicted:14.5g} {measured:14.5g} {off:+8.1%}", flush=True)
    return {"kind": kind, "what": what, "predicted": predicted, "measured": measured, "error": off}


def memory_rows() -> list[dict[str, Any]]:
    """Peak bytes of a micro-step beyond weights and gradients."""
    rows = []
    for name, (config, examples) in SIZES.items():
        for task in TASKS:
            measured = measure(task, config, examples)
            found = activation_bytes(config, measured.load, "fp32", cpu=True)
            rows.append(row("bytes", f"{name}: {task}", found.peak, measured.peak))
    return rows


def flops_rows() -> list[dict[str, Any]]:
    """FLOPs of forward and backward, against PyTorch's counter."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    # Attention with dropout runs as matrix products on a CPU, which the counter knows.
    config = small(**sizes, attention_backend="packed", attention_dropout=0.1)
    rows = []
    for task in TASKS:
        batch, model = make_batch(task, config, 8), UniterForPretraining(config)
        with FlopCounterMode(display=False) as counter:
            terms = objective(task).terms(model, batch)
            sum((term.sum * term.weight for term in terms.values()), torch.zeros(())).backward()
        rows.append(row("FLOPs", f"4 layers of 256: {task}", model_flops(config, batch), counter.get_total_flops()))
    return rows


def step_rows() -> list[dict[str, Any]]:
    """Seconds of an optimiser step in one process; operations and steps are measured in turns, the least counts."""
    device, zero = torch.device("cpu"), Zero(1, "fp32", 4, 4)
    recipes = {name: demo(*overrides) for name, overrides in STEPS.items()}
    sources = {name: read_source(recipe) for name, recipe in recipes.items()}
    calibrator = Calibrator(recipes["as probed"], sources["as probed"], zero, device)
    limit = 8.0 * GIB
    probes = {
        name: Probe(recipe, sources[name], zero, 1, device, limit, Allowance(60, 60))
        for name, recipe in recipes.items()
    }
    measured = dict.fromkeys(recipes, float("inf"))
    for _ in range(TURNS):
        calibration = calibrator.measure()
        for _ in range(STEPS_PER_TURN):
            for name, probe in probes.items():
                took = probe.measure(recipes[name].batch.micro_batch_tokens).step_s
                measured[name] = min(measured[name], took)
    rows, assumptions = [], Assumptions(measured=calibration)
    for name, recipe in recipes.items():
        job = Job(recipe, zero, gpu_here(calibration, limit), "here", 1)
        made = predict(job, Planner(recipe, sources[name]), assumptions)
        rows.append(row("s/step", name, made.step_s, measured[name]))
    return rows


def demo(*overrides: str) -> Recipe:
    """The demo's recipe on the lengths of the tests' small version of it."""
    root = f"data.datasets.0.root={ROOT / 'tests/fixtures/demo/train'}"
    return load_recipe(ROOT / "launch/recipes/demo.yaml", (root, *overrides))


def main() -> list[dict[str, Any]]:
    """Print predicted beside measured."""
    torch.set_num_threads(1)
    print(f"{'':>6}  {'':<42} {'predicted':>14} {'measured':>14} {'error':>8}")
    rows = memory_rows() + flops_rows() + step_rows()
    for kind, bound in (("bytes", 0.10), ("FLOPs", 0.01), ("s/step", 0.15)):
        worst = max(abs(one["error"]) for one in rows if one["kind"] == kind)
        print(f"{kind}: worst {worst:.1%}, asked for {bound:.0%}")
    return rows
