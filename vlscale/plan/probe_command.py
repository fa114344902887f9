"""``vlscale plan --probe``: what is tried and measured here, shown, and written where it is asked for."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from vlscale.config import Recipe
from vlscale.errors import VlscaleError
from vlscale.plan.calibrate import Calibrator
from vlscale.plan.calibration import Calibration, Probed, check_target_folder, write_calibration
from vlscale.plan.gpus import Gpu, load_gpu
from vlscale.plan.memory import GIB, Zero
from vlscale.plan.predict import Assumptions, Job, predict
from vlscale.plan.probe import Allowance, Found, Probe, Throughput, stage_note, with_budget
from vlscale.plan.trial import free_bytes
from vlscale.plan.workload import Planner, Source, read_source
from vlscale.plan.writing import check_target, write_budget
from vlscale.train.ds_config import DeepSpeedSettings, check_machine
from vlscale.train.environment import choose_accelerator, compute_capability
from vlscale.train.metrics import peak_flops

_ONCE_MORE_S = 50.0
"""Operations are measured a second time if all that went before took no longer."""


@dataclass(frozen=True)
class Outcome:
    """What a probe has found.

    Attributes:
        recipe: with the budget found; gpus: that a step is shared among; device: in words.
        found, speed: the budget and the throughput; mfu: None where the peak is unknown.
        calibration: None if none was asked for; exposed_s: communication per step, predicted; None if not asked for.
        notes: what was left out, one line each.
    """

    recipe: Recipe
    gpus: int
    device: str
    found: Found
    speed: Throughput
    mfu: float | None
    calibration: Calibration | None
    exposed_s: float | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types; seconds and bytes."""
        probed = None if self.calibration is None or self.calibration.probed is None else self.calibration.probed
        return {
            "recipe": self.recipe.name,
            "gpus": self.gpus,
            "device": self.device,
            "budget": asdict(self.found),
            "measured": self.speed.to_json() | {"mfu": self.mfu},
            "predicted_step_s": None if probed is None else probed.predicted_s,
            "exposed_s": self.exposed_s,
            "notes": list(self.notes),
        }


def run_probe(args: argparse.Namespace, recipe: Recipe, settings: DeepSpeedSettings, gpus: int) -> int:
    """Probe, show and write; returns 0.

    Raises:
        VlscaleError: a target cannot be written, the machine lacks the precision, or the recipe does not fit.
    """
    if args.write is not None:
        check_target(args.write, args.overwrite)
    if args.calibration is not None:
        check_target_folder(args.calibration, "--calibration")
    device = torch.device(choose_accelerator("auto"))
    check_machine(settings, device.type, compute_capability(device.type))
    zero = Zero.from_settings(settings)
    limit = args.memory_gib * GIB if args.memory_gib is not None else float(free_bytes(device))
    source = read_source(recipe)
    gpu = None if args.gpu is None else load_gpu(args.gpu)
    began, calibration = time.monotonic(), None
    probe = Probe(recipe, source, zero, gpus, device, limit, Allowance())
    found = probe.search()
    speed = probe.measure(found.tokens)
    if args.calibration is not None:
        calibrator = Calibrator(recipe, source, zero, device)
        calibration = calibrator.measure()
        if time.monotonic() - began < _ONCE_MORE_S:
            speed = speed.least(probe.measure(found.tokens))
            calibration = calibrator.measure()
            speed = speed.least(probe.measure(found.tokens))
    outcome = _outcome(recipe, source, zero, (gpus, gpu, args.gpu), device, found, speed, calibration)
    if outcome.calibration is not None:
        write_calibration(outcome.calibration, args.calibration)
    if args.write is not None:
        write_budget(args.recipe, args.write, found.tokens, args.overwrite)
    if args.json:
        print(json.dumps(outcome.to_json(), indent=2, allow_nan=False))
    else:
        show(outcome, args)
    return 0


def _outcome(
    recipe: Recipe, source: Source, zero: Zero, gpu: tuple[int, Gpu | None, str | None], device: torch.device,
    found: Found, speed: Throughput, calibration: Calibration | None,
) -> Outcome:  # fmt: skip
    gpus, kind, name = gpu
    recipe = with_budget(recipe, found.tokens)
    planner = Planner(recipe, source)
    if calibration is not None:
        here = kind or gpu_here(calibration, found.limit)
        made = predict(Job(recipe, zero, here, "here", gpus), planner, Assumptions(measured=calibration))
        predicted = made.compute_s + made.optimizer_s
        tokens, peak = max((tokens, peak) for tokens, peak in found.tried if peak is not None)
        probed = Probed(
            recipe=recipe.name, gpus=gpus, micro_batch_tokens=found.tokens, accumulation=speed.accumulation,
            step_s=speed.step_s, predicted_s=predicted, peak_bytes=peak, tokens=tokens,
        )  # fmt: skip
        calibration = calibration.model_copy(update={"probed": probed})
    exposed, notes = None, ["reading data, evaluation and checkpoints are not measured"]
    if gpus == 1:
        notes.append("one process: there is no communication; --gpus N --gpu NAME adds a prediction of it")
    elif kind is None:
        notes.append(f"communication among {gpus} processes is left out; --gpu NAME adds a prediction of it")
    else:
        exposed = predict(Job(recipe, zero, kind, str(name), gpus), planner).traffic.exposed_s
        notes.append(f"communication is predicted, not measured: {exposed:.4f} s per step that nothing hides")
    notes += filter(None, [stage_note(zero)])
    if recipe.model.init_from is not None:
        notes.append("weights are random: model.init_from changes no speed")
    if source.assumed:
        notes.append("lengths are assumed: the recipe's data are not here")
    if found.extrapolated:
        notes.append("the budget itself was not run, it would take too long: it follows from the peaks of smaller ones")
    if speed.scaled:
        notes.append("shorter micro-batches than the recipe's were timed; its own follow on a line through two lengths")
    peak_rate = peak_flops(device, zero.precision)
    mfu = None if peak_rate is None else speed.flops / speed.step_s / peak_rate
    words = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Outcome(recipe, gpus, words, found, speed, mfu, calibration, exposed, tuple(notes))


