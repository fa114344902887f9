"""Which next tokens would repeat an n-gram of words. A word is a token that begins one and those that go on with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def repeating(ids_LT: Tensor, starts_V: Tensor, size: int) -> Tensor:
    """bool [L, V], the tokens after which the last ``size`` words have occurred before.

    The first token begins a word whatever it is, and a word that has no end yet counts as it is. Time and memory are
    L * T * ``size`` and L * V; the device is not waited for.

    Args:
        ids_LT: int64 [L, T], L hypotheses of T tokens.
        starts_V: bool [V], tokens that begin a word.
        size: n, at least 1.
    """
    count, length = ids_LT.shape
    counted_LV = torch.zeros(count, starts_V.numel(), dtype=torch.int32, device=ids_LT.device)
    if size > length:  # n words have n tokens at least
        return counted_LV > 0
    words = _Words(ids_LT, starts_V)
    first_LW = ids_LT.gather(1, words.begin_LW.clamp(max=length - 1))
    # The next token begins a word: an earlier word of that token alone comes after what the last n - 1 words are.
    again_LW = (words.length_LW == 1) & starts_V[first_LW]
    for back in range(size - 1):
        again_LW &= _moved(words.equal(back), back + 1)
    counted_LV.scatter_add_(1, first_LW, again_LW.int())
    # It goes on with the last word: an earlier word has one token more, after what the n - 1 before the last are.
    again_LW = words.longer_by_one()
    for back in range(1, size):
        again_LW &= _moved(words.equal(back), back)
    end_LW = words.begin_LW + words.length_LW - 1
    counted_LV.scatter_add_(1, ids_LT.gather(1, end_LW.clamp(0, length - 1)), again_LW.int())
    return counted_LV > 0


class _Words:
    """The words of L hypotheses of T tokens: at most T each, so that W = T; those that are not there have length 0."""

    def __init__(self, ids_LT: Tensor, starts_V: Tensor) -> None:
        self.ids_LT = ids_LT
        starts_LT = starts_V[ids_LT]
        starts_LT[:, 0] = True
        self._word_LT = starts_LT.cumsum(1) - 1
        self.length_LW = self._per_word(torch.ones_like(starts_LT))
        self.begin_LW = self.length_LW.cumsum(1) - self.length_LW
        places_T = torch.arange(ids_LT.shape[1], device=ids_LT.device)
        self._within_LT = places_T - self.begin_LW.gather(1, self._word_LT)
        self._last_L1 = self._word_LT[:, -1:]

    def _per_word(self, hits_LT: Tensor) -> Tensor:
        """int64 [L, W], hits in each word."""
        return torch.zeros_like(self.ids_LT).scatter_add_(1, self._word_LT, hits_LT.long())

    def _begins_as(self, back: int) -> tuple[Tensor, Tensor]:
        """bool [L, W], words that begin with the one so many before the last; int64 [L, 1], its length."""
        which_L1 = self._last_L1 - back
        there_L1, which_L1 = which_L1 >= 0, which_L1.clamp(min=0)
        length_L1 = self.length_LW.gather(1, which_L1)
        wanted_LT = (self.begin_LW.gather(1, which_L1) + self._within_LT).clamp(max=self.ids_LT.shape[1] - 1)
        same_LT = (self.ids_LT == self.ids_LT.gather(1, wanted_LT)) & (self._within_LT < length_L1)
        return (self._per_word(same_LT) == length_L1) & there_L1, length_L1

    def equal(self, back: int) -> Tensor:
        """bool [L, W], words that are the one so many before the last."""
        begins_LW, length_L1 = self._begins_as(back)
        return begins_LW & (self.length_LW == length_L1)

    def longer_by_one(self) -> Tensor:
        """bool [L, W], words that are the last one and one token more."""
        begins_LW, length_L1 = self._begins_as(0)
        return begins_LW & (self.length_LW == length_L1 + 1)


def _moved(of_words_LW: Tensor, by: int) -> Tensor:
    """What holds of a word told to the one so many behind it."""
    return pad(of_words_LW[:, : max(of_words_LW.shape[1] - by, 0)], (by, 0))[:, : of_words_LW.shape[1]]
