"""Build the demo corpus: ``python -m data_tools.build_demo --out runs/demo/data``.

Composes scenes from the free pictures in ``data_tools/demo``, captions them, computes real region features, and writes
one dataset root per split. The same options give the same bytes on one machine. See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from data_tools.demo_corpus import FIXTURE, MANIFEST_KIND, Options, Report, build
from data_tools.demo_folder import fresh_folder
from vlscale.errors import VlscaleError, one_line_errors

FIXTURE_FOLDER = Path("tests/fixtures/demo")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(prog="python -m data_tools.build_demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"), help="folder to create (%(default)s)")
    parser.add_argument(
        "--scenes", type=int, default=defaults.scenes, help="training scenes (%(default)s); the other splits scale"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="seed of everything (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s); does not change the result")
    parser.add_argument(
        "--things", type=int, default=defaults.things, help="nouns that training knows (%(default)s; also tried: 120)"
    )
    parser.add_argument("--regions", type=int, default=defaults.regions, help="regions per scene (%(default)s)")
    parser.add_argument(
        "--vocab", default=defaults.vocab, help="'train', or a vocab.txt, tokenizer.json or their folder"
    )
    parser.add_argument("--features", default=defaults.features, choices=[defaults.features], help="network")
    parser.add_argument("--overwrite", action="store_true", help="replace a demo corpus that is there already")
    parser.add_argument("--fixture", action="store_true", help=f"build the tests' small corpus ({FIXTURE_FOLDER})")
    return parser.parse_args(arguments)


def options_from(arguments: argparse.Namespace) -> tuple[Options, Path]:
    """Return the corpus options and the folder that the command line asks for.

    Raises:
        VlscaleError: fewer scenes than the smallest corpus needs.
    """
    if arguments.fixture:
        chosen = arguments.out if arguments.out != Path("runs/demo/data") else FIXTURE_FOLDER
        return replace(FIXTURE, seed=arguments.seed), chosen
    scenes = arguments.scenes
    if not 16 <= scenes <= 1_000_000:
        raise VlscaleError(f"--scenes {scenes}: expected 16 to 1000000")
    options = Options(
        scenes=scenes,
        val=min(2000, max(8, scenes // 8)),
        val_unseen=min(500, max(8, scenes // 24)),
        val_new_things=min(500, max(8, scenes // 24)),
        things=arguments.things,
        regions=arguments.regions,
        seed=arguments.seed,
        vocab=arguments.vocab,
        features=arguments.features,
    )
    return options, arguments.out


def build_into(options: Options, out: Path, workers: int, overwrite: bool, console: Console) -> Report:
    """Build beside ``out`` and rename at the end, so that ``out`` is complete or not there.

    Raises:
        VlscaleError: ``out`` exists and may not be replaced, or the corpus cannot be built.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with fresh_folder(out, overwrite, MANIFEST_KIND) as partial, Progress(*columns, console=console) as progress:
        return build(options, partial, workers, progress)


def show(report: Report, out: Path, console: Console) -> None:
    """Print what was built."""
    table = Table(title=f"demo corpus in {out}")
    for name in ("split", "scenes", "texts", "regions", "MB", "identity"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split, part in report.splits.items():
        identity = "-" if part.identity != part.identity else f"{part.identity:.1%}"
        megabytes = f"{part.bytes / 1e6:.1f}"
        table.add_row(split, str(part.scenes), str(part.texts), str(part.regions), megabytes, identity)
    console.print(table)
    console.print(
        f"{report.things} things, vocabulary {report.vocabulary}, {report.bytes / 1e6:.1f} MB, {report.seconds:.0f} s. "
        "identity: objects whose nearest training centroid is their thing's."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    console = Console()
    with one_line_errors("build_demo"):
        parsed = parse(arguments)
        options, out = options_from(parsed)
        show(build_into(options, out, parsed.workers, parsed.overwrite, console), out, console)


if __name__ == "__main__":
    main()
