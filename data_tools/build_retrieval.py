"""Retrieve images and texts that are like those of each pair: ``python -m data_tools.build_retrieval ROOT``.

Writes ``ROOT/retrieved`` beside ``ROOT/texts``; UNIMO contrasts pairs with what it names. See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import vlscale
from data_tools.build import build_parts
from data_tools.fingerprint import describe_options, describe_path
from data_tools.merge import clean, refuse_existing, require_complete
from data_tools.options import run_of
from data_tools.parts import Run, Work
from data_tools.report import folder_bytes, sum_up
from data_tools.retrieval.command import add_arguments, check_command, check_embeddings, classes_of, read_embeddings
from data_tools.retrieval.detected import OBJECTS, Detected
from data_tools.retrieval.gathering import (
    CollectionBuilder,
    Gathering,
    collection_parts,
    put_together,
)
from data_tools.retrieval.searching import RetrievalBuilder, Search
from data_tools.rewriting.building import (
    PART_ROWS,
    REMOVE,
    build_beside,
    open_texts,
    parse_command,
    publish_folder,
    refuse_useless,
)
from data_tools.rewriting.stores import merge_companion
from vlscale.data.companion_base import read_companion_meta
from vlscale.data.companion_schema import RETRIEVED_COLUMNS, Collection, RetrievedMeta
from vlscale.errors import VlscaleError, one_line_errors

_STORES = ("images", "classes")
_GATHERED = (
    "images",
    "no_images",
    "classes_from",
    "class_probability",
    "texts",
    "no_texts",
    "text_embeddings",
    "index",
)
"""Options that decide what is gathered. The others may change afterwards: only the search begins again."""

_NOTHING = (
    "NOT ONE candidate was found: no {} were retrieved for any text. Do the collection and the pairs have the classes, "
    "words or embeddings that the options compare?"
)


def _gathering(options: argparse.Namespace, arguments: Sequence[str]) -> Gathering:
    """Open everything, so that a mistake ends the command before hours of work."""
    images = queries = None
    if not options.no_images:
        own, images = classes_of(options.out, options), classes_of(options.images or options.out, options)
        queries = None if same_folder(images.root, own.root) else own
        _check_images(images.open(), own.open(), options.overlap)
        if not (images.open().in_classes or own.open().in_classes):
            refuse_useless(arguments, ("--class-probability",), "where no classes come from classes/")
    texts = None if options.no_texts else options.texts or options.out
    return Gathering(images, queries, texts, options.text_embeddings is None)


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same folder."""
    return one.resolve() == other.resolve()


def _check_images(theirs: Detected, mine: Detected, overlap: float) -> None:
    if not len(theirs.images):
        raise VlscaleError(f"{theirs.images.folder}: has no images; name another dataset, or give --no-images")
    widths = theirs.images.meta.feature_dim, mine.images.meta.feature_dim
    if widths[0] != widths[1]:
        raise VlscaleError(
            f"{theirs.images.folder}: features of width {widths[0]}, but {mine.images.folder} has {widths[1]}; both "
            f"need features of one detector, or give --no-images"
        )
    for found in (theirs, mine):
        if overlap and not found.known:
            raise VlscaleError(
                f"{found.images.folder}: no detected classes are known (no extra.{OBJECTS}, no classes/); name "
                f"another field with --classes-from, or give --overlap 0"
            )
    if overlap:
        theirs.require_comparable(mine)


def _classes_told(gathering: Gathering, overlap: float) -> dict[str, str]:
    """Where classes come from, for the report."""
    if gathering.images is None or not overlap:
        return {}
    told = {"classes": gathering.images.open().source}
    return told if gathering.queries is None else {**told, "classes of the pairs": gathering.queries.open().source}


def _search(options: argparse.Namespace, gathering: Gathering) -> Search:
    images = texts = None
    if gathering.images is not None:
        store = gathering.images.open().images
        images = Collection(digest=store.reader.index.digest, rows=len(store))
    if gathering.texts is not None:
        found = open_texts(gathering.texts)
        texts = Collection(digest=found.reader.index.digest, rows=len(found))
    return Search(
        options.k, options.overlap, options.overlap_of == "share", options.fill, options.pool, options.postings,
        options.probes, options.caption_embeddings, images, texts,
    )  # fmt: skip


