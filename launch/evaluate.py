"""Evaluate a run on its held-out data: python launch/evaluate.py --run runs/demo [--set KEY=VALUE ...]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlscale.errors import one_line_errors
from vlscale.report.evaluate import evaluate_run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that training wrote: recipe.yaml and model/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the run's recipe")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the trained and the untrained model; the table, summary.json and grounding.png say how they do."""
    args = parse(arguments)
    with one_line_errors("evaluate"):
        evaluate_run(args.run, tuple(args.set), Console())


if __name__ == "__main__":
    main()