def gpu_here(calibration: Calibration, limit: float) -> Gpu:
    """Describe the machine of a calibration as a GPU: its peak is the fastest product that was measured there."""
    teraflops = calibration.best_flops / 1e12
    words = "fastest product that the probe measured"
    return Gpu(
        memory_gib=limit / GIB, fp16_tflops=teraflops, bf16_tflops=teraflops, fp32_tflops=teraflops,
        memory_gb_s=12.0 * calibration.copy_.sizes[-1] / calibration.copy_.seconds[-1] / 1e9, link_gb_s=10.0,
        gpus_per_node=8, network_gb_s=10.0,
        sources={
            "memory_gib": "free memory, or --memory-gib", "fp16_tflops": words, "bf16_tflops": words,
            "fp32_tflops": words, "memory_gb_s": "additions that the probe measured", "link_gb_s": "assumed",
            "gpus_per_node": "assumed", "network_gb_s": "assumed",
        },
    )  # fmt: skip


def show(outcome: Outcome, args: argparse.Namespace) -> None:
    """Print what was found."""
    console, found, speed = Console(width=120), outcome.found, outcome.speed
    ends = {"memory": "more does not fit", "step": "a whole step fits, so more changes nothing"}[found.bounded]
    tried = ", ".join(f"{tokens} {'-' if p is None else f'{p / GIB:.3f} GiB'}" for tokens, p in found.tried)
    mfu = "unknown, the peak of this device is" if outcome.mfu is None else f"{outcome.mfu:.1%}"
    lines = [
        f"{outcome.recipe.name} on {outcome.device}, as one of {outcome.gpus}",
        f"batch.micro_batch_tokens {found.tokens}: {ends} ({found.limit / GIB:.2f} GiB at hand; predicted beforehand: "
        f"{found.predicted}; tried: {tried})",
        f"step: {speed.step_s:.4f} s = forward and backward {speed.passes_s:.4f} s ({speed.accumulation} micro-steps) "
        f"+ optimiser {speed.update_s:.4f} s; least of several runs, {speed.clock}",
        f"tokens per second: {speed.tokens_per_s:,.0f}; MFU: {mfu}",
        *(f"not in it: {note}" for note in outcome.notes[:1]),
        *(f"note: {note}" for note in outcome.notes[1:]),
    ]
    probed = outcome.calibration.probed if outcome.calibration is not None else None
    if probed is not None:
        off = probed.predicted_s / probed.step_s - 1
        lines.append(f"predicted from the measured operations: {probed.predicted_s:.4f} s ({off:+.1%})")
        lines.append(f"calibration written: {args.calibration}; give it to plan --gpu here --calibration FILE")
    if args.write is not None:
        lines.append(f"recipe written: {args.write}")
    for line in lines:
        console.print(Text(line))


def calibrated(args: argparse.Namespace, recipe: Recipe, zero: Zero, path: Path) -> tuple[Gpu, Assumptions]:
    """Return the GPU and the assumptions of a plan that uses a calibration.

    Raises:
        VlscaleError: the calibration is damaged, or of another device, precision or kind of attention.
    """
    from vlscale.plan.calibration import Machine, check_gpu, check_machine, read_calibration

    found = read_calibration(path)
    dropout = read_source(recipe).config.attention_dropout > 0
    if args.gpu != "here":
        expected = found.machine.model_copy(update={"precision": zero.precision, "attention_dropout": dropout})
        check_machine(found, path, expected)
        check_gpu(found, path, args.gpu)
        return load_gpu(args.gpu), Assumptions(measured=found)
    device = torch.device(choose_accelerator("auto"))
    check_machine(found, path, Machine.here(device, zero.precision, dropout))
    limit = args.memory_gib * GIB if args.memory_gib is not None else float(free_bytes(device))
    return gpu_here(found, limit), replace(Assumptions(), measured=found)


def refuse_without_probe(args: argparse.Namespace) -> None:
    """Refuse options that only the probe knows.

    Raises:
        VlscaleError: the option is named.
    """
    for name, given in (("--write", args.write is not None), ("--overwrite", args.overwrite)):
        if given:
            raise VlscaleError(f"{name} has an effect with --probe only: add --probe, or drop it")
    if args.gpu is None or args.gpus is None:
        raise VlscaleError("--gpu NAME and --gpus N are needed, except with --probe")
    if args.gpu == "here" and args.calibration is None:
        raise VlscaleError("--gpu here needs --calibration FILE; `vlscale plan --probe --calibration FILE` writes it")
