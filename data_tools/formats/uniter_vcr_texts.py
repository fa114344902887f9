"""UNITER's text databases of VCR, as its second stage of pre-training reads them: texts of two or three segments.

Of each record (see :mod:`data_tools.formats.uniter_texts`) come up to two texts, with the correct choices:

* ``KEY-qa``: question [SEP] answer
* ``KEY-qar``: question [SEP] answer [SEP] rationale

Types are 0 for the question, 2 for the answer, 3 for the rationale; a [SEP] has the type of the segment before it (in
fine-tuning, of the one behind it). Type 1 is that of regions. A text refers to one image, which
:mod:`data_tools.formats.uniter_vcr_images` joins of ground-truth and detected boxes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_tools.formats.arrays import FieldError, show, whole_number
from data_tools.formats.uniter_texts import UniterTexts, read_object
from data_tools.formats.uniter_vcr_images import joined_id
from data_tools.records import BadRow, TextRecord
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError

KIND = "texts"
HELP = "UNITER's text LMDBs of VCR, for its second stage of pre-training (uniter_texts keeps them as they are)"

QUESTION, ANSWER, RATIONALE = 0, 2, 3
ROWS = {"both": ("qa", "qar"), "qa": ("qa",), "qar": ("qar",)}
_MOST_CHOICES = 16
_MOST_ID = (1 << 24) - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this format's options."""
    parser.add_argument(
        "--rows",
        choices=tuple(ROWS),
        default="both",
        help="qa: question and answer; qar: with the rationale, all that UNITER's code trains on; default: both",
    )


def open_source(options: argparse.Namespace) -> VcrTexts:
    """Open the databases of ``options.sources``: folders with ``data.mdb`` and ``meta.json``."""
    return VcrTexts(UniterTexts(tuple(options.sources)), ROWS[options.rows])


@dataclass(frozen=True)
class VcrTexts:
    """See the module.

    Attributes:
        texts: the databases, read as they are.
        rows: which texts are made of a record: ``qa``, ``qar``.
        num_types: see :class:`~data_tools.records.HasTypes`.
    """

    texts: UniterTexts
    rows: tuple[str, ...] = ROWS["both"]
    num_types: int = RATIONALE + 1

    paired = True

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See :meth:`data_tools.formats.uniter_texts.UniterTexts.check_vocabulary`.

        Raises:
            VlscaleError: the vocabularies differ.
        """
        self.texts.check_vocabulary(vocabulary)

    def parts(self) -> list[dict[str, Any]]:
        """Ranges of keys."""
        return self.texts.parts()

    def read(self, part: Mapping[str, Any]) -> Iterator[TextRecord | BadRow]:
        """Yield the texts of a range, in the order of the keys; all texts of a record or none."""
        sep = self._sep(self.texts.folders[part["folder"]])
        for record in self.texts.read(part):
            if isinstance(record, BadRow):
                yield record
                continue
            try:
                yield from [self._text(record, row, sep) for row in self.rows]
            except FieldError as error:
                yield error.at(record.where)

    def _text(self, record: TextRecord, row: str, sep: int) -> TextRecord:
        if len(record.images) != 2:
            raise FieldError("img_fname", f"{show(record.images)} are not the files of ground-truth and detected boxes")
        question = list(record.input_ids or ())
        if not question:
            raise FieldError("input_ids", "the question has no word pieces")
        ids, types = [*question, sep], [QUESTION] * (len(question) + 1)
        answer = _choice(record.extra, "input_ids_as", "qa_target")
        ids, types = [*ids, *answer], [*types, *[ANSWER] * len(answer)]
        if row == "qar":
            rationale = _choice(record.extra, "input_ids_rs", "qar_target")
            ids, types = [*ids, sep, *rationale], [*types, ANSWER, *[RATIONALE] * len(rationale)]
        extra = {"example": record.id, "row": row}
        name = f"{record.id}-{row}"
        return TextRecord(record.where, name, record.text, (joined_id(*record.images),), ids, extra, types)

    def _sep(self, folder: Path) -> int:
        path = folder / "meta.json"
        if path not in self._known:
            try:
                self._known[path] = whole_number("SEP", read_object(path).get("SEP"), 0, _MOST_ID)
            except FieldError as error:
                raise VlscaleError(f"{path}: {error}; restore the database's side files") from None
        return self._known[path]

    @cached_property
    def _known(self) -> dict[Path, int]:
        return {}


def _choice(fields: Mapping[str, Any], name: str, target: str) -> list[int]:
    """The word pieces of the correct one of several choices."""
    choices, chosen = fields.get(name), fields.get(target)
    if not isinstance(choices, list) or not 1 <= len(choices) <= _MOST_CHOICES:
        raise FieldError(name, f"{show(choices)} is no list of choices; give a database of VCR")
    if chosen == -1:
        raise FieldError(target, "is -1: the test split has no answers; import the training or validation split")
    number = whole_number(target, chosen, 0, len(choices) - 1)
    pieces = choices[number]
    if not isinstance(pieces, list) or not pieces:
        raise FieldError(f"{name}[{number}]", f"{show(pieces)} is no list of word pieces")
    return [whole_number(f"{name}[{number}][{place}]", each, 0, _MOST_ID) for place, each in enumerate(pieces)]
