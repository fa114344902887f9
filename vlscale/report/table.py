"""The table a person reads, and summary.json, which holds the same and more."""

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

METRICS = (
    "mlm_accuracy",
    "mlm_accuracy_wrong_image",
    "mrc_accuracy",
    "itm_accuracy",
    "alignment_accuracy",
    "i2t_r1",
    "i2t_r5",
    "t2i_r1",
    "t2i_r5",
)
"""Metrics of summary.json, in its order."""

REPORTED = ("grounding", "mrfr_relative_error")
"""Figures that are reported whatever they are."""

_ROWS = {
    "mlm_accuracy": "masked word",
    "mlm_accuracy_wrong_image": "  with a wrong image",
    "grounding": "  grounding: difference",
    "mrc_accuracy": "masked region, class",
    "itm_accuracy": "matching",
    "alignment_accuracy": "word -> region, by plan",
    "i2t_r1": "image -> caption R@1",
    "i2t_r5": "image -> caption R@5",
    "t2i_r1": "caption -> image R@1",
    "t2i_r5": "caption -> image R@5",
    "mrfr_relative_error": "masked region, MSE",
}


@dataclass(frozen=True)
class Split:
    """Both models on one dataset.

    Attributes:
        dataset: its name; fingerprint: of its stores; images, texts: how many took part.
        trained, untrained: metric -> outcome.
        left_out: metric -> why it does not apply.
    """

    dataset: str
    fingerprint: str
    images: int
    texts: int
    trained: Mapping[str, Outcome]
    untrained: Mapping[str, Outcome]
    left_out: Mapping[str, str]


def figures(split: Split, names: tuple[str, ...], seed: int) -> dict[str, dict[str, Any]]:
    """Return ``{metric: {trained, untrained, chance, n, interval, ...}}`` for those of ``names`` that were measured.

    ``interval`` holds the 95 % bootstrap intervals of both models; ``n`` counts questions.
    """
    found = {name: figure(split.trained[name], split.untrained[name], seed) for name in names if name in split.trained}
    return rounded(found)


def figure(trained: Outcome, untrained: Outcome, seed: int) -> dict[str, Any]:
    """Return what :func:`figures` says of one metric, unrounded."""
    return {
        "trained": trained.mean,
        "untrained": untrained.mean,
        "chance": trained.chance,
        "n": len(trained),
        "interval": {"trained": trained.interval(seed), "untrained": untrained.interval(seed)},
        **({} if trained.baseline is None else {"baseline": trained.baseline}),
        **trained.extra,
    }


def summarise(splits: Mapping[str, Split], seed: int) -> dict[str, Any]:
    """Return the content of summary.json.

    ``metrics`` (and ``unseen_pictures``, where there is such a split) hold METRICS, ``reported`` holds REPORTED for
    every split, ``left_out`` the metrics that do not apply and why, ``datasets`` what was asked.
    """
    return {
        **{key: figures(split, METRICS, seed) for key, split in splits.items()},
        "reported": {key: figures(split, REPORTED, seed) for key, split in splits.items()},
        "left_out": {key: dict(split.left_out) for key, split in splits.items()},
        "datasets": {
            key: {"name": s.dataset, "fingerprint": s.fingerprint, "images": s.images, "texts": s.texts}
            for key, s in splits.items()
        },
        "interval": f"95 %, bootstrap over images, {RESAMPLES} resamples",
        "seed": seed,
        "vlscale": vlscale.__version__,
    }


def write_summary(path: Path, splits: Mapping[str, Split], seed: int) -> Path:
    """Write summary.json, whole or not at all, and return its path."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(summarise(splits, seed), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def build_table(splits: Mapping[str, Split], seed: int) -> Table:
    """Return the table; the first split has all columns, a split of unseen pictures only the trained model."""
    main, unseen = splits["metrics"], splits.get("unseen_pictures")
    shown = figures(main, tuple(_ROWS), seed)
    elsewhere = {} if unseen is None else figures(unseen, tuple(_ROWS), seed)
    candidates = shown.get("i2t_r1", {}).get("candidates")
    title = f"held-out scenes: {main.images} images, {main.texts} texts"
    if candidates:
        title += f", {candidates} candidates"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("trained", "untrained", "chance", "baseline", *(["unseen"] if unseen else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for name, label in _ROWS.items():
        if name in shown:
            cells = _cells(shown[name], elsewhere.get(name) if unseen else None)
            table.add_row(Text(label), *cells[: 5 if unseen else 4], end_section=name in ("grounding", "t2i_r5"))
    return table


def show(splits: Mapping[str, Split], seed: int, console: Console) -> None:
    """Print the table, what its columns mean, and which metrics were left out."""
    table = build_table(splits, seed)
    console.print()
    console.print(table)
    notes = ["±: half of the 95 % bootstrap interval over images"]
    if "alignment_accuracy" in splits["metrics"].trained:
        notes.append("baseline: plain match of the word with the class names of the detector")
    if "mrfr_relative_error" in splits["metrics"].trained:
        notes.append("MSE: error of the feature relative to predicting the mean; below 1 is better")
    if "unseen_pictures" in splits:
        notes.append("unseen: trained, on pictures of known things that training never showed")
    for note in notes:
        console.print(note, style="dim", highlight=False)
    for split in splits.values():
        for reason in sorted(set(split.left_out.values())):
            names = ", ".join(name for name, why in split.left_out.items() if why == reason)
            console.print(f"left out on {split.dataset}: {names}: {reason}", markup=False, highlight=False)


def _cells(row: Mapping[str, Any], elsewhere: Mapping[str, Any] | None) -> list[str]:
    low, high = row["interval"]["trained"]
    return [
        f"{row['trained']:.3f} ±{(high - low) / 2:.3f}",
        f"{row['untrained']:.3f}",
        f"{row['chance']:.3f}",
        f"{row['baseline']:.3f}" if "baseline" in row else "",
        f"{elsewhere['trained']:.3f}" if elsewhere else "",
    ]


def rounded(value: Any) -> Any:
    """Six decimals: more would be noise of the arithmetic."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value
