"""``vlscale plan --probe``: what is tried and measured here, shown, and written where it is asked for."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from vlscale.config import Recipe
from vlscale.errors import VlscaleError
from vlscale.plan.calibrate import Calibrator
from vlscale.plan.calibration import Calibration, Probed, check_target_folder, write_calibration
from vlscale.plan.free_memory import free_bytes
from vlscale.plan.gpus import HERE, TABLE, Gpu, load_gpu
from vlscale.plan.ladder import Found
from vlscale.plan.memory import GIB, Zero
from vlscale.plan.predict import Assumptions, Job, predict
from vlscale.plan.probe import STAGE_3, Allowance, Probe, Throughput, with_budget
from vlscale.plan.workload import Planner, Source, read_source
from vlscale.plan.writing import check_overrides, check_target, write_budget
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


@dataclass(frozen=True)
class Setting:
    """What is probed, and where.

    Attributes:
        recipe: as read; source: its lengths and model; zero: the DeepSpeed JSON; gpus: that share states and steps.
        device: of this machine; limit: bytes that may be taken.
        gpu_name: a GPU whose links the communication is predicted for; None: it is left out.
    """

    recipe: Recipe
    source: Source
    zero: Zero
    gpus: int
    device: torch.device
    limit: float
    gpu_name: str | None


def run_probe(args: argparse.Namespace, recipe: Recipe, settings: DeepSpeedSettings, gpus: int) -> int:
    """Probe, show and write; returns 0.

    Raises:
        VlscaleError: a target cannot be written, the machine lacks the precision, or the recipe does not fit.
    """
    if args.write is not None:
        check_target(args.write, args.overwrite)
        check_overrides(args.set)
    if args.calibration is not None:
        check_target_folder(args.calibration, "--calibration")
    device = torch.device(choose_accelerator("auto"))
    check_machine(settings, device.type, compute_capability(device.type))
    name = None if args.gpu == HERE else args.gpu  # the probe is always of this machine
    if name is not None:
        load_gpu(name)
    zero, source = Zero.from_settings(settings), read_source(recipe)
    setting = Setting(recipe, source, zero, gpus, device, _limit(args, device), name)
    found, speed, calibration = _measure(setting, args.calibration is not None)
    outcome = _outcome(setting, found, speed, calibration)
    if outcome.calibration is not None:
        write_calibration(outcome.calibration, args.calibration)
    if args.write is not None:
        write_budget(args.recipe, args.write, found.tokens, args.overwrite)
    if args.json:
        print(json.dumps(outcome.to_json(), indent=2, allow_nan=False))
    else:
        show(outcome, args)
    return 0


def _limit(args: argparse.Namespace, device: torch.device) -> float:
    return args.memory_gib * GIB if args.memory_gib is not None else float(free_bytes(device))


def _measure(setting: Setting, calibrate: bool) -> tuple[Found, Throughput, Calibration | None]:
    recipe, source, zero, device = setting.recipe, setting.source, setting.zero, setting.device
    began = time.monotonic()
    probe = Probe(recipe, source, zero, setting.gpus, device, setting.limit, Allowance())
    found = probe.search()
    speed = probe.measure(found.tokens)
    if not calibrate:
        return found, speed, None
    calibrator = Calibrator(recipe, source, zero, device)
    calibration = calibrator.measure()
    if time.monotonic() - began < _ONCE_MORE_S:
        speed = speed.least(probe.measure(found.tokens))
        calibration = calibrator.measure()
        speed = speed.least(probe.measure(found.tokens))
    return found, speed, calibration


def _outcome(setting: Setting, found: Found, speed: Throughput, calibration: Calibration | None) -> Outcome:
    device = setting.device
    recipe = with_budget(setting.recipe, found.tokens)
    planner, exposed = Planner(recipe, setting.source), None
    if calibration is not None:
        probed = _probed(setting, planner, found, speed, calibration)
        calibration = calibration.model_copy(update={"probed": probed})
    if setting.gpu_name is not None and setting.gpus > 1:
        job = Job(recipe, setting.zero, load_gpu(setting.gpu_name), setting.gpu_name, setting.gpus)
        exposed = predict(job, planner).traffic.exposed_s
    peak = peak_flops(device, setting.zero.precision)
    mfu = None if peak is None else speed.flops / speed.step_s / peak
    words = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    notes = tuple(_notes(setting, found, speed, exposed))
    return Outcome(recipe, setting.gpus, words, found, speed, mfu, calibration, exposed, notes)


def _probed(
    setting: Setting, planner: Planner, found: Found, speed: Throughput, calibration: Calibration
) -> Probed:  # fmt: skip
    """What goes into the calibration about the recipe itself."""
    # Of this job passes and update are read, in which links have no part.
    job = Job(planner.recipe, setting.zero, gpu_here(calibration, found.limit), HERE, setting.gpus)
    made = predict(job, planner, Assumptions(measured=calibration))
    peak = max(peak for _, peak in found.tried if peak is not None)
    return Probed(
        recipe=planner.recipe.name, gpus=setting.gpus, micro_batch_tokens=found.tokens,
        accumulation=speed.accumulation, step_s=speed.step_s, predicted_s=made.compute_s + made.optimizer_s,
        peak_bytes=peak, tokens=found.largest,
    )  # fmt: skip


def _notes(setting: Setting, found: Found, speed: Throughput, exposed: float | None) -> Iterator[str]:
    gpus, parts = setting.gpus, found.withheld.describe()
    yield "reading data, evaluation and checkpoints are not measured"
    if gpus == 1:
        yield "one process: there is no communication; --gpus N --gpu NAME adds a prediction of it"
    elif exposed is None:
        yield f"communication among {gpus} processes is left out; --gpu NAME adds a prediction of it"
    else:
        yield f"communication is predicted, not measured: {exposed:.4f} s per step that nothing hides"
    if parts:
        yield f"left free for what a run holds beside, GiB: {parts}"
    if setting.zero.stage == 3:
        yield STAGE_3
    if setting.recipe.model.init_from is not None:
        yield "weights are random: model.init_from changes no speed"
    if setting.source.assumed:
        yield "lengths are assumed: the recipe's data are not here"
    if found.extrapolated:
        yield f"the budget itself was not run, it would take too long: it follows {found.origin}"
    if speed.scaled:
        yield "shorter micro-batches than the recipe's were timed; its own follow on a line through two lengths"


def gpu_here(calibration: Calibration, limit: float) -> Gpu:
    """Describe the machine of a calibration as a GPU: its peak is the fastest product that was measured there.

    What links it to others is not known: of a job on several such machines passes, update and memory mean something,
    communication does not.
    """
    teraflops = calibration.best_flops / 1e12
    words, unknown = "fastest product that the probe measured", "not known, and not used: one process has none"
    return Gpu(
        memory_gib=limit / GIB, fp16_tflops=teraflops, bf16_tflops=teraflops, fp32_tflops=teraflops,
        memory_gb_s=12.0 * calibration.copy_.sizes[-1] / calibration.copy_.seconds[-1] / 1e9, link_gb_s=1.0,
        gpus_per_node=1, network_gb_s=1.0,
        sources={
            "memory_gib": "free memory, or --memory-gib", "fp16_tflops": words, "bf16_tflops": words,
            "fp32_tflops": words, "memory_gb_s": "additions that the probe measured", "link_gb_s": unknown,
            "gpus_per_node": unknown, "network_gb_s": unknown,
        },
    )  # fmt: skip


def show(outcome: Outcome, args: argparse.Namespace) -> None:
    """Print what was found."""
    console, found, speed = Console(width=120), outcome.found, outcome.speed
    ends = {"memory": "more does not fit", "step": "a whole step fits, so more changes nothing"}[found.bounded]
    if found.kept:
        ends = f"the recipe's own; a whole step fits in {found.largest} already, so more changes nothing"
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
        if args.set:
            lines.append(f"not in it, so give it again: --set {' --set '.join(map(shlex.quote, args.set))}")
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
    if args.gpu != HERE:
        expected = found.machine.model_copy(update={"precision": zero.precision, "attention_dropout": dropout})
        check_machine(found, path, expected)
        check_gpu(found, path, args.gpu)
        return load_gpu(args.gpu), Assumptions(measured=found)
    device = torch.device(choose_accelerator("auto"))
    check_machine(found, path, Machine.here(device, zero.precision, dropout))
    return gpu_here(found, _limit(args, device)), Assumptions(measured=found)


def refuse_without_probe(args: argparse.Namespace) -> None:
    """Refuse options that only the probe knows, and those that a calibration or ``--gpu here`` rules out.

    Raises:
        VlscaleError: the option is named.
    """
    for name, given in (("--write", args.write is not None), ("--overwrite", args.overwrite)):
        if given:
            raise VlscaleError(f"{name} has an effect with --probe only: add --probe, or drop it")
    if args.gpu is None or args.gpus is None:
        raise VlscaleError("--gpu NAME and --gpus N are needed, except with --probe")
    if args.calibration is not None and args.matmul_efficiency is not None:
        raise VlscaleError("--matmul-efficiency is not read beside --calibration, which has measured: drop one of them")
    if args.gpu != HERE:
        return
    if args.calibration is None:
        raise VlscaleError("--gpu here needs --calibration FILE; `vlscale plan --probe --calibration FILE` writes it")
    if args.plot is not None or args.gpus.strip() != "1":
        several = f"--gpus {args.gpus}" if args.plot is None else "--plot"
        raise VlscaleError(
            f"{several}: --gpu here plans one process, nothing is known of what links this machine to others; "
            f"describe that in a file in the form of {TABLE} and give --gpu FILE.yaml beside --calibration"
        )