def _sources(gathering: Gathering) -> list[Path]:
    """Files that tell the contents of the datasets."""
    folders = [where.root / name for where in (gathering.images, gathering.queries) if where for name in _STORES]
    if gathering.texts is not None:
        folders.append(gathering.texts / "texts")
    return [folder / "index.json" for folder in folders if (folder / "index.json").exists()]


def gather(
    options: argparse.Namespace, work: Work, run: Run, gathering: Gathering, console: Console
) -> dict[str, int] | None:
    """The first stage: put everything that is searched into ``work.merged``.

    Returns:
        What is to be told of it; None if other shares have still something to gather.
    """
    parts = collection_parts(gathering, PART_ROWS)
    sources = [describe_path(path) for path in _sources(gathering)]
    chosen = describe_options(argparse.Namespace(**{name: getattr(options, name) for name in _GATHERED}))
    work.begin({"vlscale": vlscale.__version__, "build": chosen, "from": sources, "parts": parts})
    build_parts(work, parts, run, CollectionBuilder(gathering), console)
    if run.shard is not None and any(work.result(place) is None for place in range(len(parts))):
        return None
    results = require_complete(work, len(parts))
    embeddings = None
    if options.text_embeddings is not None and gathering.texts is not None:
        embeddings = read_embeddings(options.text_embeddings, len(open_texts(gathering.texts)))
    publish_folder(work, lambda folder: put_together(work, parts, options.index, embeddings, folder), console)
    for place in range(len(parts)):  # of mean features alone as much again as what was made of them
        for array in work.part(place).glob("*.npy"):
            array.unlink(missing_ok=True)
    told: dict[str, int] = sum_up(results)["told"]
    return told


def fill_retrieved(
    work: Work, results: list[dict[str, Any]], folder: Path, gathered: Mapping[str, int], told_first: Mapping[str, str]
) -> dict[str, Any]:
    """Put ``retrieved`` together; ``told_first`` begins the report."""
    parts = [work.part(place) / "retrieved" for place in range(len(results))]
    merge_companion("retrieved", RETRIEVED_COLUMNS, parts, folder / "retrieved")
    found = sum_up(results)
    told = {**found["told"], **{name: count for name, count in gathered.items() if count}}
    report = {"rows": found["rows"], **told_first, "told": told, "bytes_retrieved": folder_bytes(folder / "retrieved")}
    meta = read_companion_meta(RetrievedMeta, folder / "retrieved")
    asked = {"images": meta.image_collection, "texts": meta.text_collection}
    empty = [kind for kind, collection in asked.items() if collection and not told.get(f"{kind}: candidates")]
    if empty:
        report["warning"] = _NOTHING.format(" and no ".join(empty))
    return report


def _refuse_built(root: Path, first: Work, second: Work) -> None:
    """Raise if ``retrieved`` stands there; a run that was killed when it was complete may have left its first stage."""
    target = root / "retrieved"
    if second.merged.exists() or not os.path.lexists(target):
        return
    if second.recorded() is None:
        clean(first)
    refuse_existing(target, REMOVE)


def run(arguments: Sequence[str], console: Console | None = None) -> dict[str, Any] | None:
    """Retrieve what the command line says and return the report; None if there is still something to build.

    Raises:
        VlscaleError: see :func:`data_tools.rewriting.building.build_beside`; stores that are missing, or whose
            features, classes or embeddings do not fit each other; options that contradict each other or change nothing.
    """
    options = parse_command("build_retrieval", "Retrieve images and texts for pairs.", arguments, add_arguments)
    check_command(options, arguments)
    console = console or Console(stderr=True)
    root: Path = options.out
    first = Work(root, "collections")
    _refuse_built(root, first, Work(root, "retrieved"))
    rows, gathering = len(open_texts(root)), _gathering(options, arguments)
    search = _search(options, gathering)
    if not options.merge:
        check_embeddings(options, search.texts.rows if search.texts else None, rows)
    for name in ("images", "texts"):  # their indexes tell what they hold; the folders may get other stores meanwhile
        setattr(options, name, "another dataset" if getattr(options, name) else None)
    gathered = gather(options, first, run_of(options), gathering, console)
    if gathered is None:
        console.print("other shares gather still; give the command again when every share has ended, then --merge")
        return None
    fill = partial(fill_retrieved, gathered=gathered, told_first=_classes_told(gathering, options.overlap))
    builder = RetrievalBuilder(root, first.merged, search)
    report = build_beside("retrieved", options, builder, fill, _sources(gathering), console)
    if report is not None:
        clean(first)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("build_retrieval"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
