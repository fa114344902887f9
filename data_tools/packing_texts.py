"""Rows of text of at most so many word pieces: whole sentences, put together, of one document or across documents.

After RoBERTa (Liu et al. 2019, 4.2): ``sentence`` fills rows across documents, with [SEP] between these
(FULL-SENTENCES); ``document`` begins a new row with each document (DOC-SENTENCES); ``none`` puts nothing together.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from data_tools.records import BadRow, TextRecord
from vlscale.data.schema import Vocabulary

PACKINGS = ("sentence", "document", "none")

_END = re.compile(
    r"""[.!?\u2026][.!?"'\u2019\u201d)\]]*\s+(?=["'\u2018\u201c(\[]?[^\W_a-z])|[\u3002\uff01\uff1f]+|\n+"""
)
_ABBREVIATED = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Mt|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|vs|etc|e\.g|i\.e|cf|al|Fig|fig|No|"
    r"no|pp|vol|Vol|ed|eds|approx|ca|U\.S|U\.K|a\.m|p\.m)\.$"
)


class PackingTokenizer(Protocol):
    """What packing needs of a tokenizer; see :mod:`data_tools.tokenizers`."""

    vocabulary: Vocabulary

    @property
    def marks_following(self) -> bool:
        """A text has other ids after another text than alone."""
        ...

    def encode_many(self, texts: Sequence[str], following: bool = False) -> list[list[int]]:
        """Ids of several texts."""
        ...


@dataclass(frozen=True)
class Piece:
    """A line, paragraph or record of a corpus.

    Attributes:
        where: for errors.
        id: unique name.
        text: its text.
        begins: it is the first of its document.
    """

    where: str
    id: str
    text: str
    begins: bool


@dataclass
class _Row:
    where: str
    id: str
    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


def split_sentences(text: str) -> list[str]:
    """Split at sentence ends and line ends; blanks between words are squeezed to one space.

    A sentence ends at ``. ! ?`` (and closing quotes) before a blank and anything but a lower-case letter, but not
    after an initial or a usual English abbreviation; and at the full stops of Chinese and Japanese.
    """
    found, begin = [], 0
    for end in _END.finditer(text):
        candidate = text[begin : end.end()]
        if "\n" not in end[0] and _ABBREVIATED.search(candidate.rstrip()):
            continue
        found.append(candidate)
        begin = end.end()
    found.append(text[begin:])
    return [squeezed for each in found if (squeezed := " ".join(each.split()))]


class Packer:
    """Puts sentences together to rows.

    Args:
        tokenizer: counts the word pieces.
        packing: one of :data:`PACKINGS`.
        max_tokens: word pieces of a row, without [CLS] and [SEP] around it.
    """

    def __init__(self, tokenizer: PackingTokenizer, packing: str, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.packing = packing
        self.max_tokens = max_tokens
        self._row: _Row | None = None
        self._begins = False

    def pack(self, pieces: Iterable[Piece | BadRow]) -> Iterator[TextRecord | BadRow]:
        """Yield rows, in the order of the pieces; bad rows go through as they are.

        Memory holds one piece and one row. A sentence that is too long for a row is cut between words.
        """
        for piece in pieces:
            if isinstance(piece, BadRow):
                yield piece
                continue
            if self.packing == "none" or (piece.begins and self.packing == "document"):
                yield from self._flush()
            self._begins |= piece.begins
            sentences = split_sentences(piece.text)
            place = 0
            for sentence, ids in zip(sentences, self.tokenizer.encode_many(sentences, following=True), strict=True):
                for text, part in self._fit(sentence, ids):
                    yield from self._add(piece, place, text, part)
                    place += 1
        yield from self._flush()

    def _fit(self, text: str, ids: list[int]) -> Iterator[tuple[str, list[int]]]:
        """Cut a sentence in halves until each fits a row: between words, and a word between letters."""
        most = len(ids)
        if self.tokenizer.marks_following:  # at the beginning of a row, only the first word has other ids
            most += len(text.partition(" ")[0].encode("utf-8", "surrogatepass"))
        if most <= self.max_tokens:
            if ids:
                yield text, ids
            return
        if len(text) < 2:
            return
        words = text.split(" ")
        middle = len(words) // 2
        halves = (" ".join(words[:middle]), " ".join(words[middle:]))
        if len(words) == 1:
            halves = (text[: len(text) // 2], text[len(text) // 2 :])
        for half, part in zip(halves, self.tokenizer.encode_many(halves, following=True), strict=True):
            yield from self._fit(half, part)

    def _add(self, piece: Piece, place: int, text: str, ids: list[int]) -> Iterator[TextRecord]:
        separator = [self.tokenizer.vocabulary.sep] if self._begins and self.packing == "sentence" else []
        row = self._row
        if row is not None and len(row.ids) + len(separator) + len(ids) > self.max_tokens:
            yield from self._flush()
            row = None
        if row is None:
            row = self._row = _Row(piece.where, f"{piece.id}.{place}" if place else piece.id)
            separator = []
        if self.tokenizer.marks_following and (separator or not row.ids):
            ids = self.tokenizer.encode_many([text])[0]
        if separator and len(row.ids) + 1 + len(ids) > self.max_tokens:  # the beginning of a text is longer here
            yield from self._flush()
            row, separator = _Row(piece.where, f"{piece.id}.{place}" if place else piece.id), []
            self._row = row
        if row.texts:
            row.texts.append("\n" if separator else " ")
        row.texts.append(text)
        row.ids += separator + ids
        self._begins = False

    def _flush(self) -> Iterator[TextRecord]:
        row, self._row = self._row, None
        if row is not None:
            yield TextRecord(row.where, row.id, "".join(row.texts), (), row.ids)


class DocumentHash:
    """64-bit hash of a document, whatever its case, line ends, blanks and Unicode composition."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, text: str) -> None:
        """Take in a piece of the document."""
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        self._state.update("".join(f"{word} " for word in folded.split()).encode("utf-8", "surrogatepass"))

    def digest(self) -> int:
        """The hash."""
        return self._state.intdigest()
