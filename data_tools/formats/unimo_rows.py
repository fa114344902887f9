"""The rows of UNIMO's files: how the kinds are told apart, and what their columns are called."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.formats.arrays import FieldError, word
from data_tools.formats.delimited import named
from data_tools.formats.lines import Line, read_lines
from data_tools.records import BadRow
from vlscale.errors import VlscaleError


@dataclass(frozen=True)
class Kind:
    """One of UNIMO's kinds of rows.

    Attributes:
        name: as ``--kind`` says it.
        separator: between the fields.
        columns: their names, ``_`` for those that are ignored.
        size_order: which of the columns named image_w and image_h is first.
        repeats: an image stands in several rows, with the same features.
    """

    name: str
    separator: bytes
    columns: tuple[str, ...]
    size_order: str = "wh"
    repeats: bool = False


_TEXT = ("token_ids", "sent_ids", "pos_ids")
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "coco",
            b";",
            (
                *("image_id", "caption_id", *_TEXT, "seg_labels", "_", "_", "image_h", "image_w", "num_boxes"),
                *("boxes", "probs", "_", "image_embeddings", "label"),
            ),
            "hw",
            True,
        ),
        Kind(
            "snli_ve",
            b";",
            (
                *("image_id", "data_id", "label", *_TEXT, "_", "image_w", "image_h", "num_boxes"),
                *("boxes", "image_embeddings", "_", "_"),
            ),
            repeats=True,
        ),
        Kind(
            "flickr",
            b"\t",
            ("image_id", "image_w", "image_h", "num_boxes", "boxes", "image_embeddings", "probs"),
        ),
        Kind("flickr_captions", b";", (*_TEXT, "image_id", "sent_id")),
        Kind("object_tags", b";", ("image_id", *_TEXT)),
    )
}
"""The kinds by name; all have different numbers of fields."""
COCO_PREFIX = 9
"""Characters that UNIMO's readers drop at the beginning of an image id in the COCO caption parts."""


def add_kind_arguments(parser: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    """Add ``--kind`` and ``--filelist``."""
    parser.add_argument("--kind", choices=kinds, help="kind of rows (default: by the number of fields of the first)")
    parser.add_argument(
        "--filelist", action="store_true", help="the sources are lists of files, one a line, beside which the files lie"
    )


def source_paths(options: argparse.Namespace) -> list[Path]:
    """Return the files that the options name, those of lists in their order.

    Raises:
        VlscaleError: a list cannot be read, or names a file outside its own folder.
    """
    if not options.filelist:
        return list(options.sources)
    paths: list[Path] = []
    for listing in options.sources:
        for line in read_lines([listing], {"file": 0, "begin": 0, "end": None}, max_line=4096):
            try:
                if isinstance(line, BadRow):
                    raise VlscaleError(str(line))
                name = word("file name", line.data)
            except FieldError as error:
                raise VlscaleError(str(error.at(line.where))) from None
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise VlscaleError(f"{line.where}: {name!r} leaves the list's folder; name the files themselves")
            paths.append(listing.parent / name)
    return paths


def find_kind(paths: Sequence[Path], chosen: str | None, allowed: Sequence[str]) -> Kind:
    """Return the kind that was chosen, or that the first row has.

    Raises:
        VlscaleError: no kind has rows like the first.
    """
    if chosen is not None:
        return KINDS[chosen]
    for line in read_lines(paths, {"file": 0, "begin": 0, "end": None}):
        if isinstance(line, BadRow):
            raise VlscaleError(str(line))
        for name in allowed:
            if line.data.count(KINDS[name].separator) == len(KINDS[name].columns) - 1:
                return KINDS[name]
        raise VlscaleError(f"{line.where}: no kind of UNIMO file has such fields; choose one with --kind")
    raise VlscaleError(f"{paths[0]}: has no rows")


def unimo_fields(kind: Kind, line: Line) -> dict[str, bytes]:
    """Split a row; ``image_id`` is without the prefix that UNIMO drops."""
    fields = named(line, kind.separator, kind.columns)
    fields["image_id"] = image_name(kind, fields["image_id"])
    return fields


def image_name(kind: Kind, spelled: bytes) -> bytes:
    """Return an image's id without the prefix that UNIMO drops."""
    if kind.name != "coco":
        return spelled
    if len(spelled) <= COCO_PREFIX:
        raise FieldError("image_id", f"{spelled!r} has no more than the {COCO_PREFIX} characters that UNIMO drops")
    return spelled[COCO_PREFIX:]
