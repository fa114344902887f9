"""Retrieve images and texts that are like those of each pair: ``python -m data_tools.build_retrieval ROOT``.

Writes ``ROOT/retrieved`` beside ``ROOT/texts``; UNIMO contrasts pairs with what it names. See ``data_tools/README.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import vlscale
from data_tools.build import build_parts
from data_tools.fingerprint import describe_options, describe_path
from data_tools.merge import clean, refuse_existing, require_complete
from data_tools.options import fraction, number, run_of
from data_tools.parts import Run, Work
from data_tools.report import folder_bytes, sum_up
from data_tools.retrieval.detected import Detections, add_classes
from data_tools.retrieval.gathering import (
    CollectionBuilder,
    Gathering,
    collection_parts,
    put_together,
)
from data_tools.retrieval.searching import RetrievalBuilder, Search
from data_tools.rewriting.building import PART_ROWS, build_beside, open_texts, parse_command, publish_folder
from data_tools.rewriting.stores import merge_companion
from vlscale.data.companion_schema import RETRIEVED_COLUMNS, Collection
from vlscale.errors import VlscaleError, one_line_errors

_MOST = 1 << 16
_STORES = ("images", "classes")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-k", type=number(1, _MOST), default=100, metavar="N", help="candidates per text (default 100)")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--images", type=Path, metavar="ROOT", help="retrieve images of this dataset (default: its own)"
    )
    images.add_argument("--no-images", action="store_true", help="retrieve no images")
    images.add_argument(
        "--overlap", type=fraction, default=0.5, metavar="X",
        help="least overlap of detected classes (default 0.5); 0: rank by features alone",
    )  # fmt: skip
    images.add_argument(
        "--overlap-of", choices=("jaccard", "share"), default="jaccard",
        help="common classes among those of both images (default), or among the pair's",
    )  # fmt: skip
    images.add_argument("--fill", action="store_true", help="fill lists up with similar images of other classes")
    images.add_argument(
        "--pool", type=number(1, _MOST), default=1000, metavar="N",
        help="most similar images among which overlapping ones are looked for (default 1000)",
    )  # fmt: skip
    add_classes(images)
    _add_texts(parser.add_argument_group("texts"))
    vectors = parser.add_argument_group("index of features and embeddings")
    vectors.add_argument(
        "--index", choices=("auto", "flat", "ivf"), default="auto",
        help="flat: exact; ivf: an inverted file; auto: flat up to 100,000 (default)",
    )  # fmt: skip
    vectors.add_argument(
        "--probes", type=number(1, _MOST), default=32, metavar="N", help="lists searched with ivf (default 32)"
    )


def _add_texts(group: Any) -> None:
    group.add_argument("--texts", type=Path, metavar="ROOT", help="retrieve texts of this dataset (default: its own)")
    group.add_argument("--no-texts", action="store_true", help="retrieve no texts")
    group.add_argument(
        "--text-embeddings", type=Path, metavar="FILE", help=".npy, a row per text of the collection (default: TF-IDF)"
    )
    group.add_argument("--caption-embeddings", type=Path, metavar="FILE", help=".npy, a row per text of ROOT")
    group.add_argument(
        "--postings", type=number(1, 1 << 31), default=5000, metavar="N",
        help="texts looked at per word with TF-IDF (default 5000)",
    )  # fmt: skip


def _gathering(options: argparse.Namespace) -> Gathering:
    """Open everything, so that a mistake ends the command before hours of work."""
    if options.no_images and options.no_texts:
        raise VlscaleError("--no-images --no-texts: nothing would be retrieved; leave one out")
    if (options.text_embeddings is None) != (options.caption_embeddings is None):
        raise VlscaleError("--text-embeddings and --caption-embeddings belong together; give both or neither")
    images = queries = None
    if not options.no_images:
        own = Detections(options.out, options.classes_from, options.class_probability)
        images = Detections(options.images or options.out, options.classes_from, options.class_probability)
        queries = None if same_folder(images.root, own.root) else own
        _check_images(images, own, options.overlap)
    texts = None if options.no_texts else options.texts or options.out
    return Gathering(images, queries, texts, options.text_embeddings is None)


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same folder."""
    return one.resolve() == other.resolve()


