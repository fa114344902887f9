"""Command line of the import tools: what all formats share, and mistakes in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_tools.exclusion import excluded_ids
from data_tools.formats import FORMATS, find_format
from data_tools.parts import Run
from vlscale.errors import VlscaleError

MAX_WORKERS = 1024


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are :class:`VlscaleError`, which the tools print as one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            VlscaleError: always.
        """
        raise VlscaleError(f"{message}; --help tells the options")


def parse(
    kind: str, summary: str, arguments: Sequence[str], add_own: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """Read a command line ``FORMAT SOURCE... --out ROOT [options]``.

    Args:
        kind: ``images`` or ``texts``, what the tool imports.
        summary: of the tool.
        arguments: without the program's name.
        add_own: adds the tool's own options.

    Returns:
        All options, with ``format``.

    Raises:
        VlscaleError: the command line is wrong.
        SystemExit: help was asked for.
    """
    program = f"python -m data_tools.import_{kind}"
    if not arguments or arguments[0] in ("-h", "--help"):
        OneLineParser(
            prog=f"{program} FORMAT SOURCE... --out ROOT [options]",
            usage="%(prog)s",
            description=f"{summary} FORMAT --help tells the options of a format.",
            epilog="formats: " + "; ".join(_helps(kind)),
        ).print_help()
        raise SystemExit(0 if arguments else 2)
    name = arguments[0].replace("-", "_")
    module = find_format(name, kind)
    parser = OneLineParser(prog=f"{program} {name}", description=module.HELP, allow_abbrev=False)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="files or folders, as the format says")
    parser.add_argument("--out", type=Path, required=True, metavar="ROOT", help="the dataset's folder")
    add_own(parser)
    add_run(parser)
    add_exclusion(parser.add_argument_group("images that models are evaluated on"))
    module.add_arguments(parser.add_argument_group("options of this format"))
    parsed = parser.parse_args(arguments[1:])
    parsed.format = name
    return parsed


def _helps(kind: str) -> list[str]:
    found = []
    for name in FORMATS:
        try:
            found.append(f"{name}: {find_format(name, kind).HELP}")
        except VlscaleError:  # of the other kind, or its packages are not installed
            continue
    return found


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a build runs; :func:`run_of` reads them."""
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a bad row: stop (default), or skip it, count it and list it in ROOT/dropped-*.jsonl",
    )
    add_share(parser)


def add_share(parser: argparse.ArgumentParser) -> None:
    """Add the options of which share of a build runs, over how many processes; :func:`run_of` reads them."""
    parser.add_argument("--workers", type=number(1, MAX_WORKERS), default=1, metavar="N", help="processes (default 1)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shard", type=_shard, metavar="i/n", help="build the i-th of n shares of the parts (i from 0), do not merge"
    )
    which.add_argument("--merge", action="store_true", help="merge what --shard i/n have built")


def add_exclusion(group: Any) -> None:
    """Add the options that leave images out; :func:`exclusion` reads them."""
    group.add_argument(
        "--exclude", type=Path, action="append", default=[], metavar="FILE", help="image ids to leave out, one a line"
    )
    group.add_argument(
        "--exclude-karpathy",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="dataset_coco.json: leave out its val and test images; dataset_flickr30k.json: leave out all its images",
    )
    group.add_argument(
        "--vg-image-data",
        type=Path,
        metavar="FILE",
        help="image_data.json: the images are Visual Genome's; leave out copies of the images above",
    )
    group.add_argument(
        "--coco-images",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a COCO annotation file with flickr_url: leave out COCO images that Flickr30k holds too",
    )


def exclusion(options: argparse.Namespace) -> frozenset[str]:
    """Ids of the images that the options leave out.

    Raises:
        VlscaleError: see :func:`data_tools.exclusion.excluded_ids`.
    """
    return excluded_ids(options.exclude, options.exclude_karpathy, options.vg_image_data, options.coco_images)


def run_of(options: argparse.Namespace) -> Run:
    """How the build runs."""
    return Run(options.out, options.workers, options.shard, options.merge)


def number(low: int, high: int) -> Callable[[str], int]:
    """Type of an option: an integer in ``low..high``."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or len(text) > 18 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in {low}..{high}")
        return int(text)

    return read


def fraction(text: str) -> float:
    """Type of an option: a number in 0..1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number in 0..1")
    return value


def _shard(text: str) -> tuple[int, int]:
    first, _, step = text.partition("/")
    if not (text.isascii() and first.isdigit() and step.isdigit() and len(text) < 16 and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 0 <= i < n, for example 0/8")
    return int(first), int(step)
