"""Texts of UNIMO's files: COCO caption parts, SNLI-VE files, Flickr captions, object tags (plain or ``.gz``).

The rows hold token ids and no words, so the store's texts are empty and the tokenizer must be the one of the files.
``[CLS]`` at the beginning and ``[SEP]`` at the end are taken off, because the store has texts without them. A row
without token ids is an image without a text, and is passed over. ``extra`` gets ``label`` (SNLI-VE: 0 to 2), or
``kind: tags``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, integers, whole_number, word
from data_tools.formats.lines import PART_BYTES, Line, line_parts, read_lines
from data_tools.formats.unimo_rows import Kind, add_kind_arguments, find_kind, source_paths, unimo_fields
from data_tools.options import number
from data_tools.records import BadRow, TextRecord

KIND = "texts"
HELP = "UNIMO texts, tokenized already: COCO caption parts, SNLI-VE, Flickr captions, object tags"

_WITH_TEXTS = ("coco", "snli_ve", "flickr_captions", "object_tags")
_NAMED_BY = {"coco": "caption_id", "snli_ve": "data_id", "flickr_captions": "sent_id"}
_MAX_TOKENS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    add_kind_arguments(parser, _WITH_TEXTS)
    parser.add_argument(
        "--cls-id",
        type=number(0, (1 << 24) - 1),
        metavar="ID",
        default=0,
        help="id of the token before each text (default 0, UNIMO's)",
    )
    parser.add_argument(
        "--sep-id",
        type=number(0, (1 << 24) - 1),
        metavar="ID",
        default=2,
        help="id of the token after each text (default 2, UNIMO's)",
    )


def open_source(options: argparse.Namespace) -> UnimoTexts:
    """Open the files of ``options.sources``."""
    paths = source_paths(options)
    kind = find_kind(paths, options.kind, _WITH_TEXTS)
    return UnimoTexts(paths, kind, options.cls_id, options.sep_id)


class UnimoTexts:
    """See the module.

    Args:
        paths: the files.
        kind: of their rows.
        cls_id, sep_id: tokens to take off.
        part_bytes: see :func:`data_tools.formats.lines.line_parts`.
    """

    paired = True

    def __init__(
        self, paths: Sequence[Path], kind: Kind, cls_id: int = 0, sep_id: int = 2, part_bytes: int = PART_BYTES
    ) -> None:
        self.paths = list(paths)
        self.kind = kind
        self.part_bytes = part_bytes
        self._cls, self._sep = cls_id, sep_id

    def parts(self) -> list[dict[str, Any]]:
        """See :class:`data_tools.records.TextSource`."""
        return line_parts(self.paths, self.part_bytes)

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """See :class:`data_tools.records.TextSource`."""
        for line in read_lines(self.paths, part):
            if isinstance(line, BadRow):
                yield line
                continue
            try:
                record = self._record(line)
            except FieldError as error:
                yield error.at(line.where)
                continue
            if record is not None:
                yield record

    def _record(self, line: Line) -> TextRecord | None:
        fields = unimo_fields(self.kind, line)
        if not fields["token_ids"].strip():
            return None
        image = word("image_id", fields["image_id"])
        ids = self._bare(self._ids(fields))
        extra: dict[str, Any] = {}
        if self.kind.name == "object_tags":
            name, extra["kind"] = f"{image}-tags", "tags"
        else:
            field = _NAMED_BY[self.kind.name]
            name = word(field, fields[field])
        if self.kind.name == "snli_ve":
            extra["label"] = whole_number("label", fields["label"], 0, 2)
        return TextRecord(line.where, name, "", (image,), ids, extra)

    @staticmethod
    def _ids(fields: Mapping[str, bytes]) -> list[int]:
        """Token ids; the lists beside them must be as long."""
        ids = integers("token_ids", fields["token_ids"], _MAX_TOKENS)
        for name in ("sent_ids", "pos_ids"):
            count = len(integers(name, fields[name], _MAX_TOKENS))
            if count != len(ids):
                raise FieldError(name, f"has {count} numbers for {len(ids)} token_ids")
        return ids

    def _bare(self, ids: list[int]) -> list[int]:
        if ids[:1] == [self._cls]:
            ids = ids[1:]
        if ids[-1:] == [self._sep]:
            ids = ids[:-1]
        if not ids:
            raise FieldError("token_ids", "has nothing between its first and its last token")
        return ids
