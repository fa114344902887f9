"""The table that a person reads of a UNIMO's evaluation, and its summary.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import vlscale
from vlscale.report.outcome import RESAMPLES, Outcome
from vlscale.report.table import figure, rounded

ROWS = {
    "i2t_r1": "image -> caption R@1",
    "i2t_r5": "image -> caption R@5",
    "i2t_r10": "image -> caption R@10",
    "t2i_r1": "caption -> image R@1",
    "t2i_r5": "caption -> image R@5",
    "t2i_r10": "caption -> image R@10",
    "caption_bleu4": "captions, BLEU-4",
    "caption_cider": "captions, CIDEr",
    "caption_precision": "  named things that are there",
    "caption_recall": "  things there that are named",
    "text_accuracy": "masked word piece of a text",
}
"""Metrics of summary.json, in its order, as the table calls them."""

_OF_ALL_TOGETHER = ("caption_bleu4",)
"""Metrics that are no mean over items, so that there is no interval."""
_ENDS = ("i2t_r10", "t2i_r10", "caption_recall")


@dataclass(frozen=True)
class Both:
    """Both models on the same data.

    Attributes:
        trained, untrained: metric -> outcome.
        left_out: metric -> why it does not apply.
        datasets: kind -> name, fingerprint and size.
    """

    trained: Mapping[str, Outcome]
    untrained: Mapping[str, Outcome]
    left_out: Mapping[str, str]
    datasets: Mapping[str, Mapping[str, str | int]]


def figures(both: Both, seed: int) -> dict[str, dict[str, Any]]:
    """Return ``{metric: {trained, untrained, chance, n, interval, ...}}`` for those of :data:`ROWS` that there are."""
    found: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        if name in both.trained and name in both.untrained:
            found[name] = figure(both.trained[name], both.untrained[name], seed)
            if name in _OF_ALL_TOGETHER:
                del found[name]["interval"]
    return rounded(found)


def write_summary(path: Path, both: Both, seed: int) -> Path:
    """Write summary.json, whole or not at all, and return its path."""
    content = {
        "metrics": figures(both, seed),
        "left_out": dict(both.left_out),
        "datasets": {kind: dict(told) for kind, told in both.datasets.items()},
        "interval": f"95 %, bootstrap over images or texts, {RESAMPLES} resamples",
        "seed": seed,
        "vlscale": vlscale.__version__,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def show(both: Both, seed: int, console: Console) -> None:
    """Print the table, and what does not apply."""
    shown = figures(both, seed)
    told = ", ".join(
        f"{each['images']:,} images with {each['texts']:,} captions" if kind == "pairs" else f"{each['texts']:,} texts"
        for kind, each in both.datasets.items()
    )
    candidates = shown.get("i2t_r1", {}).get("candidates")
    title = f"held out: {told}" + (f"; retrieval among {candidates}" if candidates else "")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("trained", "untrained", "chance", "baseline"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in shown.items():
        table.add_row(Text(ROWS[name]), *_cells(row), end_section=name in _ENDS)
    console.print(table)
    for reason in dict.fromkeys(both.left_out.values()):
        names = ", ".join(name for name, why in both.left_out.items() if why == reason)
        console.print(f"left out: {names}: {reason}", markup=False, highlight=False)


def _cells(row: Mapping[str, Any]) -> list[str]:
    half = ""
    if "interval" in row:
        low, high = row["interval"]["trained"]
        half = f" ±{(high - low) / 2:.3f}"
    baseline = f"{row['baseline']:.3f}" if "baseline" in row else ""
    return [f"{row['trained']:.3f}{half}", f"{row['untrained']:.3f}", f"{row['chance']:.3f}", baseline]
