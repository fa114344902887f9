"""What may be generated next: least lengths, forbidden tokens, repeated n-grams of tokens or words, and sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from vlscale.models.generation.ngrams import repeating
from vlscale.models.generation.settings import GenerationSettings

NEVER = float("-inf")
BLOCKED = -65000.0
"""What the official decoder takes from a candidate that repeats an n-gram."""


class Rules:
    """The settings' rules as tensors on a device. No method waits for it.

    Args:
        settings: how to generate.
        vocabulary: its size V.
        device: of the scores.
    """

    def __init__(self, settings: GenerationSettings, vocabulary: int, device: torch.device) -> None:
        self.settings = settings
        self._suppressed = torch.tensor(sorted(settings.suppressed), dtype=torch.int64, device=device)
        self._ends = torch.tensor(settings.ends, dtype=torch.int64, device=device)
        longer = [words for words in settings.bad_words_ids if len(words) > 1]
        self._sequences = [torch.tensor(words, device=device) for words in longer]
        starts = settings.word_starts
        self._starts = torch.ones(vocabulary, dtype=torch.bool, device=device) if starts is None else starts.to(device)

    def log_probs(self, logits_LV: Tensor, ids_LT: Tensor, new: int) -> Tensor:
        """Return float32 [L, V], log-probabilities under the rules, in the order that the scoring has.

        The n-grams of scoring ``official`` are left out: it looks at them after its choice of candidates.

        A hypothesis whose next token would be against the rules, whichever it is, has a row of -inf.

        Args:
            logits_LV: scores of the next tokens.
            ids_LT: int64 [L, T], the hypotheses so far.
            new: how many of their tokens were generated.
        """
        logits_LV, scoring = logits_LV.float(), self.settings.scoring
        if self.settings.num_beams == 1 or scoring == "huggingface":
            log_probs_LV = self.suppress(logits_LV.log_softmax(1), ids_LT)
        elif scoring == "paddlenlp":
            log_probs_LV = _normalised(self.suppress(logits_LV, ids_LT))
        else:
            return _normalised(self.lengths(self.suppress(logits_LV, ids_LT), new))
        return self.repeats(self.lengths(log_probs_LV, new), ids_LT)

    @property
    def may_leave_nothing(self) -> bool:
        """Whether a hypothesis may come to have no next token; what is forbidden always is checked beforehand."""
        return bool(self._sequences or self.settings.no_repeat_ngram_size)

    def suppress(self, scores_LV: Tensor, ids_LT: Tensor) -> Tensor:
        """Rule out forbidden tokens and what would complete a forbidden sequence."""
        if self._suppressed.numel():
            scores_LV = scores_LV.index_fill(1, self._suppressed, NEVER)
        for sequence in self._sequences:
            before = sequence.numel() - 1
            if ids_LT.shape[1] < before:
                continue
            completes = (ids_LT[:, ids_LT.shape[1] - before :] == sequence[:-1]).all(1)
            last = scores_LV.index_select(1, sequence[-1:]).masked_fill(completes[:, None], NEVER)
            scores_LV = scores_LV.index_copy(1, sequence[-1:], last)
        return scores_LV

    def lengths(self, scores_LV: Tensor, new: int) -> Tensor:
        """Rule out ends before the least length."""
        if new < self.settings.least and self._ends.numel():
            return scores_LV.index_fill(1, self._ends, NEVER)
        return scores_LV

    def repeats(self, scores_LV: Tensor, ids_LT: Tensor) -> Tensor:
        """Rule out tokens that would repeat an n-gram."""
        if not self.settings.no_repeat_ngram_size:
            return scores_LV
        return scores_LV.masked_fill(self.repeating(ids_LT), NEVER)

    def repeating(self, ids_LT: Tensor) -> Tensor:
        """bool [L, V], the tokens after which the last n words have occurred before (n-gram rule given)."""
        return repeating(ids_LT, self._starts, self.settings.no_repeat_ngram_size)

    def draw(self, log_probs_LV: Tensor, noise_LV: Tensor) -> Tensor:
        """Return int64 [L], tokens drawn with temperature from the ``top_k`` best, and those that hold ``top_p``.

        Args:
            log_probs_LV: under the rules.
            noise_LV: float32 [L, V], exponentially distributed: the largest of probability over noise is a draw.
        """
        return (self.warp(log_probs_LV).softmax(1) / noise_LV).argmax(1)

    def warp(self, log_probs_LV: Tensor) -> Tensor:
        """Return float32 [L, V]: over the temperature, what sampling leaves out at -inf."""
        chosen = self.settings
        scores_LV = log_probs_LV / chosen.temperature
        if chosen.top_k:
            least_L1 = scores_LV.topk(chosen.top_k, 1).values[:, -1:]
            scores_LV = scores_LV.masked_fill(scores_LV < least_L1, NEVER)
        if chosen.top_p < 1:
            ascending_LV, order_LV = scores_LV.sort(1)
            out_LV = ascending_LV.softmax(1).cumsum(1) <= 1 - chosen.top_p
            out_LV[:, -1] = False  # the best one stays
            scores_LV = scores_LV.masked_fill(out_LV.scatter(1, order_LV, out_LV), NEVER)
        return scores_LV


def _normalised(scores_LV: Tensor) -> Tensor:
    """Log-probabilities; a row of nothing but -inf stays one."""
    return scores_LV.log_softmax(1).masked_fill(scores_LV == NEVER, NEVER)
