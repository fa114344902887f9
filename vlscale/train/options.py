"""The command line of the scripts that train. Light: reader processes import those scripts, and this with them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

JOIN_TIMEOUT_S = 30.0
"""How long all processes may take to start, unless told otherwise: with the start itself, a minute."""


def seconds(text: str) -> float:
    """A positive number of seconds, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0 and at most a million, found {text!r}")
    return value


def parse(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``None`` is this process's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed JSON, named <model>_<cluster>.json")
    parser.add_argument("--recipe", type=Path, help="YAML; default: launch/recipes/<model>.yaml, by the JSON's name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    parser.add_argument("--run_dir", type=Path, help="default: runs/<name of the recipe>")
    parser.add_argument("--resume", default="none", metavar="auto|none|FOLDER", help="checkpoint to go on from")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--timeout", type=seconds, default=1800.0, help="to wait for another process (%(default)g s)")
    parser.add_argument("--join_timeout", type=seconds, default=JOIN_TIMEOUT_S, help="for all to start (%(default)g s)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # from the launcher
    return parser.parse_args(arguments)
