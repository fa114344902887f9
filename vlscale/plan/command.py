"""``vlscale plan``: does a recipe fit on so many GPUs, how long does it take there, and what is to change."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlscale.errors import VlscaleError

if TYPE_CHECKING:
    from vlscale.plan.predict import Job

MOST_GPUS = 1 << 16
_WIDTH = 120
"""Columns of the output where it goes to a file or a pipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--recipe", type=Path, metavar="FILE", required=True, help="the recipe's YAML")
    parser.add_argument("--ds_config", type=Path, metavar="FILE", required=True, help="the DeepSpeed JSON")
    parser.add_argument(
        "--gpu", metavar="NAME",
        help="v100-16, v100-32, a100-40, a100-80, h100, h200, FILE.yaml of your own (vlscale/plan/gpus.yaml), or here: "
        "this machine, one process on it, as --calibration was measured",
    )  # fmt: skip
    parser.add_argument("--gpus", metavar="N[,N]", help="number of GPUs; several with --sweep (--probe: default 1)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a value of the recipe")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout: bytes, seconds, FLOPs")
    parser.add_argument("--sweep", action="store_true", help="table over ZeRO stage, accumulation, checkpointing, GPUs")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the scaling to 2,048 GPUs")
    parser.add_argument(
        "--matmul-efficiency", type=_share, metavar="X",
        help="share of the peak that matrix products reach, if you have measured it (assumed: 0.6)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE.json",
        help="measured costs instead of assumed efficiencies; with --probe they are measured and written there",
    )  # fmt: skip
    parser.add_argument("--probe", action="store_true", help="find the largest token budget here, and measure it")
    parser.add_argument("--write", type=Path, metavar="FILE.yaml", help="--probe: the recipe with the budget found")
    parser.add_argument("--overwrite", action="store_true", help="--write may replace a file")
    parser.add_argument("--memory-gib", type=_gib, metavar="X", help="memory to plan with here (default: what is free)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 1 if what was asked for does not fit, otherwise 0.

    Raises:
        VlscaleError: an argument is wrong, a file does not fit, or the steps cannot be dealt to so many GPUs.
    """
    if args.probe:
        return _probe(args)
    from vlscale.plan.probe_command import calibrated, refuse_without_probe

    refuse_without_probe(args)
    numbers = _numbers(args.gpus)
    if len(numbers) > 1 and not args.sweep:
        raise VlscaleError(f"--gpus {args.gpus}: several numbers need --sweep")
    from vlscale.plan.gpus import HERE, load_gpu

    gpu = None if args.gpu == HERE else load_gpu(args.gpu)
    if args.plot is not None:
        from vlscale.plan.picture import check_plot

        check_plot(args.plot)
    from vlscale.config import load_recipe
    from vlscale.plan.memory import Zero
    from vlscale.plan.predict import Assumptions, Job
    from vlscale.train.ds_config import read_ds_config

    recipe = load_recipe(args.recipe, tuple(args.set))
    zero = Zero.from_settings(read_ds_config(args.ds_config))
    assumptions = Assumptions()
    if args.matmul_efficiency is not None:
        assumptions = replace(assumptions, matmul_efficiency=args.matmul_efficiency)
    if args.calibration is not None:
        gpu, assumptions = calibrated(args, recipe, zero, args.calibration)
    assert gpu is not None
    return _answer(args, Job(recipe, zero, gpu, args.gpu, numbers[0]), numbers, assumptions)


def _probe(args: argparse.Namespace) -> int:
    for name in ("sweep", "plot", "matmul_efficiency"):
        if getattr(args, name):
            raise VlscaleError(f"--{name.replace('_', '-')} has no effect with --probe: drop one of them")
    numbers = _numbers(args.gpus or "1")
    if len(numbers) > 1:
        raise VlscaleError(f"--gpus {args.gpus}: --probe takes one number")
    from vlscale.config import load_recipe
    from vlscale.plan.probe_command import run_probe
    from vlscale.train.ds_config import read_ds_config

    return run_probe(args, load_recipe(args.recipe, tuple(args.set)), read_ds_config(args.ds_config), numbers[0])


def _answer(args: argparse.Namespace, job: Job, numbers: list[int], assumptions: Any) -> int:
    from rich.console import Console

    from vlscale.plan.assumed import assumed_text
    from vlscale.plan.predict import predict
    from vlscale.plan.sweep import SCALES, scaling, sweep
    from vlscale.plan.workload import Planner, read_source

    source = read_source(job.recipe)
    planner = Planner(job.recipe, source)
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    found: dict[str, Any]
    if args.sweep:
        points = sweep(job, source, numbers, assumptions)
        lines = assumptions.describe(assumed_text(job.recipe) if source.assumed else "", max(numbers) > 1)
        found = {"sweep": [point.to_json() for point in points], "assumptions": lines}
        fits = any(point.prediction is not None and point.prediction.memory.fits for point in points)
    else:
        made = predict(job, planner, assumptions)
        found, fits = made.to_json(), made.memory.fits
    if args.plot is not None:
        from vlscale.plan.picture import draw_scaling

        drawn = scaling(job, planner, SCALES, assumptions)
        found["plot"] = str(draw_scaling(drawn, args.plot))
        found["scaling"] = [point.to_json() for point in drawn]
    if args.json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return 0 if fits else 1
    from vlscale.plan.text import show, show_assumptions, show_sweep

    if args.sweep:
        show_sweep(points, console)
        show_assumptions(lines, console)
    else:
        show(made, console)
    if args.plot is not None:
        console.print(f"drawn: {args.plot}", highlight=False, markup=False)
    return 0 if fits else 1


def _numbers(text: str) -> list[int]:
    found = []
    for part in text.split(","):
        part = part.strip()
        if not (part.isascii() and part.isdecimal()) or len(part) > 9 or not 1 <= int(part) <= MOST_GPUS:
            raise VlscaleError(f"--gpus {text}: expected a whole number from 1 to {MOST_GPUS}, or several with commas")
        found.append(int(part))
    return found


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1 << 20:
        raise argparse.ArgumentTypeError(f"expected a number of GiB above 0, found {text!r}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 1, found {text!r}")
    return value
