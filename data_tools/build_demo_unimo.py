"""Build UNIMO's demo corpus: ``python -m data_tools.build_demo_unimo --out runs/demo_unimo/data``.

Takes the scenes of ``build_demo`` and the texts in ``data_tools/demo/text``; trains a byte-level BPE on both; withholds
the captions of a third of the scenes; finds units, rewrites captions and retrieves. The same options give the same
bytes on one machine. See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_tools.demo_folder import fresh_folder
from data_tools.demo_texts import TEXTS
from data_tools.demo_unimo import MANIFEST_KIND, Options, Report, build
from data_tools.options import MAX_WORKERS, OneLineParser, number
from data_tools.train_tokenizer import LEAST
from vlscale.errors import one_line_errors


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        VlscaleError: it is wrong.
    """
    usual = Options()
    parser = OneLineParser(prog="python -m data_tools.build_demo_unimo", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo_unimo/data"), help="folder to create (%(default)s)")
    parser.add_argument(
        "--scenes", type=Path, default=Path("runs/demo/data"), help="what build_demo has written (%(default)s)"
    )
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the three text files")
    parser.add_argument(
        "--sentences", type=number(40, 1 << 30), help="of each text file, at most (default: all)", metavar="N"
    )
    parser.add_argument(
        "--most-scenes", type=number(8, 1 << 30), help="for training, and for validation (default: all)", metavar="N"
    )
    parser.add_argument(
        "--withheld",
        type=number(2, 1 << 20),
        default=usual.withheld,
        metavar="N",
        help="one scene in N has no captions (%(default)s)",
    )
    parser.add_argument(
        "--vocab-size", type=number(LEAST["bpe"], 1 << 20), default=usual.vocab_size, metavar="V", help="(%(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=number(8, 510), default=usual.max_tokens, metavar="N", help="of a text (%(default)s)"
    )
    parser.add_argument(
        "--neighbours",
        type=number(1, 1000),
        default=usual.neighbours,
        metavar="K",
        help="images and texts retrieved per caption (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=number(1, MAX_WORKERS), default=2, help="processes (%(default)s); do not change the result"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace such a corpus that is there already")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str]) -> Report:
    """Build what the command line says.

    Raises:
        VlscaleError: see :func:`data_tools.demo_unimo.build`.
    """
    chosen = parse(arguments)
    options = Options(
        withheld=chosen.withheld,
        vocab_size=chosen.vocab_size,
        max_tokens=chosen.max_tokens,
        neighbours=chosen.neighbours,
        sentences=chosen.sentences,
        scenes=chosen.most_scenes,
    )
    with fresh_folder(chosen.out, chosen.overwrite, MANIFEST_KIND) as partial:
        return build(options, chosen.scenes, chosen.texts, partial, chosen.workers)


def show(report: Report, console: Console) -> None:
    """Print what was built."""
    table = Table(title="UNIMO's demo corpus")
    for name in ("dataset", "images", "texts"):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    for name, (images, texts) in report.rows.items():
        table.add_row(name, f"{images:,}", f"{texts:,}")
    console.print(table)
    console.print(f"vocabulary {report.vocabulary}, {report.seconds:.0f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("build_demo_unimo"):
        show(run(sys.argv[1:] if arguments is None else arguments), Console())


if __name__ == "__main__":
    main()
