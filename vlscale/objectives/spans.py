"""Masked spans of whole units: UNIMO's bidirectional language learning (section 2.3), after SpanBERT.

Spans are drawn until 15 % of a text's word pieces are masked, at least one. A span's length is geometric, cut off at
the longest and renormalised as in SpanBERT, in word pieces; it is rounded up to whole units, so that no unit is ever
split. (Counted in units, one span of phrases would be a whole caption.) No span is longer than what is still wanted,
and spans do not overlap. A span as a whole becomes [MASK] (80 %), random word pieces (10 %), or stays (10 %).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.config_unified import LanguageSection
from vlscale.data.schema import Vocabulary
from vlscale.objectives.masking import MASK_SHARE, RANDOM_SHARE, MaskedTokens
from vlscale.objectives.row_draws import RowDraws
from vlscale.objectives.runs import TextUnits, choose_runs, word_starts
from vlscale.ragged import RaggedBatch

_SPANS, _WORDS = "unified_spans", "unified_words"


@dataclass(frozen=True)
class SpanMasking:
    """The rule by which spans are chosen and replaced.

    Attributes:
        probability: share of a text's word pieces that is masked.
        geometric: p of the spans' lengths; 1: all are single units; 0: all lengths are as likely.
        longest: word pieces of the longest span, before it is rounded up to whole units.
        mask: id of [MASK].
        random_range: random replacements are uniform over the ids in [lo, hi).
        begins: bool [V], the word pieces that begin a word, where a text has no units; None: each does.
    """

    probability: float
    geometric: float
    longest: int
    mask: int
    random_range: tuple[int, int]
    begins: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def build(cls, section: LanguageSection, vocabulary: Vocabulary) -> SpanMasking:
        """Lay the recipe's section over a vocabulary."""
        longest, span = section.longest_span, section.geometric
        starts = word_starts(vocabulary)
        return cls(section.probability, span, longest, vocabulary.mask, vocabulary.random_range, starts)

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        """float64 [longest], share of the spans that are at most 1, 2, ... word pieces long."""
        shares = np.cumsum((1.0 - self.geometric) ** np.arange(self.longest))
        return shares / shares[-1]

    def lengths(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return int64 [n], lengths 1..longest, for numbers uniform in [0, 1)."""
        return np.minimum(np.searchsorted(self._shares, uniform, side="right") + 1, self.longest)

    def draw(self, batch: RaggedBatch, draws: RowDraws, rows: NDArray[np.int64]) -> MaskedTokens:
        """Choose and replace word pieces of some rows of a batch on the CPU.

        Args:
            batch: its ``input_ids`` are whole (not masked yet).
            draws: random numbers of its rows.
            rows: int64 [n]; other rows stay as they are. A text without a word piece has no span.

        Raises:
            VlscaleError: see :meth:`vlscale.objectives.runs.TextUnits.of`.
        """
        units = TextUnits.of(batch, rows, self.begins)
        wanted = np.maximum(np.ceil(units.pieces * self.probability).astype(np.int64), 1)

        def of_round(texts: NDArray[np.int64], number: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
            begin, length, _, _ = draws.uniform(_SPANS, rows[texts], number).T
            return begin, self.lengths(length)

        span_P = units.spread(choose_runs(units, wanted, of_round))
        inside = span_P >= 0
        positions, row = units.positions()[inside], np.repeat(rows, units.pieces)[inside]
        ids = batch.input_ids.numpy()
        labels = ids[positions]
        kind = draws.uniform(_SPANS, row, span_P[inside])[:, 2]
        low, high = self.random_range
        within = positions - batch.cu_text.numpy()[row]
        random = low + (draws.uniform(_WORDS, row, within)[:, 0] * (high - low)).astype(np.int64)
        masked = ids.copy()
        masked[positions] = np.select(
            [kind < MASK_SHARE, kind < MASK_SHARE + RANDOM_SHARE], [np.full_like(labels, self.mask), random], labels
        )
        return MaskedTokens(*map(torch.from_numpy, (masked, positions, labels)))
