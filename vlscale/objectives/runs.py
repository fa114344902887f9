"""Runs of whole units (phrases, names, words) that are chosen in texts: what spans and fragments have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import SPECIALS
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError
from vlscale.objectives.row_draws import named_row
from vlscale.ragged import RaggedBatch

Integers = NDArray[np.int64]
_GOES_ON, _BLANKS = "##", ("Ġ", "▁")
_UNSPACED = (("\u2e80", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
Drawer = Callable[[Integers, int], tuple[NDArray[np.float64], Integers]]


@dataclass(frozen=True, eq=False)
class TextUnits:
    """The units of n texts, U in all. Only word pieces count: [CLS] and [SEP] belong to no unit.

    Attributes:
        rows: int64 [n], the rows of the batch.
        cu_units: int64 [n+1], cumulative counts of units.
        ends: int64 [U+1], cumulative counts of word pieces over all units; P = ends[-1].
        first: int64 [n], position in the batch's text of each text's first word piece.
    """

    rows: Integers
    cu_units: Integers
    ends: Integers
    first: Integers

    @classmethod
    def of(cls, batch: RaggedBatch, rows: Integers, begins: NDArray[np.bool_] | None = None) -> TextUnits:
        """The units of ``targets["unit_ends"]`` and ``targets["cu_units"]``; where a text has none, its words.

        Args:
            batch: on the CPU, its texts whole.
            rows: int64 [n], those whose units are wanted.
            begins: bool [V], see :func:`word_starts`; None: each word piece is a word.

        Raises:
            VlscaleError: the units of a text do not go through it from its first word piece to its last.
        """
        cu_text, ids = batch.cu_text.numpy().astype(np.int64), batch.input_ids.numpy()
        first, counts = cu_text[rows] + 1, np.maximum(np.diff(cu_text)[rows] - SPECIALS, 0)
        given = "unit_ends" in batch.targets
        ends_of, cu_of = (batch.targets[name].numpy() for name in ("unit_ends", "cu_units")) if given else (None, None)
        parts = []
        for row, begin, count in zip(rows.tolist(), first.tolist(), counts.tolist(), strict=True):
            ends = None if ends_of is None or cu_of is None else ends_of[cu_of[row] : cu_of[row + 1]] - begin
            if ends is None or not ends.size:
                ends = _word_ends(ids[begin : begin + count], begins)
            elif ends[-1] != count or np.diff(ends, prepend=0).min() < 1:
                raise VlscaleError(
                    f"{named_row(batch, row)}: the text has {count} word pieces, its units end behind "
                    f"{ends[:8].tolist()}; build this dataset's units/ anew with data_tools.find_units"
                )
            parts.append(ends)
        before = np.cumsum(counts) - counts
        ends = np.concatenate(
            [np.zeros(1, np.int64), *(part + start for part, start in zip(parts, before, strict=True))]
        )
        cu_units = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)
        return cls(rows, cu_units, ends.astype(np.int64), first)

    @property
    def pieces(self) -> Integers:
        """int64 [n], word pieces of each text."""
        return np.diff(self.ends[self.cu_units])

    @property
    def owner(self) -> Integers:
        """int64 [U], which of the n texts each unit is of."""
        return np.repeat(np.arange(len(self.rows)), np.diff(self.cu_units))

    def spread(self, values: NDArray[np.int64]) -> Integers:
        """Return int64 [P], the values of units (int64 [U]) at their word pieces."""
        return np.repeat(values, np.diff(self.ends))

    def positions(self) -> Integers:
        """int64 [P], where in the batch's text the word pieces stand."""
        pieces = self.pieces
        before = np.cumsum(pieces) - pieces
        return np.arange(pieces.sum()) + np.repeat(self.first - before, pieces)


