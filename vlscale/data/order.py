"""Order of a pass over one dataset: rounds of at most one text per image, inside them windows of shuffled shards.

Every image's texts are put in a random order that changes from pass to pass; round r holds the r-th text of each image
that has so many. So a round, and every window in it, meets an image at most once, and the 50 captions of a Visual
Genome image spread over the pass. Inside a round the shards are shuffled, taken ``window_shards`` at a time, and the
texts of such a window are shuffled; reading stays within a few shards for long.

All of it is a pure function of (seed, dataset, pass, round). A round is computed when it is first touched and costs a
few sorts of its own size, so going on from the middle of a pass costs one round, not the pass.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import DatasetLengths

PERMUTATIONS = 256
"""Random orders drawn per pass for images of equally many texts; each such image picks one of them."""

_CACHED_PASSES = 2
_CACHED_ROUNDS = 3

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class PassOrder:
    """The order in which the texts of a dataset are met, pass after pass.

    Args:
        lengths: the dataset.
        seed: the recipe's seed.
        window_shards: shards whose texts are shuffled together.
        max_text_tokens: texts with more word pieces are left out of every pass.

    Attributes:
        eligible: int64 [n], rows that take part, ascending.
        left_out: how many rows are too long to take part.
    """

    def __init__(self, lengths: DatasetLengths, seed: int, window_shards: int, max_text_tokens: int) -> None:
        self._seed = seed
        self._name = lengths.name
        self._window_shards = window_shards
        self._shard_count = len(lengths.text_shards) - 1
        self.eligible = np.flatnonzero(lengths.tokens <= max_text_tokens)
        self.left_out = len(lengths) - len(self.eligible)
        # A unit is an image with its texts; a text without an image is a unit of its own.
        unit = lengths.first_image[self.eligible]
        unit = np.where(unit < 0, len(lengths.regions) + self.eligible, unit)
        if np.all(unit[1:] >= unit[:-1]):  # the builder orders texts by image
            self._rows = self.eligible
        else:
            by_unit = np.argsort(unit, kind="stable")
            self._rows, unit = self.eligible[by_unit], unit[by_unit]
        self._shards = (np.searchsorted(lengths.text_shards, self._rows, side="right") - 1).astype(np.int32)
        starts = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]]) if len(unit) else np.zeros(0, np.int64)
        counts = np.diff(np.r_[starts, len(unit)]) if len(unit) else starts
        # Units with most texts first: round r is then the first so many of them.
        by_count = np.argsort(-counts, kind="stable")
        self._starts, self._counts = starts[by_count], counts[by_count]
        self._round_sizes = np.cumsum(np.bincount(counts)[:0:-1])[::-1] if len(counts) else starts
        self._round_ends = np.cumsum(self._round_sizes)
        self._picks: OrderedDict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = OrderedDict()
        self._rounds: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Texts in a pass."""
        return len(self.eligible)

    @property
    def units(self) -> int:
        """Images that have texts, and texts without an image: the size of the first round."""
        return len(self._counts)

    def take(self, pass_index: int, offset: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the next ``count`` texts from place ``offset`` of a pass, going over its end into the next ones.

        Returns:
            rows: int64 [count], text rows.
            passes: int64 [count], the pass that each belongs to.
        """
        rows, passes = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            round_index = int(np.searchsorted(self._round_ends, offset, side="right"))
            order = self._round(pass_index, round_index)
            begin = offset - (int(self._round_ends[round_index]) - len(order))
            piece = order[begin : begin + count - done]
            rows[done : done + len(piece)] = piece
            passes[done : done + len(piece)] = pass_index
            done += len(piece)
            offset += len(piece)
            if offset == len(self):
                pass_index, offset = pass_index + 1, 0
        return rows, passes

    def advance(self, pass_index: int, offset: int, count: int) -> tuple[int, int]:
        """Return the (pass, offset) that ``count`` texts further lead to."""
        more, offset = divmod(offset + count, len(self))
        return pass_index + more, offset

    def _round(self, pass_index: int, round_index: int) -> NDArray[np.int64]:
        """int64 [n], the text rows of one round in the order in which they are met."""
        cached = _recent(self._rounds, (pass_index, round_index))
        if cached is not None:
            return cached
        size = int(self._round_sizes[round_index])
        table, base = self._texts_of_units(pass_index)
        places = self._starts[:size] + table[base[:size] + round_index]
        raw = self._raw("shard", pass_index, round_index, count=self._shard_count)
        position = np.empty(self._shard_count, np.int64)
        position[np.argsort(raw, kind="stable")] = np.arange(self._shard_count)
        window = position[self._shards[places]] // self._window_shards
        order = self._rows[places][_shuffle_within(window, self._raw("text", pass_index, round_index, count=size))]
        return _remember(self._rounds, (pass_index, round_index), order, _CACHED_ROUNDS)

    def _texts_of_units(self, pass_index: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return a flat table of random orders and, per unit, where its order starts: ``table[base[u] + r]`` is the
        place of the round-r text among the texts of unit u.

        A table entry exists for min(256, images with k texts) orders of each k that occurs: never more than there
        are texts, usually a few thousand numbers.
        """
        cached = _recent(self._picks, pass_index)
        if cached is not None:
            return cached
        raw = self._raw("order of texts", pass_index, count=self.units)
        base = np.empty(self.units, np.int64)
        tables: list[NDArray[np.int32]] = []
        filled = begin = 0
        while begin < self.units:
            texts = int(self._counts[begin])
            end = int(np.searchsorted(-self._counts, -texts, side="right"))
            kinds = min(PERMUTATIONS, end - begin)
            keys = self._raw("orders", pass_index, texts, count=kinds * texts).reshape(kinds, texts)
            tables.append(np.argsort(keys, axis=1, kind="stable").astype(np.int32).ravel())
            base[begin:end] = filled + (raw[begin:end] % np.uint64(kinds)).astype(np.int64) * texts
            filled, begin = filled + kinds * texts, end
        return _remember(self._picks, pass_index, (np.concatenate(tables), base), _CACHED_PASSES)

    def _raw(self, purpose: str, *numbers: int, count: int) -> NDArray[np.uint64]:
        """uint64 [count], raw words of NumPy's Philox4x64 (a frozen stream, unlike ``Generator``'s methods)."""
        text = "\0".join([str(self._seed), self._name, "order", purpose, *map(str, numbers)])
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
        return np.random.Philox(key=key).random_raw(count)


def _shuffle_within(window: NDArray[np.int64], raw: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return int64 [n], the indices sorted by window and shuffled within each by the random words ``raw``.

    Window, random bits and index share one word, so that a plain sort of unique values does it: it is fast, and no
    processor's way of treating ties can change the order.
    """
    index_bits = max(1, (len(window) - 1).bit_length())
    window_bits = int(window.max(initial=0)).bit_length()
    mask = np.uint64((1 << index_bits) - 1)
    words = (raw >> np.uint64(window_bits)) & ~mask
    if window_bits:
        words |= window.astype(np.uint64) << np.uint64(64 - window_bits)
    words |= np.arange(len(window), dtype=np.uint64)
    words.sort()
    return (words & mask).astype(np.int64)


def _recent(cache: OrderedDict[_K, _V], key: _K) -> _V | None:
    if key in cache:
        cache.move_to_end(key)
    return cache.get(key)


def _remember(cache: OrderedDict[_K, _V], key: _K, value: _V, limit: int) -> _V:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)
    return value
