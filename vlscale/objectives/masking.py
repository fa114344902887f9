"""Masks of word pieces and regions (UNITER, section 3.2 and the authors' code), drawn per example and vectorised.

A mask depends on (seed, dataset, purpose, pass, example, position) and on the example's own words, never on the batch
that the example sits in. Another pass over the data gives another mask, and so does another purpose: each task uses
its own purposes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.config import MlmSection
from vlscale.data.random import Draws
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError
from vlscale.ragged import RaggedBatch

MASK_SHARE = 0.8
"""Share of the chosen word pieces that become [MASK]."""

RANDOM_SHARE = 0.1
"""Share of the chosen word pieces that become a random word piece; the rest stay as they are."""


@dataclass(frozen=True, eq=False)
class MaskedTokens:
    """What masking did to the text of a batch.

    Attributes:
        input_ids: int64 [Nt], the text as the model sees it.
        positions: int64 [K] into Nt, the chosen word pieces in order.
        labels: int64 [K], what stood there.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class TokenMasking:
    """The rule by which word pieces are chosen and replaced.

    Every word piece is chosen on its own with its probability; of the chosen, 80 % become [MASK], 10 % a random word
    piece, 10 % stay. [CLS], [SEP] and [PAD] are never chosen. A text in which nothing was chosen gets one [MASK]: its
    first word (the published rule), or, where content words have a probability of their own, a uniformly random
    content word (any word if it has no content word), since the first word of a caption is mostly an article. Where
    texts have segments (``RaggedBatch.text_types``: question, answer, rationale), this holds for each segment.

    Attributes:
        probability: float64 [V], chance of being chosen, per id.
        word: bool [V], ids that may be chosen at all.
        content: bool [V], ids that count as content words; None: words are not told apart.
        mask: id of [MASK].
        random_range: random replacements are uniform over the ids in [lo, hi).
    """

    probability: NDArray[np.float64]
    word: NDArray[np.bool_]
    content: NDArray[np.bool_] | None
    mask: int
    random_range: tuple[int, int]

    @classmethod
    def build(cls, section: MlmSection, vocabulary: Vocabulary) -> TokenMasking:
        """Lay the recipe's section over a vocabulary.

        Function words are compared with whole tokens regardless of case. Every other word piece is content, the
        continuation of a word (``##...``) too.

        Raises:
            VlscaleError: function words are listed and none of them is in the vocabulary.
        """
        word = np.ones(vocabulary.size, bool)
        word[[vocabulary.cls, vocabulary.sep, vocabulary.pad]] = False
        probability = np.full(vocabulary.size, section.probability)
        content = None
        if section.content_probability is not None:
            content = word & ~_listed(section.function_words, vocabulary)
            probability[content] = section.content_probability
        return cls(np.where(word, probability, 0.0), word, content, vocabulary.mask, vocabulary.random_range)

    def draw(self, batch: RaggedBatch, draws: Draws, purpose: str, at_least_one: bool = True) -> MaskedTokens:
        """Choose and replace word pieces of a batch on the CPU.

        Args:
            batch: its ``input_ids`` are whole (not masked yet).
            draws: random numbers of (seed, dataset).
            purpose: keys the draws.
            at_least_one: give every text with a word at least one chosen word piece, and every segment of it.

        Raises:
            VlscaleError: a token id is not in the vocabulary.
        """
        ids, cu, owner = batch.input_ids.numpy(), batch.cu_text.numpy(), batch.text_owner().numpy()
        if ids.size and not 0 <= ids.min() <= ids.max() < self.word.size:
            raise VlscaleError(
                f"dataset {batch.dataset}: token id {ids[(ids < 0) | (ids >= self.word.size)][0]} lies outside the "
                f"vocabulary of {self.word.size} tokens; rebuild the texts store with its own vocabulary"
            )
        choice, kind, piece, order = _uniform(draws, purpose, batch, cu, owner)
        chosen = choice < self.probability[ids]
        replace = np.where(kind < MASK_SHARE, self.mask, ids)
        low, high = self.random_range
        random = (kind >= MASK_SHARE) & (kind < MASK_SHARE + RANDOM_SHARE)
        replace[random] = low + (piece[random] * (high - low)).astype(np.int64)
        if at_least_one:
            rank = np.arange(ids.size, dtype=np.float64) if self.content is None else order + ~self.content[ids]
            missing = _smallest_where_none_chosen(chosen, self.word[ids], rank, *_segments(batch, owner))
            chosen[missing] = True
            replace[missing] = self.mask
        positions = np.flatnonzero(chosen)
        masked = np.where(chosen, replace, ids)
        return MaskedTokens(*map(torch.from_numpy, (masked, positions, ids[positions])))


