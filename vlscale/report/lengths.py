"""Histograms of lengths, in text and as a picture, and the tokens of a plan's micro-batches beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vlscale.data.inspection import describe_histogram
from vlscale.data.plan_figures import PlanFigures
from vlscale.data.survey import Histogram
from vlscale.errors import VlscaleError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "tokens": ("tokens per text", "word pieces, without [CLS] and [SEP]"),
    "regions": ("regions per image", "regions"),
    "joint": ("tokens per example", "text and regions, with [CLS] and [SEP]"),
}
"""Name of a histogram -> (title, what its axis counts)."""

_COLORS = {"tokens": "#0072b2", "regions": "#d55e00", "joint": "#009e73"}
_BAR = 30
_POINTS = 6000
_BARS = 60


def histogram_table(name: str, described: Mapping[str, Any], full_block: str = "█") -> Table:
    """Return a histogram as a table of bars.

    Args:
        name: a key of LABELS.
        described: see :func:`vlscale.data.inspection.describe_histogram`.
        full_block: character that bars are made of.
    """
    title, unit = LABELS[name]
    table = Table(
        title=f"{title} ({unit})", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("length", justify="right", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_BAR)
    most = max((count for *_, count in described["bins"]), default=1)
    for low, high, count in described["bins"]:
        span = str(low) if low == high else f"{low}-{high}"
        bar = full_block * max(round(_BAR * count / most), 1 if count else 0)
        table.add_row(span, f"{count:,}", f"{count / described['count']:.1%}", bar)
    return table


def quantile_table(described: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return one row of quantiles per histogram (name -> what describe_histogram says)."""
    table = Table(title="lengths", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    shares = next((list(one["quantiles"]) for one in described.values() if one["count"]), [])
    for name in ("count", "mean", "least", *(f"{float(share):.0%}" for share in shares), "most"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in described.items():
        if one["count"]:
            quantiles = [str(one["quantiles"][share]) for share in shares]
            ends = f"{one['count']:,}", f"{one['mean']:.1f}", str(one["least"])
            table.add_row(LABELS[name][0], *ends, *quantiles, str(one["most"]))
    return table


def check_png(path: Path) -> None:
    """Refuse a picture that could not be written, before any work is done.

    Raises:
        VlscaleError: matplotlib is missing, the name does not end in .png, or its folder is not there.
    """
    if path.suffix.lower() != ".png":
        raise VlscaleError(f"--png {path}: expected a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise VlscaleError(f"--png {path}: the folder {path.absolute().parent} is not there; create it")
    if path.is_dir():
        raise VlscaleError(f"--png {path}: is a folder; name a file")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise VlscaleError("--png: needs matplotlib; pip install 'vlscale[train]'") from None


def draw_lengths(histograms: Mapping[str, Histogram], figures: PlanFigures | None, path: Path, title: str) -> Path:
    """Draw the histograms side by side and, below them, the tokens of each micro-batch of a plan.

    Args:
        histograms: name (a key of LABELS) -> lengths.
        figures: the plan's figures; None leaves the lower panel out.
        path: PNG to write, whole or not at all.
        title: what is shown, in one line.

    Returns:
        ``path``.

    Raises:
        VlscaleError: see :func:`check_png`; the file cannot be written.
    """
    check_png(path)
    from matplotlib.figure import Figure

    shown = {name: histogram for name, histogram in histograms.items() if histogram.counts.sum()}
    columns, rows = max(1, len(shown)), (1 if shown else 0) + (figures is not None)
    if not rows:
        raise VlscaleError(f"--png {path}: the store has neither texts nor images, so there are no lengths to draw")
    figure = Figure(figsize=(max(6.5, 4.4 * columns), 3.9 * rows + 0.3), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    grid = figure.add_gridspec(rows, columns)
    for place, (name, histogram) in enumerate(shown.items()):
        _draw_histogram(figure.add_subplot(grid[0, place]), name, histogram)
    if figures is not None:
        _draw_micro_batches(figure.add_subplot(grid[rows - 1, :]), figures)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": "vlscale"})
        os.replace(temporary, path)
    except OSError as error:
        raise VlscaleError(f"--png {path}: cannot be written ({error.strerror}); name another place") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def bars(histogram: Histogram) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return ``(left edges, counts, width)`` of at most 60 bars of whole numbers that cover a histogram."""
    least, most = histogram.least, histogram.most
    width = -(-(most - least + 1) // _BARS)
    left = np.arange(least, most + 1, width)
    return left, np.add.reduceat(histogram.counts[: most + 1], left), width


def _draw_histogram(axes: Axes, name: str, histogram: Histogram) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    title, unit = LABELS[name]
    left, counts, width = bars(histogram)
    axes.bar(left - 0.5, counts, width=width, align="edge", color=_COLORS[name], edgecolor="white", linewidth=0.4)
    described = describe_histogram(histogram)
    for share, style in (("0.5", "-"), ("0.99", "--")):
        value = described["quantiles"][share]
        axes.axvline(value, color="#333333", linestyle=style, linewidth=1.2, label=f"{float(share):.0%}: {value}")
    axes.plot([], [], " ", label=f"mean: {described['mean']:.1f}")
    axes.legend(loc="upper right", fontsize=9, framealpha=0.9, edgecolor="none")
    what = {"tokens": "texts", "regions": "images", "joint": "texts"}[name]
    axes.set(xlabel=unit, ylabel=f"number of {what}", xlim=(left[0] - 1, left[-1] + width + 0.5))
    axes.set_title(f"{title} ({described['count']:,} {what})", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_micro_batches(axes: Axes, figures: PlanFigures) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps, per_step = figures.tokens.shape
    every = -(-figures.tokens.size // _POINTS)
    chosen = np.arange(0, steps, every)
    tokens = figures.tokens[chosen]
    # Micro-batches of a step stand beside each other, so that points do not hide each other.
    spread = (np.arange(per_step) + 0.5) / per_step * 0.8 - 0.4 if per_step > 1 else np.zeros(1)
    where = (chosen[:, None] + spread).ravel()
    axes.plot(where, tokens.ravel(), ".", color="#0072b2", markersize=4, alpha=0.6, label="micro-batch")
    axes.axhline(figures.micro_batch_tokens, color="#d62728", linewidth=1.2, label="budget of a micro-batch")
    axes.set(xlabel="optimiser step", ylabel="tokens and regions per micro-batch", xlim=(-0.9, steps - 0.1))
    axes.set_ylim(0, 1.12 * figures.micro_batch_tokens)
    ranks = f"{figures.world_size} {'process' if figures.world_size == 1 else 'processes'}"
    axes.set_title(
        f"{ranks} x {figures.accumulation} micro-steps: fill {figures.fill:.1%}, padding {figures.padding:.1%}, "
        f"straggler factor {figures.straggler_mean:.3f} on average, {figures.straggler_most:.3f} at most",
        fontsize=10,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