def _check_images(collection: Detections, own: Detections, overlap: float) -> None:
    theirs, mine = collection.open(), own.open()
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
                f"{found.images.folder}: no detected classes are known (no extra.{own.field}, no classes/); name "
                f"another field with --classes-from, or give --overlap 0"
            )


def read_embeddings(path: Path | None, rows: int) -> NDArray[Any] | None:
    """Memory-map embeddings, float16 or float32 [rows, E].

    Raises:
        VlscaleError: the file is damaged, of another shape or dtype, or has NaN or infinity.
    """
    if path is None:
        return None
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlscaleError(f"{path}: not a plain .npy array ({' '.join(str(error).split())[:200]})") from None
    good = isinstance(found, np.ndarray) and found.ndim == 2 and found.dtype in (np.float16, np.float32)
    if not good or found.shape[0] != rows or not found.shape[1]:
        shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise VlscaleError(f"{path}: found {shape}, expected float16 or float32 [{rows}, E], a row per text")
    for begin in range(0, rows, 1 << 16):
        bad = ~np.isfinite(found[begin : begin + (1 << 16)]).all(1)
        if bad.any():
            raise VlscaleError(f"{path}: row {begin + int(np.argmax(bad))} has NaN or infinity; leave none")
    return found


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
    work.begin({"vlscale": vlscale.__version__, "build": describe_options(options), "from": sources, "parts": parts})
    build_parts(work, parts, run, CollectionBuilder(gathering), console)
    if run.shard is not None and any(work.result(place) is None for place in range(len(parts))):
        return None
    results = require_complete(work, len(parts))
    rows = 0 if gathering.texts is None else len(open_texts(gathering.texts))
    embeddings = read_embeddings(options.text_embeddings, rows)
    publish_folder(work, lambda folder: put_together(work, parts, options.index, embeddings, folder))
    told: dict[str, int] = sum_up(results)["told"]
    return told


def fill_retrieved(
    work: Work, results: list[dict[str, Any]], folder: Path, gathered: Mapping[str, int]
) -> dict[str, Any]:
    """Put ``retrieved`` together."""
    parts = [work.part(place) / "retrieved" for place in range(len(results))]
    merge_companion("retrieved", RETRIEVED_COLUMNS, parts, folder / "retrieved")
    found = sum_up(results)
    told = {**found["told"], **{name: count for name, count in gathered.items() if count}}
    return {"rows": found["rows"], "told": told, "bytes_retrieved": folder_bytes(folder / "retrieved")}


def run(arguments: Sequence[str], console: Console | None = None) -> dict[str, Any] | None:
    """Retrieve what the command line says and return the report; None if there is still something to build.

    Raises:
        VlscaleError: see :func:`data_tools.rewriting.building.build_beside`; stores that are missing, or whose
            features or embeddings do not fit each other.
    """
    options = parse_command("build_retrieval", "Retrieve images and texts for pairs.", arguments, _add_arguments)
    console = console or Console(stderr=True)
    root: Path = options.out
    if not Work(root, "retrieved").merged.exists():
        refuse_existing(root / "retrieved")
    rows, gathering = len(open_texts(root)), _gathering(options)
    read_embeddings(options.caption_embeddings, rows)
    search = _search(options, gathering)
    for name in ("images", "texts"):  # their indexes tell what they hold; the folders may get other stores meanwhile
        setattr(options, name, "another dataset" if getattr(options, name) else None)
    first = Work(root, "collections")
    gathered = gather(options, first, run_of(options), gathering, console)
    if gathered is None:
        console.print("other shares gather still; give the command again when every share has ended, then --merge")
        return None
    fill = partial(fill_retrieved, gathered=gathered)
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
