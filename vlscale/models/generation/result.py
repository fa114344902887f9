"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generated:
    """R texts for each of B examples, the best first.

    Attributes:
        sequences: int64 [B, R, L], generated tokens, ``bos_token_id`` and end token included, padded behind the end.
        lengths: int64 [B, R], tokens of each.
        finished: bool [B, R], whether it ended in an end token, and not at the largest length.
        scores: float32 [B, R], what the search ranked by: see ``GenerationSettings.scoring``; of greedy search and
            sampling the summed log-probability of the model (in sampling not that of the warped distribution).
        running_scores: float32 [B, R, L], the score after each token: worths of scoring ``official`` (the last one is
            ``scores``), else summed log-probabilities; 0 at ``bos_token_id``, behind the end the last one again.
    """

    sequences: Tensor
    lengths: Tensor
    finished: Tensor
    scores: Tensor
    running_scores: Tensor

    def tokens(self, example: int, which: int = 0) -> list[int]:
        """Tokens of one text, without padding."""
        found: list[int] = self.sequences[example, which, : int(self.lengths[example, which])].tolist()
        return found

    def best(self) -> list[list[int]]:
        """Tokens of the best text of every example."""
        rows, lengths = self.sequences[:, 0].tolist(), self.lengths[:, 0].tolist()
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]