def draw_regions(
    batch: RaggedBatch, draws: Draws, purpose: str, probability: float, at_least_one: bool = True
) -> Tensor:
    """Return bool [Nr], the regions to mask: each on its own with ``probability``.

    With ``at_least_one`` an image of which no region was chosen gets a uniformly random one.
    """
    cu, owner = batch.cu_regions.numpy(), batch.region_owner().numpy()
    choice, order, _, _ = _uniform(draws, purpose, batch, cu, owner)
    chosen = choice < probability
    if at_least_one:
        chosen[_smallest_where_none_chosen(chosen, np.ones_like(chosen), order, owner, len(batch))] = True
    return torch.from_numpy(chosen)


def mask_regions(batch: RaggedBatch, chosen: Tensor, in_place: bool = False) -> RaggedBatch:
    """Return the batch with ``region_mask`` set to ``chosen`` (bool [Nr]) and the features of those regions zeroed.

    With ``in_place`` the features of ``batch`` itself become zero: a copy would cost as much as reading them did.
    """
    features = batch.features if in_place else batch.features.clone()
    # Rows are set, not multiplied by the mask: NaN would stay NaN. A bool mask as the index takes ten times as long.
    features.index_fill_(0, chosen.nonzero().squeeze(1), 0)
    return dataclasses.replace(batch, features=features, region_mask=chosen)


def _listed(words: tuple[str, ...], vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """Return bool [V], True for tokens that are one of ``words`` regardless of case."""
    wanted = {word.casefold() for word in words}
    listed = np.fromiter((token.casefold() in wanted for token in vocabulary.tokens), bool, vocabulary.size)
    if wanted and not listed.any():
        raise VlscaleError(
            f"objectives.mlm.function_words: none of {', '.join(words[:5])}{', ...' if len(words) > 5 else ''} is a "
            "token of the vocabulary; list whole tokens of the texts store's vocabulary, or leave the list empty"
        )
    return listed


def _uniform(
    draws: Draws, purpose: str, batch: RaggedBatch, cu: NDArray[np.int32], owner: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return float64 [4, N], uniform in [0, 1), keyed by (pass, example) and the position inside the example."""
    within = np.arange(owner.size) - cu[owner]
    return draws.uniform(purpose, batch.passes.numpy()[owner], batch.examples.numpy()[owner], within).T


def _segments(batch: RaggedBatch, owner: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return int64 [Nt], the segment (run of one type; without types the text) of each token, and their number."""
    if batch.text_types is None:
        return owner, len(batch)
    begins = (np.diff(owner, prepend=-1) != 0) | (np.diff(batch.text_types.numpy(), prepend=-1) != 0)
    return np.cumsum(begins) - 1, int(begins.sum())


def _smallest_where_none_chosen(
    chosen: NDArray[np.bool_],
    allowed: NDArray[np.bool_],
    rank: NDArray[np.float64],
    owner: NDArray[np.int64],
    owners: int,
) -> NDArray[np.int64]:
    """Return, for each owner without a chosen position, its allowed position of the smallest rank (if any)."""
    lacking = np.bincount(owner, chosen, minlength=owners) == 0
    candidates = np.flatnonzero(allowed & lacking[owner])
    candidates = candidates[np.lexsort((rank[candidates], owner[candidates]))]
    _, first = np.unique(owner[candidates], return_index=True)
    return candidates[first]
