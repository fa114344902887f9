"""Survey: one look over a dataset's lengths before its first pass, from which every step's cost can be bounded.

What stays in memory is one number per shard and a few histograms of lengths. The lengths themselves stay in the
memory-mapped side files and are read again, a window at a time, when steps are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.chunks import slices
from vlscale.data.lengths import DatasetLengths
from vlscale.errors import VlscaleError

MOST_TOKENS = 1 << 24
"""Longest text that may take part: histograms have one entry per length."""

_SEARCH = 256


class Histogram:
    """How often each of the numbers 0, 1, 2 ... occurs."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(1, np.int64)

    def add(self, values: NDArray[np.int32]) -> None:
        """Count int32 [n] ``values``, none of them negative."""
        found = np.bincount(values, minlength=len(self.counts))
        found[: len(self.counts)] += self.counts
        self.counts = found

    @property
    def least(self) -> int:
        """The smallest number that occurs."""
        return int(np.flatnonzero(self.counts)[0])

    @property
    def most(self) -> int:
        """The largest number that occurs."""
        return int(np.flatnonzero(self.counts)[-1])

    @property
    def mean(self) -> float:
        """The mean of all numbers."""
        return float(self.counts @ np.arange(len(self.counts)) / self.counts.sum())

    def heaviest(self, count: int) -> int:
        """Largest sum of ``count`` consecutive picks from repeated passes over the numbers, each pass in any order."""
        times = 1 if count <= 1 else -(-(count - 1) // int(self.counts.sum())) + 1
        total, left = 0, count
        for value in np.flatnonzero(self.counts)[::-1].tolist():
            taken = min(left, int(self.counts[value]) * times)
            total, left = total + taken * value, left - taken
            if not left:
                break
        return total


@dataclass(frozen=True, eq=False)
class Survey:
    """What one look over N texts in S blocks has found; "eligible" are the texts that are not too long.

    A block is a text shard, its ends moved so that the texts of an image are never parted.

    Attributes:
        edges: int64 [S+1], the text rows at which blocks begin and end.
        eligible: int64 [S], eligible texts in each block.
        left_out: texts that are too long.
        words: costs of the eligible texts without regions ([CLS] and [SEP] included).
        regions: regions of each eligible text's own image, those that are used.
        costs: costs of the eligible texts with their own image.
        fewest_regions, most_regions: of any image of the dataset, those that are used.
        lonely: eligible texts without an image; first_lonely: the row of one of them, or -1.
        one_image: all eligible texts have the same first image.
    """

    edges: NDArray[np.int64]
    eligible: NDArray[np.int64]
    left_out: int
    words: Histogram
    regions: Histogram
    costs: Histogram
    fewest_regions: int
    most_regions: int
    lonely: int
    first_lonely: int
    one_image: bool

    @property
    def total(self) -> int:
        """Eligible texts."""
        return int(self.eligible.sum())


def survey(lengths: DatasetLengths, max_text_tokens: int, max_regions: int) -> Survey:
    """Look over a dataset.

    Args:
        lengths: the dataset.
        max_text_tokens: texts with more word pieces are not eligible.
        max_regions: the first n regions of an image are used.

    Raises:
        VlscaleError: a text that would take part is absurdly long.
    """
    edges = _edges(lengths)
    eligible = np.zeros(len(edges) - 1, np.int64)
    words, regions, costs = Histogram(), Histogram(), Histogram()
    firsts: list[int] = []
    lonely, first_lonely = 0, -1
    for part in slices(len(lengths)):
        rows = part.start + np.flatnonzero(lengths.tokens[part] <= max_text_tokens)
        if not len(rows):
            continue
        eligible += np.diff(np.searchsorted(rows, edges))
        tokens = lengths.tokens[rows]
        if int(tokens.max()) > MOST_TOKENS:
            raise VlscaleError(
                f"dataset {lengths.name}: text row {rows[tokens.argmax()]} has {tokens.max()} word pieces, more than "
                f"{MOST_TOKENS}; lower data.max_text_tokens"
            )
        first = lengths.first_image(rows)
        cost = lengths.costs(rows, first, max_regions)
        words.add(tokens + np.int32(lengths.specials))
        costs.add(cost)
        regions.add(cost - tokens - np.int32(lengths.specials))
        firsts += [int(first.min()), int(first.max())]
        missing = first < 0
        if first_lonely < 0 and missing.any():
            first_lonely = int(rows[int(np.argmax(missing))])
        lonely += int(missing.sum())
    total = int(eligible.sum())
    return Survey(
        edges=edges,
        eligible=eligible,
        left_out=len(lengths) - total,
        words=words,
        regions=regions,
        costs=costs,
        fewest_regions=min(int(lengths.regions.min(initial=max_regions)), max_regions),
        most_regions=min(int(lengths.regions.max(initial=0)), max_regions),
        lonely=lonely,
        first_lonely=first_lonely,
        one_image=len(set(firsts)) <= 1,
    )


def _edges(lengths: DatasetLengths) -> NDArray[np.int64]:
    """Edges of the text shards, each moved forward past the texts that share the image of the text before it."""
    total, found = len(lengths), [0]
    inner = np.unique(lengths.text_shards)
    inner = inner[(inner > 0) & (inner < total)]
    before, after = lengths.first_image(inner - 1), lengths.first_image(inner)
    parts = (before == after) & (before >= 0)
    for edge, image, moved in zip(inner.tolist(), before.tolist(), parts.tolist(), strict=True):
        if edge <= found[-1]:  # an earlier edge has moved past this one
            continue
        end = edge
        while moved and end < total:
            rows = np.arange(end, min(end + _SEARCH, total))
            other = np.flatnonzero(lengths.first_image(rows) != image)
            if len(other):
                end += int(other[0])
                break
            end += len(rows)
        if end < total:
            found.append(end)
    return np.array([*found, total] if total else found, np.int64)
