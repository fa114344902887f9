"""What a person reads of a plan: tables and the assumptions under them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlscale.plan.gpus import HERE
from vlscale.plan.memory import GIB
from vlscale.plan.predict import PUBLISHED, Prediction
from vlscale.plan.sweep import Point, best


def show(made: Prediction, console: Console) -> None:
    """Print a prediction."""
    job, work = made.job, made.workload
    console.print(
        f"{job.recipe.name}: {made.parameters:,} parameters; {job.gpus} x {job.gpu_name}, ZeRO-{job.zero.stage}, "
        f"{job.zero.precision}, activation checkpointing {job.checkpointing}, accumulation {work.accumulation}",
        highlight=False, markup=False,
    )  # fmt: skip
    console.print(_memory_table(made))
    console.print(_time_table(made))
    for cure in made.cures:
        console.print(Text(f"does not fit; change: {cure}"))
    published = PUBLISHED.get(job.recipe.name)
    if published is not None:
        console.print(
            Text(
                f"published: {published[1]:,.0f} {published[0]}-hours, about {published[2]:g} days, for this schedule "
                f"by the authors' program"
            )
        )
    if made.measured:
        console.print(Text("Measured by --probe:", style="dim"))
        for line in made.measured:
            console.print(Text(f"  {line}", style="dim"))
    show_assumptions(made.assumptions, console)


def show_assumptions(lines: Sequence[str], console: Console) -> None:
    """Print what is assumed."""
    console.print(Text("Assumed, not measured:", style="dim"))
    for line in lines:
        console.print(Text(f"  {line}", style="dim"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory_table(made: Prediction) -> Table:
    memory, states, activations = made.memory, made.memory.states, made.memory.activations
    table = _table("memory of one GPU", "", "GiB")
    rows = [
        ("weights", states.weights),
        ("gathered weights", states.gathered),
        ("gradients", states.gradients),
        ("optimiser states", states.optimizer),
        ("buckets", states.buckets),
        ("activations: embeddings", activations.embeddings),
        ("activations: layers", activations.layers),
        ("activations: computed again and gradients", activations.recomputed),
        (f"logits and loss ({memory.task})", activations.loss),
        ("float32 gradient, while the optimiser steps", states.step_copy),
        ("inputs", memory.inputs),
        ("reserve (assumed)", memory.reserve),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, f"{value / GIB:.3f}")
    table.add_section()
    verdict = "fits" if memory.fits else "DOES NOT FIT"
    table.add_row(f"peak (not all at once) of {memory.capacity / GIB:.2f}: {verdict}", f"{memory.peak / GIB:.3f}")
    return table


def _time_table(made: Prediction) -> Table:
    work, traffic = made.workload, made.traffic
    table = _table("one optimiser step", "", "")
    rows = [
        ("tokens", f"{work.mean('tokens'):,.0f}"),
        ("micro-batches' fill", f"{work.fill:.1%}"),
        ("FLOPs per token", f"{made.flops_per_token:.4g}"),
        ("FLOPs", f"{made.flops_per_step:.4g}"),
        ("sent per GPU: gradients", f"{traffic.reduce_bytes / 1e9:.3f} GB"),
        ("sent per GPU: weights", f"{traffic.gather_bytes / 1e9:.3f} GB"),
        ("computing", f"{made.compute_s:.4f} s"),
        ("  of that: computed again", f"{made.recompute_s:.4f} s"),
        (f"waiting for the busiest GPU (x {made.straggler_s / made.compute_s + 1:.4f})", f"{made.straggler_s:.4f} s"),
        (f"communication that is not hidden (of {traffic.reduce_s + traffic.gather_s:.4f} s)",
         f"{traffic.exposed_s:.4f} s"),
        ("optimiser", f"{made.optimizer_s:.4f} s"),
        ("step", f"{made.step_s:.4f} s"),
        ("tokens per second", f"{made.tokens_per_s:,.0f}"),
        (_mfu_name(made), f"{made.mfu:.1%}"),
        (f"days for {made.job.recipe.schedule.total_steps:,} steps", f"{made.days:.2f}"),
        ("GPU-hours", f"{made.gpu_hours:,.0f}"),
    ]  # fmt: skip
    for name, value in rows:
        table.add_row(name, value)
    return table


def _mfu_name(made: Prediction) -> str:
    """What the MFU is a share of is only known to a reader where it is the peak of a named GPU."""
    if made.job.gpu_name != HERE:
        return "MFU"
    return f"MFU, of the fastest product measured ({made.peak_flops / 1e9:,.0f} GFLOP/s)"


def show_sweep(points: Sequence[Point], console: Console) -> None:
    """Print the table of a sweep; the fastest that fits, per number of GPUs, is marked."""
    marked = {id(point) for point in best(points).values()}
    table = _table(
        "sweep", "", "GPUs", "ZeRO", "checkp.", "ceiling", "accum.", "GiB", "fits", "step s", "exposed s", "MFU",
        "days", "GPU-hours",
    )  # fmt: skip
    reasons: dict[str, None] = {}
    for point in points:
        setting = (str(point.gpus), str(point.stage), point.policy, str(point.micro_batch_tokens))
        made = point.prediction
        if made is None:
            reasons[point.reason] = None
            table.add_row("", *setting, *(["-"] * 8))
            continue
        table.add_row(
            "*" if id(point) in marked else "", *setting, str(made.workload.accumulation),
            f"{made.memory.peak / GIB:.2f}", "yes" if made.memory.fits else "no", f"{made.step_s:.4f}",
            f"{made.traffic.exposed_s:.4f}", f"{made.mfu:.1%}", f"{made.days:.2f}", f"{made.gpu_hours:,.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(Text("*: the fastest that fits on so many GPUs"))
    for reason in reasons:
        console.print(Text(f"-: {reason}"))
