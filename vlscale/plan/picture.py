"""The scaling plot: tokens per second and MFU over the number of GPUs, the global batch unchanged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vlscale.errors import VlscaleError
from vlscale.plan.sweep import Point


def check_plot(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        VlscaleError: matplotlib is missing, the name does not end in .png, or its folder does not exist or cannot be
            written to.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise VlscaleError("--plot: needs matplotlib; pip install 'vlscale[train]'") from None
    if path.suffix != ".png":
        raise VlscaleError(f"--plot {path}: expected a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise VlscaleError(f"--plot {path}: {path.absolute().parent} is no folder; make it first")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise VlscaleError(f"--plot {path}: cannot be written there; name another file")


def draw_scaling(points: Sequence[Point], path: Path) -> Path:
    """Draw the points that can be run and return the file's path.

    Raises:
        VlscaleError: none of them can be run.
    """
    made = [point.prediction for point in points if point.prediction is not None]
    if not made:
        raise VlscaleError(f"--plot {path}: this recipe's steps cannot be dealt to any number of GPUs in the plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gpus = [one.job.gpus for one in made]
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    speed, use = figure.subplots(1, 2)
    speed.plot(gpus, [one.tokens_per_s for one in made], marker="o", label="predicted")
    first = made[0]
    speed.plot(gpus, [first.tokens_per_s * n / gpus[0] for n in gpus], "--", color="0.6", label="linear")
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens per second")
    speed.legend()
    for name, values in (
        ("computing", [one.compute_s / one.step_s for one in made]),
        ("waiting for the busiest GPU", [one.straggler_s / one.step_s for one in made]),
        ("communication, not hidden", [one.traffic.exposed_s / one.step_s for one in made]),
        ("optimiser", [one.optimizer_s / one.step_s for one in made]),
        ("MFU", [one.mfu for one in made]),
    ):
        use.plot(gpus, values, "k-o" if name == "MFU" else "-", label=name)
    use.set(xscale="log", ylim=(0, 1.02), xlabel="GPUs", ylabel="share of the step; MFU")
    use.legend(fontsize="small", loc="center left")
    for axes in (speed, use):
        axes.set_xticks(gpus, [str(n) for n in gpus], rotation=60, fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    job = first.job
    tokens = first.workload.mean("tokens")
    figure.suptitle(
        f"{job.recipe.name} on {job.gpu_name}, ZeRO-{job.zero.stage}, {tokens:,.0f} tokens per step: prediction under "
        f"assumed efficiencies",
        fontsize="medium",
    )
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise VlscaleError(f"--plot {path}: cannot be written ({error.strerror})") from None
    return path