def word_starts(vocabulary: Vocabulary) -> NDArray[np.bool_] | None:
    """Return bool [V], the word pieces that begin a word, told by how the vocabulary spells them; None: it does not.

    WordPiece marks those that go on (``##``); byte-level BPE and SentencePiece mark the blank before those that begin
    one. Pieces with characters of scripts that are written without blanks (Chinese, Japanese) are words of their own.
    """
    special = [getattr(vocabulary, name) for name in SPECIAL_TOKENS]
    tokens = vocabulary.tokens
    if any(token.startswith(_GOES_ON) for token in tokens):
        begins = np.fromiter((not token.startswith(_GOES_ON) for token in tokens), bool, len(tokens))
    elif any(token.startswith(_BLANKS) for token in tokens):
        begins = np.fromiter((token.startswith(_BLANKS) or _unspaced(token) for token in tokens), bool, len(tokens))
    else:
        return None
    begins[special] = True
    return begins


def _unspaced(token: str) -> bool:
    return any(low <= letter <= high for letter in token for low, high in _UNSPACED)


def _word_ends(ids: Integers, begins: NDArray[np.bool_] | None) -> Integers:
    """int64, how many word pieces each word of a text ends behind."""
    places = np.arange(1, len(ids) + 1)
    return places if begins is None else places[np.append(begins[ids[1:]], True)[: len(ids)]]


def choose_runs(
    units: TextUnits, wanted: Integers, draw: Drawer, least: int = 1, most: Integers | None = None
) -> Integers:
    """Choose runs of whole units, one per text in each round, until so many word pieces are chosen.

    A run has the drawn number of word pieces, but not more than are still wanted (or ``least``), rounded up to whole
    units. It begins at a uniformly random one of the free units that have room for it before the next chosen unit or
    the text's end; where none has, at the one that has most.

    Args:
        units: of n texts.
        wanted: int64 [n], word pieces.
        draw: (int64 [m] indices of texts, round) -> float64 [m] in [0, 1) for the beginning, int64 [m] lengths.
        least: word pieces of the shortest run.
        most: int64 [n], most runs.

    Returns:
        int64 [U], the round in which a unit was chosen, or -1.
    """
    ends, owner = units.ends, units.owner
    chosen_U = np.full(len(owner), -1, np.int64)
    count_n, wanted = np.zeros(len(units.rows), np.int64), np.minimum(wanted, units.pieces)
    most = np.full(len(units.rows), len(owner)) if most is None else most
    last_U = units.cu_units[1:][owner]
    for round_ in range(int(most.max(initial=0))):
        texts = np.flatnonzero((count_n < wanted) & (round_ < most))
        if not texts.size:
            break
        begin, length = draw(texts, round_)
        need = np.zeros_like(count_n)
        need[texts] = np.minimum(length, np.maximum(wanted[texts] - count_n[texts], least))
        stop_U = np.minimum(_next_chosen(chosen_U), last_U)
        room_U = np.where(chosen_U < 0, ends[stop_U] - ends[:-1], 0)
        most_room = np.zeros_like(count_n)
        np.maximum.at(most_room, owner, room_U)
        need = np.minimum(need, most_room)
        first = _pick(room_U >= np.maximum(need, 1)[owner], owner, texts, begin)
        behind = np.minimum(np.searchsorted(ends, ends[first] + need[texts]), stop_U[first])
        for begin_unit, end_unit in zip(first.tolist(), behind.tolist(), strict=True):
            chosen_U[begin_unit:end_unit] = round_
        count_n[texts] += ends[behind] - ends[first]
    return chosen_U


def _next_chosen(chosen_U: Integers) -> Integers:
    """int64 [U], the first chosen unit at or behind each unit; U if there is none."""
    places = np.where(chosen_U >= 0, np.arange(chosen_U.size), chosen_U.size)
    return np.minimum.accumulate(places[::-1])[::-1]


def _pick(allowed: NDArray[np.bool_], owner: Integers, texts: Integers, uniform: NDArray[np.float64]) -> Integers:
    """Return for each text a uniformly random one of its allowed units; each text has one."""
    candidates = np.flatnonzero(allowed)
    owners = owner[candidates]
    low, high = np.searchsorted(owners, texts), np.searchsorted(owners, texts, side="right")
    return candidates[low + (uniform * (high - low)).astype(np.int64)]
