"""From word-piece ids back to text, with nothing but the vocabulary that travels with the texts."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError

PieceKind = Literal["bytes", "wordpiece", "sentencepiece"]
KINDS: tuple[PieceKind, ...] = get_args(PieceKind)
_MARKS: dict[PieceKind, str] = {"bytes": "\u0120", "wordpiece": "##", "sentencepiece": "\u2581"}
_CONTINUES = "##"
_BLANK = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_IDEOGRAPHS = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0002fa1f"
_BESIDE_IDEOGRAPH = re.compile(rf" (?=[{_IDEOGRAPHS}])|(?<=[{_IDEOGRAPHS}]) ")


class Detokenizer:
    """Texts of ids, for byte-level BPE, WordPiece and SentencePiece.

    Runs of white space become one blank, and none is left at the ends, as UNIMO's authors write their results.
    WordPiece does not know where blanks were: words are set apart by one, except beside Chinese characters and their
    punctuation.

    Args:
        vocabulary: of the texts; ``TextStore.meta.vocabulary``.
        kind: how its word pieces are written; by default told from them, ``wordpiece`` where none has a mark.

    Raises:
        VlscaleError: the kind is unknown.
    """

    def __init__(self, vocabulary: Vocabulary, kind: PieceKind | None = None) -> None:
        if kind is not None and kind not in KINDS:
            raise VlscaleError(f"detokenizer: kind {kind!r} is unknown (known: {', '.join(KINDS)})")
        self.vocabulary = vocabulary
        self.kind: PieceKind = kind or _kind_of(vocabulary.tokens)
        self._special = {getattr(vocabulary, role) for role in ("pad", "unk", "cls", "sep", "mask")}

    def text(self, ids: Iterable[int], keep: Iterable[int] = ()) -> str:
        """Return the text of ids, numbers or an int tensor [T]; special tokens are left out, except those to ``keep``.

        Raises:
            VlscaleError: an id is outside the vocabulary, or is no whole number.
        """
        tokens, left_out = self.vocabulary.tokens, self._special - set(_whole(keep))
        pieces = []
        for index in _whole(ids):
            if not 0 <= index < len(tokens):
                raise VlscaleError(
                    f"id {index} is outside the vocabulary of {len(tokens)} word pieces (fingerprint "
                    f"{self.vocabulary.fingerprint[:12]}...); take the one that the model was trained with"
                )
            if index not in left_out:
                pieces.append(tokens[index])
        return " ".join(_JOINED[self.kind](pieces).split())

    def texts(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Return the texts of several rows of ids, such as ``Generated.best()`` or an int tensor [B, T]."""
        return [self.text(row) for row in rows]

    def word_starts(self) -> NDArray[np.bool_]:
        """bool [V]: whether a word piece begins a word where it stands after another; special tokens do not.

        UNIMO blocks repeated trigrams of words that are told apart so: by the blank before them.
        """
        tokens = self.vocabulary.tokens
        if self.kind == "wordpiece":
            starts = np.array([not token.startswith(_CONTINUES) for token in tokens], np.bool_)
        else:
            starts = np.array([token.startswith(_MARKS[self.kind]) for token in tokens], np.bool_)
        starts[sorted(self._special)] = False
        return starts


def _whole(ids: Iterable[int]) -> Iterator[int]:
    """Plain numbers: elements of tensors are neither equal to nor hashed like them."""
    for index in ids:
        try:
            yield operator.index(index)
        except TypeError:
            raise VlscaleError(f"detokenizer: {str(index)[:40]!r} is no id; give a row of whole numbers") from None


def _kind_of(tokens: Sequence[str]) -> PieceKind:
    """The kind whose mark most word pieces begin with; whole words have none."""
    counts = {kind: sum(len(token) > len(mark) and token.startswith(mark) for token in tokens)
              for kind, mark in _MARKS.items()}  # fmt: skip
    return max(KINDS, key=counts.__getitem__) if any(counts.values()) else "wordpiece"


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for their own byte, the others are moved behind U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in {*printable}]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _join_bytes(pieces: Sequence[str]) -> str:
    raw = bytearray()
    for piece in pieces:
        known = [_BYTE_OF.get(character) for character in piece]
        raw += piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
    return raw.decode("utf-8", errors="replace")


def _join_words(pieces: Sequence[str]) -> str:
    joined = "".join(piece[2:] if piece.startswith(_CONTINUES) else f" {piece}" for piece in pieces)
    return _BESIDE_IDEOGRAPH.sub("", joined)


def _join_sentence(pieces: Sequence[str]) -> str:
    raw = bytearray()
    for piece in pieces:
        byte = _BYTE_PIECE.fullmatch(piece)
        raw += bytes([int(byte[1], 16)]) if byte else piece.replace(_BLANK, " ").encode()
    return raw.decode("utf-8", errors="replace")


_JOINED: dict[PieceKind, Callable[[Sequence[str]], str]] = {
    "bytes": _join_bytes,
    "wordpiece": _join_words,
    "sentencepiece": _join_sentence,
}
