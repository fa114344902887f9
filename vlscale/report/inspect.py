"""``vlscale inspect STORE``: what is in a dataset or a store, whether it is whole, and what a plan makes of it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlscale.errors import VlscaleError

if TYPE_CHECKING:
    from vlscale.data.inspection import Stores
    from vlscale.data.lengths import DatasetLengths
    from vlscale.data.plan_figures import PlanFigures

_PLAN_OPTIONS = (
    "budget", "world", "gas", "global_tokens", "mode", "hidden_size", "task", "seed", "max_text_tokens",
    "window_shards", "steps", "mix",
)  # fmt: skip
_VERIFY = ("hashes", "rows")
_ROW_REGIONS = 100
_HIDDEN_SIZE = 768
_WIDTH = 120
"""Columns of the output where it goes to a file or a pipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("store", nargs="?", metavar="STORE", help="dataset (images/, texts/) or one store")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER",
        help="fetch into this folder what is read: STORE is a dataset's URL, or its shards are compressed",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw the lengths (and, with --plan, the micro-batches)"
    )
    parser.add_argument(
        "--verify", nargs="?", const="hashes", metavar="rows",
        help="compare every shard with its hash and the side files with each other; 'rows': decode every row too; "
        "lists all damage; exit status 1 if there is any",
    )  # fmt: skip
    parser.add_argument("--rows", metavar="A[:B]", help="show decoded rows, counted from 0; texts bring their images")
    parser.add_argument("--max-regions", type=_count, metavar="N", help="first n regions of an image (100)")
    plan = parser.add_argument_group("plan", "How the lengths fill optimiser steps; no row is read.")
    plan.add_argument("--plan", action="store_true", help="fill, padding, straggler factor, steps per pass")
    plan.add_argument("--budget", type=_count, metavar="TOKENS", help="batch.micro_batch_tokens of the recipe")
    plan.add_argument("--world", type=_count, metavar="N", help="number of processes (1)")
    plan.add_argument("--gas", type=_count, metavar="N", help="micro-steps; the global batch is what surely fits (1)")
    plan.add_argument("--global-tokens", type=_count, metavar="N", help="batch.global_batch_tokens; gas is derived")
    plan.add_argument("--mode", choices=("packed", "padded"), help="batch.mode of the recipe (packed)")
    plan.add_argument("--hidden-size", type=_count, metavar="H", help="of the model, which decides what is even (768)")
    plan.add_argument("--task", metavar="NAME", help="task of every step (mlm; of texts or images alone unified)")
    plan.add_argument(
        "--mix", action="append", metavar="FOLDER=SHARE",
        help="task unified: another dataset that is mixed into each step, so many units for each of STORE's; repeat it "
        "for more",
    )  # fmt: skip
    plan.add_argument("--seed", type=_number, metavar="N", help="seed of the recipe (42)")
    plan.add_argument("--max-text-tokens", type=_count, metavar="N", help="longer texts are left out (60)")
    plan.add_argument("--window-shards", type=_count, metavar="N", help="texts are shuffled within so many shards (16)")
    plan.add_argument("--steps", type=_count, metavar="N", help="look at so many steps at most (1000)")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 1 if ``--verify`` found damage, otherwise 0.

    Raises:
        VlscaleError: an argument is wrong, or the store cannot be read.
    """
    _check(args)
    from vlscale.report.inspect_text import show

    found: dict[str, Any] = {"path": args.store}
    if args.verify:
        found["verify"] = _verify(args)
        if found["verify"]["found"] or found["verify"]["packed"]:
            _put(args, found, show)
            _tell_what_was_not_done(args, found["verify"])
            return 1 if found["verify"]["found"] else 0
    from vlscale.data.inspection import describe_histogram, facts, length_histograms, open_stores

    stores = open_stores(args.store, args.cache)
    found = {**facts(stores), **found}
    histograms = length_histograms(stores)
    found["lengths"] = {name: describe_histogram(histogram) for name, histogram in histograms.items()}
    if args.rows is not None:
        from vlscale.data.rows import decoded_rows

        found["rows"] = decoded_rows(stores, args.rows, args.max_regions or _ROW_REGIONS)
    figures = _figures(args, stores) if args.plan else None
    if figures is not None:
        found["plan"] = figures.to_json()
    if args.png is not None:
        from vlscale.report.lengths import draw_lengths

        found["png"] = str(draw_lengths(histograms, figures, args.png, str(stores.path)))
    _put(args, found, show)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Mend ``--verify STORE``, and refuse arguments that contradict each other, before anything is read."""
    if args.verify not in (None, *_VERIFY) and args.store is None:
        args.store, args.verify = args.verify, "hashes"
    if args.verify not in (None, *_VERIFY):
        raise VlscaleError(f"--verify {args.verify}: expected nothing or 'rows' behind it")
    if args.store is None:
        raise VlscaleError("which STORE? name the folder of a dataset or of a store; see vlscale inspect --help")
    if not args.plan:
        unused = [name for name in _PLAN_OPTIONS if getattr(args, name) is not None]
        if unused:
            raise VlscaleError(f"--{unused[0].replace('_', '-')} has no effect without --plan; add --plan")
    elif args.budget is None:
        raise VlscaleError("--plan needs --budget TOKENS, the recipe's batch.micro_batch_tokens, as --budget 10240")
    if args.verify and args.cache is not None:
        raise VlscaleError("--verify and --cache exclude each other: hashes are compared where the store lies")
    if args.max_regions is not None and args.rows is None and not args.plan:
        raise VlscaleError("--max-regions has no effect without --rows or --plan; add one of them")
    if args.mode == "padded" and args.global_tokens is None:
        raise VlscaleError("--mode padded needs --global-tokens, the recipe's batch.global_batch_tokens")
    if args.gas is not None and args.global_tokens is not None:
        raise VlscaleError("--gas and --global-tokens exclude each other: one follows from the other")
    if args.task is not None:
        from vlscale.config import TASKS
        from vlscale.errors import nearest

        if args.task not in TASKS:
            raise VlscaleError(f"--task {args.task}: expected one of {', '.join(TASKS)}{nearest(args.task, TASKS)}")
        if args.mix and args.task != "unified":
            raise VlscaleError(f"--mix has no effect with --task {args.task}: only steps of task unified mix datasets")
    if args.png is not None:
        from vlscale.report.lengths import check_png

        check_png(args.png)


