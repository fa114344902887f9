"""UNITER's token-bucket batches, as its public code cuts them, for runs that have to repeat a published one.

Ids are shuffled and cut into buckets; a bucket is sorted, longest first, and walked eight examples at a time. A batch
ends where ``longest length so far x (examples + 8)`` would exceed the budget. "So far" is meant since the bucket began:
the maximum is not reset when a batch ends. With the longest first, it stays at the bucket's longest example, so every
batch of a bucket holds equally many examples and most fill about a third of the budget. At the end the batches are
shuffled. Lengths count word pieces and regions, without [CLS] and [SEP].

Source: UNITER's TokenBucketSampler, at its training settings: buckets of 8192, multiples of 8, left-overs dropped.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import SPECIALS, DatasetLengths
from vlscale.data.order import Taken, Window
from vlscale.errors import VlscaleError

BUCKET = 8192
MULTIPLE = 8
_CACHED_PASSES = 2


@dataclass(frozen=True, eq=False)
class TokenBuckets:
    """One pass in batches.

    Attributes:
        rows: int64 [n], places in the given lengths, batch after batch.
        ends: int64 [B], where each batch ends in ``rows``.
        dropped: examples in the buckets' left-overs, which no batch holds.
    """

    rows: NDArray[np.int64]
    ends: NDArray[np.int64]
    dropped: int


def token_buckets(
    lengths: NDArray[np.int32],
    budget: int,
    generator: random.Random,
    bucket: int = BUCKET,
    multiple: int = MULTIPLE,
    drop_last: bool = True,
) -> TokenBuckets:
    """Cut one pass into UNITER's batches.

    Args:
        lengths: int32 [n], word pieces and regions of each example.
        budget: most ``longest x examples`` of a batch.
        generator: Python's generator, whose two shuffles decide the order.
        bucket: examples that are sorted together.
        multiple: examples by which batches grow.
        drop_last: drop what is left at the end of each bucket.

    Raises:
        VlscaleError: one group of ``multiple`` examples exceeds the budget.
    """
    order = list(range(len(lengths)))
    generator.shuffle(order)
    ids = np.array(order, np.int64)
    batches: list[NDArray[np.int64]] = []
    dropped = 0
    for begin in range(0, len(ids), bucket):
        part = ids[begin : begin + bucket]
        part = part[np.argsort(-lengths[part].astype(np.int64), kind="stable")]
        longest = int(lengths[part[0]])
        groups = budget // longest // multiple
        if not groups:
            raise VlscaleError(
                f"batch.micro_batch_tokens {budget} is less than {multiple} examples of {longest} tokens, by which "
                f"UNITER's batches grow; raise it to at least {multiple * longest}"
            )
        size = groups * multiple
        # What is left when the bucket ends is dropped even where it happens to be a full batch.
        whole = (len(part) - 1) // size * size if drop_last else len(part)
        dropped += len(part) - whole
        batches += [part[first : min(first + size, whole)] for first in range(0, whole, size)]
    generator.shuffle(batches)
    ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)
    rows = np.concatenate(batches) if batches else np.empty(0, np.int64)
    return TokenBuckets(rows, ends, dropped)


class ReferenceOrder:
    """The order of a data set in UNITER's batches, pass after pass; holds a whole pass at a time.

    Every pass draws from a generator of its own, so that it can be entered without those before it (the original goes
    on with one generator). Positions count texts and stand between batches.

    Args:
        lengths: the dataset.
        seed: the recipe's seed.
        budget: see :func:`token_buckets`.
        max_text_tokens: texts with more word pieces are left out of every pass.
        max_regions: the first n regions of an image are used.

    Attributes:
        dropped: texts that the first pass drops; mean_batch: examples of its batches, on average.
    """

    def __init__(self, lengths: DatasetLengths, seed: int, budget: int, max_text_tokens: int, max_regions: int) -> None:
        self._lengths, self._seed, self._budget = lengths, seed, budget
        self._rows = np.flatnonzero(lengths.tokens <= max_text_tokens)
        costs = lengths.costs(self._rows, lengths.first_image(self._rows), max_regions)
        self._costs = costs - np.int32(SPECIALS)
        self._recent: OrderedDict[int, tuple[Window, NDArray[np.int64]]] = OrderedDict()
        first = self._cut(0)
        self.dropped = first.dropped
        self.mean_batch = len(first.rows) / len(first.ends)

    def __len__(self) -> int:
        """Texts that may be met in a pass; a pass drops a few of them."""
        return len(self._rows)

    def twin(self) -> ReferenceOrder:
        """Return the same order for another thread."""
        other = copy.copy(self)
        other._recent = OrderedDict()
        return other

    def batches(self, pass_index: int, offset: int, count: int) -> tuple[Taken, NDArray[np.int32]]:
        """Return the next ``count`` batches from place ``offset`` of a pass, and int32 [n] the batch of each text.

        Raises:
            VlscaleError: no batch begins at ``offset``.
        """
        if offset and offset not in self._pass(pass_index)[1][:-1]:
            raise VlscaleError(
                f"resume state: no batch of dataset {self._lengths.name} begins at text {offset} of pass {pass_index}; "
                f"the data set or its settings have changed since: start a new run"
            )
        rows: list[NDArray[np.int64]] = []
        passes: list[NDArray[np.int64]] = []
        pieces: list[tuple[int, int, Window]] = []
        sizes: list[int] = []
        done = 0
        while len(sizes) < count:
            window, ends = self._pass(pass_index)
            first = int(np.searchsorted(ends, offset, side="right"))
            chosen = np.diff(np.r_[offset, ends[first : first + count - len(sizes)]])
            size = int(chosen.sum())
            rows.append(window.rows[offset : offset + size])
            passes.append(np.full(size, pass_index, np.int64))
            pieces.append((done, done + size, window))
            sizes += chosen.tolist()
            done, offset = done + size, offset + size
            if offset == len(window.rows):
                pass_index, offset = pass_index + 1, 0
        taken = Taken(np.concatenate(rows), np.concatenate(passes), pieces)
        return taken, np.repeat(np.arange(count, dtype=np.int32), sizes)

    def advance(self, pass_index: int, offset: int, count: int) -> tuple[int, int]:
        """Return the (pass, offset) that ``count`` texts further lead to."""
        offset += count
        while offset >= (size := len(self._pass(pass_index)[0].rows)):
            pass_index, offset = pass_index + 1, offset - size
        return pass_index, offset

    def _pass(self, pass_index: int) -> tuple[Window, NDArray[np.int64]]:
        if pass_index not in self._recent:
            found = self._cut(pass_index)
            self._recent[pass_index] = Window(self._lengths, self._rows[found.rows]), found.ends
            while len(self._recent) > _CACHED_PASSES:
                self._recent.popitem(last=False)
        return self._recent[pass_index]

    def _cut(self, pass_index: int) -> TokenBuckets:
        generator = random.Random(f"{self._seed}\0{self._lengths.name}\0{pass_index}")
        found = token_buckets(self._costs, self._budget, generator)
        if not len(found.rows):
            raise VlscaleError(
                f"dataset {self._lengths.name}: {len(self._rows)} texts are fewer than one of UNITER's batches; lower "
                f"batch.micro_batch_tokens, or set batch.mode to packed"
            )
        return found
