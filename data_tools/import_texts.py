"""Import texts: ``python -m data_tools.import_texts FORMAT SOURCE... --out ROOT --tokenizer PATH``.

Writes ``ROOT/texts``; texts that refer to images need ``ROOT/images`` first. See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.fingerprint import describe_options
from data_tools.formats import open_source
from data_tools.grown_tokenizer import load_grown
from data_tools.options import exclusion, number, parse, run_of
from data_tools.texts import import_texts
from vlscale.errors import one_line_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this tool."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="vocab.txt, tokenizer.json, a SentencePiece .model, or a folder that holds one",
    )
    parser.add_argument(
        "--added-tokens",
        type=number(0, 1 << 16),
        default=0,
        metavar="N",
        help="grow the vocabulary by N word pieces that texts tokenized elsewhere use (UNITER's VCR: 81)",
    )


def run(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Import what the command line says and return the report.

    Raises:
        VlscaleError: see :func:`data_tools.texts.import_texts`.
    """
    options = parse("texts", "Import texts into ROOT/texts.", arguments, add_arguments)
    return import_texts(
        partial(open_source, options.format, "texts", options),
        partial(load_grown, options.tokenizer, options.added_tokens),
        describe_options(options),
        run_of(options),
        exclusion(options),
        options.on_error == "skip",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("import_texts"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
