"""Order of a pass over one dataset: windows of shuffled shards, inside them rounds of at most one text per image.

A pass shuffles the dataset's blocks (text shards, see :mod:`vlscale.data.survey`) and takes them ``window_shards`` at a
time. In a window every image's texts are put in random order; round r has the r-th text of each image that has so many,
shuffled; then comes round r + 1. So a round meets an image at most once, and everything in a window is met before the
next window begins: its shards are read, or downloaded, once per pass. A wider window spreads an image's texts further.

All of it is a pure function of (seed, dataset, pass, window). A window is worked out when it is first touched, from its
own rows of the side files; of the rest of the pass only one number per shard is held. Going on from the middle of a
pass of a billion texts costs one window.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import DatasetLengths
from vlscale.data.survey import Survey

ORDER_VERSION = 2
"""Part of a plan's fingerprint: a checkpoint goes on only under the order that it was written under."""

_CACHED_PASSES = 2
_CACHED_WINDOWS = 3

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


@dataclass(frozen=True, eq=False)
class Window:
    """The texts of one window of a pass.

    Attributes:
        lengths: the dataset.
        rows: int64 [n], its text rows in the order in which they are met.
    """

    lengths: DatasetLengths
    rows: NDArray[np.int64]

    @cached_property
    def images(self) -> NDArray[np.int64]:
        """int64, the images that its texts are paired with, ascending."""
        found = np.unique(self.lengths.first_image(self.rows))
        return found[np.searchsorted(found, 0) :]


@dataclass(frozen=True, eq=False)
class Taken:
    """Consecutive texts of the order.

    Attributes:
        rows: int64 [n], text rows.
        passes: int64 [n], the pass that each belongs to.
        pieces: ``(begin, end, window)``: texts ``begin`` to ``end`` of these come from one window.
    """

    rows: NDArray[np.int64]
    passes: NDArray[np.int64]
    pieces: list[tuple[int, int, Window]]


@dataclass(frozen=True, eq=False)
class _Pass:
    """One pass, still without its texts: blocks in shuffled order, and per window the end among them and in texts."""

    blocks: NDArray[np.int64]
    block_ends: NDArray[np.int64]
    text_ends: NDArray[np.int64]


