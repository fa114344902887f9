"""Command line of ``build_retrieval``: its options, which of them go together, and the embeddings that they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.options import fraction, number
from data_tools.retrieval.detected import CLASS_OPTIONS, Detections, add_classes
from data_tools.rewriting.building import refuse_useless
from vlscale.errors import VlscaleError

_MOST = 1 << 16
_ROWS = 1 << 16
_OF_CLASSES = ("--overlap-of", "--fill", "--pool", *CLASS_OPTIONS)
_OF_IMAGES = ("--images", "--overlap", *_OF_CLASSES)
_OF_EMBEDDINGS = ("--text-embeddings", "--caption-embeddings")
_OF_TEXTS = ("--texts", "--postings", *_OF_EMBEDDINGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
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


def check_command(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Refuse options that contradict each other or have no effect.

    Raises:
        VlscaleError: there are some.
    """
    if options.no_images and options.no_texts:
        raise VlscaleError("--no-images --no-texts: nothing would be retrieved; leave one out")
    if options.no_images:
        refuse_useless(arguments, _OF_IMAGES, "with --no-images")
    elif not options.overlap:
        refuse_useless(arguments, _OF_CLASSES, "with --overlap 0, where classes do not count")
    if options.no_texts:
        refuse_useless(arguments, _OF_TEXTS, "with --no-texts")
    if (options.text_embeddings is None) != (options.caption_embeddings is None):
        raise VlscaleError("--text-embeddings and --caption-embeddings belong together; give both or neither")
    if options.text_embeddings is not None:
        refuse_useless(arguments, ("--postings",), "with --text-embeddings, which replace TF-IDF")
    elif options.no_images:
        refuse_useless(arguments, ("--index", "--probes"), "with --no-images and without --text-embeddings")
    if options.index == "flat":
        refuse_useless(arguments, ("--probes",), "with --index flat, which searches everything")


def classes_of(root: Path, options: argparse.Namespace) -> Detections:
    """Where the options say that the classes of a dataset's images are."""
    return Detections(root, options.classes_from, options.class_probability)


def check_embeddings(options: argparse.Namespace, texts: int | None, captions: int) -> None:
    """Look at the embeddings before anything is built; which costs reading them.

    Args:
        options: of the command line.
        texts: rows of the text collection; None without one.
        captions: rows of the pairs' texts.

    Raises:
        VlscaleError: see :func:`read_embeddings`; or they are of different widths.
    """
    if options.text_embeddings is None or texts is None:
        return
    one, other = read_embeddings(options.text_embeddings, texts), read_embeddings(options.caption_embeddings, captions)
    if one.shape[1] != other.shape[1]:
        raise VlscaleError(
            f"{options.caption_embeddings}: embeddings of width {other.shape[1]}, but {options.text_embeddings} has "
            f"{one.shape[1]}; make both with one model"
        )
    require_finite(options.text_embeddings, one)
    if options.caption_embeddings != options.text_embeddings:
        require_finite(options.caption_embeddings, other)


def read_embeddings(path: Path, rows: int) -> NDArray[Any]:
    """Memory-map embeddings, float16 or float32 [rows, E].

    Raises:
        VlscaleError: the file is damaged, or of another shape or dtype.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlscaleError(f"{path}: not a plain .npy array ({' '.join(str(error).split())[:200]})") from None
    good = isinstance(found, np.ndarray) and found.ndim == 2 and found.dtype in (np.float16, np.float32)
    if not good or found.shape[0] != rows or not found.shape[1]:
        shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        raise VlscaleError(f"{path}: found {shape}, expected float16 or float32 [{rows}, E], a row per text")
    return np.asarray(found)


def require_finite(path: Path, embeddings: NDArray[Any]) -> None:
    """Raise if a row of ``embeddings`` [n, E] has NaN or infinity.

    Raises:
        VlscaleError: one has; it is named.
    """
    for begin in range(0, len(embeddings), _ROWS):
        bad = ~np.isfinite(embeddings[begin : begin + _ROWS]).all(1)
        if bad.any():
            raise VlscaleError(f"{path}: row {begin + int(np.argmax(bad))} has NaN or infinity; leave none")
