"""Generated fragments: UNIMO's sequence-to-sequence language learning (section 2.3).

Fragments of a text are taken out until they are 25 % of its word pieces. What remains is the source, the fragments in
the order of the text are the target: ``[CLS] rest [SEP] | [CLS] f1 [SEP] [CLS] f2 [SEP] ...``. A fragment's length is
uniform between the shortest and the longest, but not more than is still wanted (or the shortest), so that a caption is
not generated whole; it is rounded up to whole units, or to whole words where there are none (see
:func:`~vlscale.objectives.runs.word_starts`). A text of at most one fragment's length is generated whole, after an
empty source ``[CLS] [SEP]``; a text without a word piece generates nothing.

Positions start again at every [CLS], as in UNIMO's fine-tuning for generation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.config_unified import LanguageSection
from vlscale.data.schema import Vocabulary
from vlscale.data.views import most_fragments
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.row_draws import RowDraws
from vlscale.objectives.runs import Integers, TextUnits, choose_runs, word_starts
from vlscale.ragged import cumulative

_FRAGMENTS = "unified_fragments"
_OPEN, _INSIDE, _CLOSE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Fragmented:
    """A batch whose texts were taken apart.

    Attributes:
        batch: with the new texts, ``prefix_len``, and ``targets["text_offsets"]``, int64 [Nt]: how far each token is
            from its [CLS], the row of the position table less the model's first one.
        moved: int64 [Nt before], where each token stands now.
        positions: int64 [K] into the new text, the tokens that predict the one behind them: those of all fragments but
            their [SEP].
        labels: int64 [K], what stands there.
        whole: bool [n], which of the n texts have a target and no source.
    """

    batch: UnimoBatch
    moved: Tensor
    positions: Tensor
    labels: Tensor
    whole: Tensor


@dataclass(frozen=True)
class FragmentRule:
    """The rule by which fragments are taken out.

    Attributes:
        probability: share of a text's word pieces that is generated.
        shortest: word pieces of the shortest fragment; longest: of the longest, before it is rounded up to whole units.
        cls: id of [CLS]; sep: id of [SEP].
        begins: bool [V], the word pieces that begin a word, where a text has no units; None: each does.
    """

    probability: float
    shortest: int
    longest: int
    cls: int
    sep: int
    begins: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def build(cls, section: LanguageSection, vocabulary: Vocabulary) -> FragmentRule:
        """Lay the recipe's section over a vocabulary."""
        shortest, longest = section.shortest_fragment, section.longest_fragment
        starts = word_starts(vocabulary)
        return cls(section.seq2seq_probability, shortest, longest, vocabulary.cls, vocabulary.sep, starts)

    def lengths(self, uniform: NDArray[np.float64]) -> Integers:
        """Return int64 [n], lengths shortest..longest, for numbers uniform in [0, 1)."""
        return self.shortest + (uniform * (self.longest - self.shortest + 1)).astype(np.int64)

    def take_out(self, batch: UnimoBatch, draws: RowDraws, rows: Integers) -> Fragmented:
        """Take fragments out of the texts of some rows of a batch on the CPU; other rows stay as they are.

        Raises:
            VlscaleError: see :meth:`vlscale.objectives.runs.TextUnits.of`.
        """
        nothing = torch.zeros(0, dtype=torch.int64)
        if not rows.size:
            return Fragmented(batch, torch.arange(batch.input_ids.numel()), nothing, nothing, nothing.bool())
        number_N = self._numbered(batch, draws, rows)
        return _laid_out(batch, rows, number_N, self.cls, self.sep)

    def _numbered(self, batch: UnimoBatch, draws: RowDraws, rows: Integers) -> Integers:
        """int64 [Nt], 0 for what stays, 1, 2, ... for the first, second, ... fragment of a text."""
        units = TextUnits.of(batch, rows, self.begins)
        pieces = units.pieces
        wanted = np.maximum(np.ceil(pieces * self.probability).astype(np.int64), 1)
        most = most_fragments(pieces.astype(np.int32), self.probability, self.shortest)

        def of_round(texts: Integers, number: int) -> tuple[NDArray[np.float64], Integers]:
            begin, length, _, _ = draws.uniform(_FRAGMENTS, rows[texts], number).T
            return begin, self.lengths(length)

        round_P = units.spread(choose_runs(units, wanted, of_round, self.shortest, most.astype(np.int64)))
        text_P = np.repeat(np.arange(len(rows)), pieces)
        begins = (round_P >= 0) & ((np.diff(round_P, prepend=-1) != 0) | (np.diff(text_P, prepend=-1) != 0))
        begun = np.concatenate([np.zeros(1, np.int64), np.cumsum(begins)])
        of_earlier_texts = np.repeat(begun[np.cumsum(pieces) - pieces], pieces)
        number_N = np.zeros(batch.input_ids.numel(), np.int64)
        number_N[units.positions()] = np.where(round_P >= 0, begun[1:] - of_earlier_texts, 0)
        return number_N


def _laid_out(batch: UnimoBatch, rows: Integers, number_N: Integers, cls: int, sep: int) -> Fragmented:
    """Put the fragments behind their texts, each between a [CLS] and a [SEP]."""
    row_N = batch.text_owner().numpy()
    begins = np.flatnonzero((number_N > 0) & ((np.diff(number_N, prepend=0) != 0) | (np.diff(row_N, prepend=-1) != 0)))
    old = number_N.size
    row = np.concatenate([row_N, row_N[begins], row_N[begins]])
    number = np.concatenate([number_N, number_N[begins], number_N[begins]])
    place = np.repeat([_INSIDE, _OPEN, _CLOSE], [old, begins.size, begins.size])
    order = np.lexsort((place, number, row))  # stable: tokens stay in their order
    source = np.concatenate([np.arange(old), begins, begins])[order]
    row, number, place = row[order], number[order], place[order]
    ids = batch.input_ids.numpy()[source]
    ids[place == _OPEN], ids[place == _CLOSE] = cls, sep
    moved = np.empty(old, np.int64)
    moved[source[place == _INSIDE]] = np.flatnonzero(place == _INSIDE)
    fresh = (np.diff(row, prepend=-1) != 0) | (np.diff(number, prepend=0) != 0)
    starts = np.flatnonzero(fresh)
    offsets = np.arange(ids.size) - starts[np.cumsum(fresh) - 1]
    positions = np.flatnonzero((number > 0) & (place != _CLOSE))
    size = len(batch)
    prefix, taken = np.bincount(row[number == 0], minlength=size), np.bincount(row[number > 0], minlength=size)
    text_types = None if batch.text_types is None else batch.text_types[torch.from_numpy(source)]
    new = dataclasses.replace(
        batch,
        input_ids=torch.from_numpy(ids),
        cu_text=cumulative(torch.from_numpy(prefix + taken)),
        text_types=text_types,
        prefix_len=torch.from_numpy(prefix.astype(np.int32)),
        targets=batch.targets | {"text_offsets": torch.from_numpy(offsets)},
        sizes=None,
    )
    whole = torch.from_numpy(((prefix == 2) & (taken > 0))[rows])
    labels = torch.from_numpy(ids[positions + 1])
    return Fragmented(new, torch.from_numpy(moved), torch.from_numpy(positions), labels, whole)