class PassOrder:
    """The order in which the texts of a dataset are met, pass after pass.

    Args:
        lengths: the dataset.
        survey: what a look over it has found.
        seed: the recipe's seed.
        window_shards: text shards whose texts are shuffled together. Windows of a pass are alike: 17 shards in windows
            of at most 16 are 9 and 8.
        max_text_tokens: texts with more word pieces are left out of every pass.
    """

    def __init__(
        self, lengths: DatasetLengths, survey: Survey, seed: int, window_shards: int, max_text_tokens: int
    ) -> None:
        self._lengths, self._survey = lengths, survey
        self._seed = seed
        self._longest = max_text_tokens
        self._total = survey.total
        self._windows = max(1, -(-len(survey.eligible) // window_shards))
        self._passes: OrderedDict[int, _Pass] = OrderedDict()
        self._recent: OrderedDict[tuple[int, int], Window] = OrderedDict()

    def __len__(self) -> int:
        """Texts in a pass."""
        return self._total

    def twin(self) -> PassOrder:
        """Return the same order for another thread: what an order remembers is not safe to share."""
        other = copy.copy(self)
        other._passes, other._recent = OrderedDict(), OrderedDict()
        return other

    def take(self, pass_index: int, offset: int, count: int) -> Taken:
        """Return the next ``count`` texts from place ``offset`` of a pass, going over its end into the next ones."""
        rows, passes = np.empty(count, np.int64), np.empty(count, np.int64)
        pieces: list[tuple[int, int, Window]] = []
        done = 0
        while done < count:
            ends = self._pass(pass_index).text_ends
            number = int(np.searchsorted(ends, offset, side="right"))
            window = self.window(pass_index, number)
            begin = offset - (int(ends[number]) - len(window.rows))
            piece = window.rows[begin : begin + count - done]
            rows[done : done + len(piece)] = piece
            passes[done : done + len(piece)] = pass_index
            pieces.append((done, done + len(piece), window))
            done += len(piece)
            offset += len(piece)
            if offset == len(self):
                pass_index, offset = pass_index + 1, 0
        return Taken(rows, passes, pieces)

    def advance(self, pass_index: int, offset: int, count: int) -> tuple[int, int]:
        """Return the (pass, offset) that ``count`` texts further lead to."""
        more, offset = divmod(offset + count, len(self))
        return pass_index + more, offset

    def window(self, pass_index: int, number: int) -> Window:
        """Return window ``number`` of a pass."""
        found = _recall(self._recent, (pass_index, number))
        if found is None:
            rows = self._shuffled(self._rows(pass_index, number), pass_index, number)
            found = _remember(self._recent, (pass_index, number), Window(self._lengths, rows), _CACHED_WINDOWS)
        return found

    def _pass(self, pass_index: int) -> _Pass:
        found = _recall(self._passes, pass_index)
        if found is None:
            count = len(self._survey.eligible)
            blocks = np.argsort(self._raw("shard", pass_index, count=count), kind="stable")
            block_ends = np.arange(1, self._windows + 1) * count // self._windows
            texts = np.r_[0, np.cumsum(self._survey.eligible[blocks])]
            found = _remember(self._passes, pass_index, _Pass(blocks, block_ends, texts[block_ends]), _CACHED_PASSES)
        return found

    def _rows(self, pass_index: int, number: int) -> NDArray[np.int64]:
        """int64 [n], the eligible rows of a window, ascending."""
        order = self._pass(pass_index)
        begin = int(order.block_ends[number - 1]) if number else 0
        pieces = []
        for block in np.sort(order.blocks[begin : order.block_ends[number]]).tolist():
            first, last = self._survey.edges[block : block + 2].tolist()
            pieces.append(first + np.flatnonzero(self._lengths.tokens[first:last] <= self._longest))
        return np.concatenate(pieces)

    def _shuffled(self, rows: NDArray[np.int64], pass_index: int, number: int) -> NDArray[np.int64]:
        """``rows`` in rounds, each with at most one text per image, shuffled inside."""
        unit = self._lengths.first_image(rows)
        # A text without an image is a unit of its own.
        unit = np.where(unit < 0, len(self._lengths.regions) + rows, unit)
        if not np.all(unit[1:] >= unit[:-1]):  # the builder orders texts by image
            by_unit = np.argsort(unit, kind="stable")
            rows, unit = rows[by_unit], unit[by_unit]
        starts = np.r_[True, unit[1:] != unit[:-1]][: len(unit)]
        turns = np.zeros(len(rows), np.int64)
        if not starts.all():
            number_of_unit = np.cumsum(starts) - 1
            raw = self._raw("texts of an image", pass_index, number, count=len(rows))
            rows = rows[_shuffle_within(number_of_unit, raw)]
            turns = np.arange(len(rows)) - np.flatnonzero(starts)[number_of_unit]
        return rows[_shuffle_within(turns, self._raw("text", pass_index, number, count=len(rows)))]

    def _raw(self, purpose: str, *numbers: int, count: int) -> NDArray[np.uint64]:
        """uint64 [count], raw words of NumPy's Philox4x64 (a frozen stream, unlike ``Generator``'s methods)."""
        text = "\0".join([str(self._seed), self._lengths.name, "order", purpose, *map(str, numbers)])
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        return np.random.Philox(key=key).random_raw(count)


def _shuffle_within(group: NDArray[np.int64], raw: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return int64 [n], the indices sorted by group and shuffled within each by the random words ``raw``.

    Group, random bits and index share one word, so that a plain sort of unique values does it: it is fast, and no
    processor's way of treating ties can change the order.
    """
    index_bits = max(1, (len(group) - 1).bit_length())
    group_bits = int(group.max(initial=0)).bit_length()
    mask = np.uint64((1 << index_bits) - 1)
    words = (raw >> np.uint64(group_bits)) & ~mask
    if group_bits:
        words |= group.astype(np.uint64) << np.uint64(64 - group_bits)
    words |= np.arange(len(group), dtype=np.uint64)
    words.sort()
    return (words & mask).astype(np.int64)


def _recall(cache: OrderedDict[_K, _V], key: _K) -> _V | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)


def _remember(cache: OrderedDict[_K, _V], key: _K, value: _V, limit: int) -> _V:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
    return value
