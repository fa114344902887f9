"""The search for the largest budget that fits: which one to try next, and what has been found."""

from __future__ import annotations

from dataclasses import dataclass

from vlscale.plan.memory import Withheld

MARGIN = 0.97
"""Share of the room beyond the states that a budget found by a line through two peaks may take."""
CLOSE = 0.03
"""The search ends where the largest budget that fits and the least that does not are so close."""


@dataclass(frozen=True)
class Found:
    """The largest budget.

    Attributes:
        tokens: ``batch.micro_batch_tokens``; predicted: what the memory model said beforehand.
        tried: (tokens, peak bytes or None where it did not fit) in the order of the trials.
        bounded: ``memory``; ``step`` where a whole step already fits, so that more would change nothing.
        extrapolated: the budget itself was not run, it would have taken too long.
        limit: bytes that were there; withheld: of those, what a real run needs beside.
    """

    tokens: int
    predicted: int
    tried: tuple[tuple[int, float | None], ...]
    bounded: str
    extrapolated: bool
    limit: float
    withheld: Withheld

    @property
    def fitted(self) -> list[int]:
        """Tokens of the trials that fit, rising."""
        return sorted(tokens for tokens, peak in self.tried if peak is not None)

    @property
    def largest(self) -> int:
        """Tokens of the largest trial that fits."""
        return self.fitted[-1]

    @property
    def kept(self) -> bool:
        """Whether ``tokens`` is more than a whole step takes: the recipe says so, and it changes nothing."""
        return self.bounded == "step" and not self.extrapolated and self.tokens > self.largest

    @property
    def origin(self) -> str:
        """What an extrapolated budget follows from, in words."""
        least, most = self.fitted[0], self.largest
        if least == most:
            return f"from one peak, of {most} tokens, and the bytes per token that are predicted beyond it"
        return f"from a line through the peaks of {least} and {most} tokens"


class Ladder:
    """Trials so far, and what to try next.

    Args:
        floor, cap: the least and the most tokens that make sense.
        limit: bytes; withheld: of those, what a trial must leave.
        slope: predicted bytes per token, used where only one trial has fitted.
    """

    def __init__(
        self, floor: int, cap: int, limit: float, withheld: Withheld | None = None, slope: float = 0.0
    ) -> None:
        self._floor, self._cap, self._slope = floor, cap, slope
        self._limit, self._withheld = limit, withheld or Withheld()
        self._room = limit - self._withheld.total
        self.tried: list[tuple[int, float | None]] = []

    def add(self, tokens: int, peak: float | None) -> None:
        """Note a trial; ``peak`` is None where memory ran out. One beyond the room does not count as fitting either."""
        self.tried.append((tokens, None if peak is None or peak > self._room else peak))

    @property
    def good(self) -> list[tuple[int, float]]:
        """Trials that fit, rising."""
        return sorted((tokens, peak) for tokens, peak in self.tried if peak is not None)

    @property
    def bad(self) -> int:
        """The least budget that did not fit; above the cap if all did."""
        return min((tokens for tokens, peak in self.tried if peak is None), default=self._cap + 1)

    @property
    def hopeless(self) -> bool:
        """The least budget does not fit."""
        return self.bad <= self._floor

    def following(self) -> int | None:
        """Return the next budget to try; None where the search is done."""
        if not self.good:
            return max(self._floor, int(self.bad * 0.7))
        most = self.good[-1][0]
        if most >= self._cap or (self.bad - most) <= max(1, CLOSE * most) or len(self.tried) > 12:
            return None
        line = self.line()
        guess = min(self._cap, line if line is not None else 2 * most)
        if guess <= most * (1 + CLOSE):
            return None if line is not None and len(self.good) > 1 and self.bad > self._cap else self._between(most)
        return guess if guess < self.bad else self._between(most)

    def _between(self, most: int) -> int | None:
        middle = (most + self.bad) // 2
        return middle if middle > most else None

    def line(self) -> int | None:
        """Tokens at which a line through two peaks, or one, reaches the limit, with a margin; None before any."""
        if not self.good or (len(self.good) < 2 and not self._slope):
            return None
        (least, low), (most, high) = self.good[0], self.good[-1]
        slope = max((high - low) / (most - least), 1e-9) if len(self.good) > 1 else self._slope
        return int(most + MARGIN * max(0.0, self._room - high) / slope)

    def found(self, predicted: int, extrapolated: bool) -> Found:
        """Return the outcome: the largest that was run, or, where that takes too long, what the line says."""
        most = self.good[-1][0]
        if extrapolated:
            most = max(most, min(self.line() or most, self._cap, max(most, self.bad - 1)))
        bounded = "step" if most >= self._cap else "memory"
        return Found(most, predicted, tuple(self.tried), bounded, extrapolated, self._limit, self._withheld)
