"""Building a store beside ``texts``: row ranges as parts, side by side, and put together like an import."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import vlscale
from data_tools.build import build_parts
from data_tools.fingerprint import describe_options, describe_path
from data_tools.merge import publish, refuse_existing, require_complete
from data_tools.options import OneLineParser, add_share, run_of
from data_tools.parts import PartBuilder, Run, Work
from data_tools.report import show_report, write_report
from vlscale.data.store import TextStore
from vlscale.errors import VlscaleError

REMOVE = "remove it to build it again"
"""The cure where a store stands there already; these tools have no ``--out``."""

PART_ROWS = 5_000
CHUNK_ROWS = 512
_COLLECT_AFTER = 1_000_000


def parse_command(
    tool: str, summary: str, arguments: Sequence[str], add_own: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """Read a command line ``ROOT [options]``; the folder is ``out``, as in the import tools.

    Raises:
        VlscaleError: the command line is wrong.
    """
    parser = OneLineParser(prog=f"python -m data_tools.{tool}", description=summary, allow_abbrev=False)
    parser.add_argument("out", type=Path, metavar="ROOT", help="the dataset's folder, which holds texts/")
    add_own(parser)
    add_share(parser)
    return parser.parse_args(arguments)


def refuse_useless(arguments: Sequence[str], names: Sequence[str], because: str) -> None:
    """Refuse options of a command line that would change nothing.

    Args:
        arguments: the command line.
        names: options, such as ``--pool``.
        because: why not, after the option's name: ``has no effect BECAUSE``.

    Raises:
        VlscaleError: one of them is given.
    """
    for name in names:
        if any(one == name or one.startswith(f"{name}=") for one in arguments):
            raise VlscaleError(f"{name} has no effect {because}; leave it out")


def open_texts(root: Path) -> TextStore:
    """Open ``ROOT/texts``.

    Raises:
        VlscaleError: it is missing, damaged or empty.
    """
    if not (root / "texts").is_dir():
        raise VlscaleError(f"{root / 'texts'}: is missing; import texts into {root} first, or name another folder")
    texts = TextStore(root / "texts")
    if not len(texts):
        raise VlscaleError(f"{root / 'texts'}: has no texts; there is nothing to do")
    return texts


def parts_of(rows: int) -> list[dict[str, Any]]:
    """Row ranges."""
    return [{"begin": begin, "end": min(begin + PART_ROWS, rows)} for begin in range(0, rows, PART_ROWS)]


def chunks(part: Mapping[str, Any]) -> Iterator[range]:
    """Rows of a part, some at a time."""
    for begin in range(part["begin"], part["end"], CHUNK_ROWS):
        yield range(begin, min(begin + CHUNK_ROWS, part["end"]))


def build_beside(
    kind: str,
    options: argparse.Namespace,
    builder: PartBuilder,
    fill: Callable[[Work, list[dict[str, Any]], Path], dict[str, Any]],
    others: Sequence[Path] = (),
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Build ``ROOT/KIND``, or a share of it.

    A run that was killed is continued by an equal command; the bytes do not depend on kills, shares or processes.

    Args:
        kind: name of the store, which ``builder`` writes into each part's folder.
        options: from :func:`parse_command`.
        builder: builds parts of :func:`parts_of`.
        fill: puts the store together from the parts' results, in an empty folder, and returns the report.
        others: files that the result depends on besides the texts; a change is refused.
        console: for progress and the report; default stderr.

    Returns:
        The report; None if there is still something to build or to merge.

    Raises:
        VlscaleError: the store exists, or the build was begun otherwise.
    """
    console, run = console or Console(stderr=True), run_of(options)
    work = Work(run.root, kind)
    if not work.merged.exists():
        refuse_existing(run.root / kind, REMOVE)
    parts = parts_of(len(open_texts(run.root)))
    sources = [describe_path(path) for path in (run.root / "texts" / "index.json", *others)]
    work.begin({"vlscale": vlscale.__version__, "build": describe_options(options), "from": sources, "parts": parts})
    if not work.merged.exists():
        with work.lock("merge", exclusive=False):
            build_parts(work, parts, run, builder, console)
    if run.shard is not None:
        console.print(f"share {run.shard[0]}/{run.shard[1]} of {kind} is built; give --merge when all shares are")
        return None
    return _merge(work, len(parts), run, fill, console)


def _merge(
    work: Work,
    parts: int,
    run: Run,
    fill: Callable[[Work, list[dict[str, Any]], Path], dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    def put_together(folder: Path) -> None:
        write_report(folder, work.kind, fill(work, require_complete(work, parts), folder))

    with work.lock("merge"):
        publish(work, put_together)
    show_report(run.root, work.kind, console, "written into")
    report: dict[str, Any] = json.loads((run.root / f"report-{work.kind}.json").read_bytes())
    return report


def publish_folder(work: Work, fill: Callable[[Path], None], console: Console) -> None:
    """Fill ``work.merged``, unless that is done; it appears when it is complete. Where another process does it, wait.

    Raises:
        VlscaleError: it cannot be written.
    """

    def tell() -> None:
        console.print(f"another process puts the {work.kind} together; waiting until it has ended")

    with work.lock("merge", waiting=tell):
        if work.merged.exists():
            return
        temporary = work.folder / f".{work.kind}-merged.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            fill(temporary)
            os.rename(temporary, work.merged)
        except OSError as error:
            raise VlscaleError(f"{work.merged}: cannot be written ({error})") from None


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look for unreachable cycles seldom: there are few, and among remembered captions the search is a third of all."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Neighbourhood:
    """Which texts share an image; some 16 bytes per text and image in each process.

    Args:
        texts: the texts.
    """

    def __init__(self, texts: TextStore) -> None:
        self._refs, self._ptr = texts.image_refs, texts.image_ptr
        owners = np.repeat(np.arange(len(texts)), np.diff(self._ptr))
        order = np.argsort(self._refs, kind="stable")
        self._rows: NDArray[np.int64] = owners[order]
        self._images: NDArray[np.int64] = self._refs[order]

    def images_of(self, row: int) -> tuple[int, ...]:
        """Rows of the images that a text refers to."""
        return tuple(int(image) for image in self._refs[self._ptr[row] : self._ptr[row + 1]])

    def texts_of(self, images: Sequence[int]) -> list[int]:
        """Rows of the texts that refer to one of these images."""
        found: set[int] = set()
        for image in images:
            begin, end = np.searchsorted(self._images, [image, image + 1])
            found.update(self._rows[begin:end].tolist())
        return sorted(found)
