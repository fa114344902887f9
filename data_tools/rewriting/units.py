"""From words to word pieces: which tokens of a text are masked together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_tools.rewriting.graph import WORD, Analysis


def token_units(analysis: Analysis, offsets: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """Units over tokens.

    Args:
        analysis: of the text.
        offsets: characters [start, end) of each token.

    Returns:
        int32 [U, 3], (first token, token behind the last, kind): disjoint, in order, covering all tokens. A token
        belongs to the unit of its last character, so a blank that byte-level BPE puts before a word goes with the word.
    """
    words, owner = analysis.words, np.zeros(len(analysis.words), np.int64)
    for number, unit in enumerate(analysis.units):
        owner[unit.start : unit.end] = number
    ends = np.asarray([word.end for word in words], np.int64)
    last = np.asarray([max(end - 1, 0) for _, end in offsets], np.int64)
    if not len(ends):
        return single_units(len(offsets))
    at = np.minimum(np.searchsorted(ends, last, side="right"), len(ends) - 1)
    of = np.maximum.accumulate(owner[at]) if len(at) else at
    begins = np.flatnonzero(np.diff(of, prepend=-1))
    stops = np.append(begins[1:], len(of))
    kinds = np.asarray([unit.kind for unit in analysis.units], np.int64)[of[begins]]
    return np.stack([begins, stops, kinds], 1).astype(np.int32)


def single_units(tokens: int) -> NDArray[np.int32]:
    """Each token by itself; int32 [tokens, 3]."""
    places = np.arange(tokens)
    return np.stack([places, places + 1, np.full(tokens, WORD)], 1).astype(np.int32)


def piece_units(pieces: Sequence[str], byte_level: bool) -> NDArray[np.int32]:
    """Whole words, told by how their pieces are spelled, for texts that cannot be aligned with their word pieces.

    Args:
        pieces: of the text.
        byte_level: pieces that begin a word begin with a mark for the blank (byte-level BPE, SentencePiece); otherwise
            those that go on begin with ``##``.

    Returns:
        int32 [U, 3], see :func:`token_units`.
    """
    if byte_level:
        begins = [number for number, piece in enumerate(pieces) if not number or piece[:1] in ("Ġ", "▁", "[", "<")]
    else:
        begins = [number for number, piece in enumerate(pieces) if not number or not piece.startswith("##")]
    stops = [*begins[1:], len(pieces)][: len(begins)]
    return np.asarray([(begin, stop, WORD) for begin, stop in zip(begins, stops, strict=True)], np.int32).reshape(-1, 3)