def _tell_what_was_not_done(args: argparse.Namespace, verified: dict[str, Any]) -> None:
    asked = [("--rows", args.rows is not None), ("--plan", args.plan), ("--png", args.png is not None)]
    missing = [name for name, wanted in asked if wanted]
    if verified["packed"] and args.verify == "rows":
        missing.append("--verify rows")
    if missing:
        why = "of the damage" if verified["found"] else "shards are compressed; give --cache FOLDER, without --verify"
        print(f"vlscale inspect: not done because {why}: {', '.join(missing)}", file=sys.stderr)


def _put(args: argparse.Namespace, found: dict[str, Any], show: Any) -> None:
    if args.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        from rich.console import Console

        console = Console()
        show(found, console if console.is_terminal else Console(width=_WIDTH))


def _verify(args: argparse.Namespace) -> dict[str, Any]:
    """Verify under a progress bar on stderr, which is only drawn on a terminal."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from vlscale.data.verification import verify

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, last = bar.add_task("", total=None), 0.0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > 0.1 or done == total:
                last = now
                bar.update(task, description=what, completed=done, total=max(total, 1))

        report = verify(args.store, args.verify == "rows", progress)
    return {"what": args.verify, **report.__dict__}


def _figures(args: argparse.Namespace, stores: Stores) -> PlanFigures:
    from vlscale.data.plan_figures import MOST_STEPS, plan_figures
    from vlscale.data.source import PlanSettings

    if stores.dataset is None:
        raise VlscaleError(f"{stores.path}: a plan needs texts and images; name the folder that holds both stores")
    asked = {
        "micro_batch_tokens": args.budget,
        "max_text_tokens": args.max_text_tokens,
        "max_regions": args.max_regions,
        "window_shards": args.window_shards,
    }
    settings = PlanSettings(
        seed=42 if args.seed is None else args.seed,
        global_batch_tokens=args.global_tokens,
        mode=args.mode or "packed",
        **{name: value for name, value in asked.items() if value is not None},
    )
    gas = None if args.global_tokens is not None else (args.gas or 1)
    lengths = stores.dataset.lengths
    steps, hidden_size = args.steps or MOST_STEPS, args.hidden_size or _HIDDEN_SIZE
    task = args.task or ("mlm" if lengths.kind == "pairs" and not args.mix else "unified")
    others = [_other(asked, number) for number, asked in enumerate(args.mix or ())]
    return plan_figures(lengths, task, settings, args.world or 1, gas, steps, hidden_size, others=others)


def _other(asked: str, number: int) -> tuple[DatasetLengths, float]:
    """Lengths of a dataset of ``--mix``, and its share."""
    from vlscale.data.dataset import open_dataset

    folder, _, share = asked.rpartition("=")
    try:
        found = float(share)
    except ValueError:
        found = 0.0
    if not folder or not 0 < found < float("inf"):
        raise VlscaleError(f"--mix {asked}: expected FOLDER=SHARE, a share above 0, as --mix data/books=0.2")
    return open_dataset(f"{Path(folder).resolve().name}.{number + 2}", Path(folder)).lengths, found


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 12:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def _count(text: str) -> int:
    if _number(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)
