"""Import region features: ``python -m data_tools.import_images FORMAT SOURCE... --out ROOT``.

Writes ``ROOT/images`` and, where the source has class probabilities, ``ROOT/classes``. See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from data_tools.build import import_images
from data_tools.build_images import Choice
from data_tools.fingerprint import describe_options
from data_tools.formats import open_source
from data_tools.options import exclusion, fraction, number, parse, run_of
from vlscale.errors import VlscaleError, one_line_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument("--codec", choices=("none", "lossless", "uint8"), default="none", help="of the features")
    parser.add_argument("--feature-dtype", choices=("float16", "float32"), help="convert to it (default: the source's)")
    parser.add_argument(
        "--max-regions", type=number(1, 1024), default=1024, metavar="N", help="keep the first N regions (default: all)"
    )
    parser.add_argument(
        "--min-confidence",
        type=fraction,
        metavar="C",
        help="keep as many of the first regions as have a confidence above C (UNITER: 0.2)",
    )
    parser.add_argument(
        "--min-regions",
        type=number(1, 1024),
        default=None,
        metavar="N",
        help="but at least N, if there are (default 10; with --min-confidence)",
    )


def choice_of(options: argparse.Namespace) -> Choice:
    """Which regions are kept.

    Raises:
        VlscaleError: the options contradict each other.
    """
    if options.min_regions is not None and options.min_confidence is None:
        raise VlscaleError("--min-regions says what --min-confidence leaves at least; give both")
    least = min(10, options.max_regions) if options.min_regions is None else options.min_regions
    if least > options.max_regions:
        raise VlscaleError(f"--min-regions {least} is more than --max-regions {options.max_regions}")
    return Choice(options.max_regions, options.min_confidence, least, options.feature_dtype, options.codec)


def run(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Import what the command line says and return the report.

    Raises:
        VlscaleError: see :func:`data_tools.build.import_images`.
    """
    options = parse("images", "Import region features into ROOT/images.", arguments, add_arguments)
    return import_images(
        partial(open_source, options.format, "images", options),
        describe_options(options),
        run_of(options),
        choice_of(options),
        exclusion(options),
        options.on_error == "skip",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("import_images"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
