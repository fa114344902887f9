"""TF-IDF over captions: an inverted index that processes share by memory maps, and the captions nearest to one.

Weights are scikit-learn's defaults: words of two characters or more, smooth idf ``ln((1 + n) / (1 + df)) + 1``, rows of
length 1. A query walks the postings of its words, rarest first, and only the first ``most_postings`` of each: its cost
does not grow with the collection, and words that are everywhere ("a man") hardly count anyway.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlscale.data.index import read_array
from vlscale.errors import VlscaleError

_TERM = re.compile(r"\w\w+")
MOST_POSTINGS = 1000
"""Captions that are looked at per word of a query."""


def hashes_of(text: str) -> NDArray[np.uint64]:
    """uint64 [t], hashes of the words of a text, repeated as they are."""
    return np.asarray([xxhash.xxh3_64_intdigest(word) for word in _TERM.findall(text.lower())], np.uint64)


def merge_terms(parts: Sequence[Path], folder: Path) -> None:
    """Make the index of the parts' ``terms.npy`` and ``per_row.npy``; some 60 bytes per word of the captions in memory.

    Writes, for D words, N captions and P postings: ``term_hashes.npy`` uint64 [D] sorted, ``term_ptr.npy`` int64 [D+1],
    ``term_rows.npy`` int32 [P] (rising within a word), ``term_weights.npy`` float32 [P].
    """
    hashes = np.concatenate([np.load(part / "terms.npy", allow_pickle=False) for part in parts])
    per_row = np.concatenate([np.load(part / "per_row.npy", allow_pickle=False) for part in parts])
    count = len(per_row)
    known, ids = np.unique(hashes, return_inverse=True)
    owners = np.repeat(np.arange(count, dtype=np.int64), per_row)
    pairs, times = np.unique(ids.astype(np.int64) * count + owners, return_counts=True)
    terms, rows = np.divmod(pairs, max(count, 1))
    frequency = np.bincount(terms, minlength=len(known))
    weights = times * _idf(frequency, count)[terms]
    norms = np.sqrt(np.bincount(rows, weights**2, minlength=count))
    np.save(folder / "term_hashes.npy", known, allow_pickle=False)
    np.save(folder / "term_ptr.npy", np.append(0, np.cumsum(frequency)).astype(np.int64), allow_pickle=False)
    np.save(folder / "term_rows.npy", rows.astype(np.int32), allow_pickle=False)
    np.save(folder / "term_weights.npy", (weights / norms[rows]).astype(np.float32), allow_pickle=False)


def _idf(frequency: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.asarray(np.log((1 + count) / (1 + frequency)) + 1)


class TermIndex:
    """The captions nearest to a text; 8 bytes per caption in each process, beside memory maps that they share.

    Args:
        folder: where :func:`merge_terms` wrote, for ``captions`` rows.
        captions: number of captions N.
        most_postings: captions that are looked at per word.

    Raises:
        VlscaleError: the index is missing or damaged.
    """

    def __init__(self, folder: Path, captions: int, most_postings: int = MOST_POSTINGS) -> None:
        if not (folder / "term_ptr.npy").is_file():
            raise VlscaleError(f"{folder}: has no index of terms (texts without images?); sentences need one")
        # A memory map is indexed faster as what it is underneath.
        self._hashes = np.asarray(read_array(folder / "term_hashes.npy", "uint64"))
        self._ptr = np.asarray(read_array(folder / "term_ptr.npy", "int64", len(self._hashes) + 1))
        total = int(self._ptr[-1])
        self._rows = np.asarray(read_array(folder / "term_rows.npy", "int32", total))
        self._weights = np.asarray(read_array(folder / "term_weights.npy", "float32", total))
        self._sums = np.zeros(captions)
        self._captions = captions
        self._most = most_postings
        if total and (self._rows.min() < 0 or self._rows.max() >= captions):
            raise VlscaleError(
                f"{folder / 'term_rows.npy'}: names rows outside 0..{captions - 1}; run find_units again"
            )

    def nearest(self, text: str, count: int, start: int = 0) -> list[tuple[int, float]]:
        """Rows and cosines of the nearest captions, best first, then by row; fewer where no others share a word.

        Args:
            text: the query.
            count: how many; more than there are gives all.
            start: row from which long lists of captions are looked at, so that the queries of a large corpus do not
                all meet the same ones.
        """
        words = self._words_of(text)
        if not words:
            return []
        sums, met = self._sums, []
        for begin, end, weight in words:
            for low, high in self._window(begin, end, start):
                rows = self._rows[low:high]  # each once: they rise within a word
                before = sums[rows]
                met.append(rows[before == 0])
                sums[rows] = before + self._weights[low:high] * weight
        found = np.concatenate(met)
        cosines = sums[found]
        sums[found] = 0
        return _best(found, cosines, count)

    def cosines(self, text: str, rows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Cosines of a text and int32 [B] different ``rows``, float64 [B]: of all their words.

        Those of :meth:`nearest` leave out words of a caption at which it was not looked: they are lower bounds.
        """
        found = np.zeros(len(rows))
        for begin, end, weight in self._words_of(text):
            several = self._rows[begin:end]
            at = np.minimum(np.searchsorted(several, rows), end - begin - 1)
            has = several[at] == rows
            found[has] += self._weights[begin + at[has]] * weight
        return found

    def is_cut(self, text: str) -> bool:
        """Whether a word of the text has more captions than are looked at."""
        return any(end - begin > self._most for begin, end, _ in self._words_of(text))

    def _words_of(self, text: str) -> list[tuple[int, int, float]]:
        """Of each word of a text that captions have: first place of its list, the one behind the last, and weight."""
        terms, times = self._terms_of(text)
        begins, ends = self._ptr[terms], self._ptr[terms + 1]
        weights = times * _idf(ends - begins, self._captions)
        weights /= np.sqrt(np.sum(weights**2)) if len(weights) else 1
        return list(zip(begins.tolist(), ends.tolist(), weights.tolist(), strict=True))

    def _terms_of(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The words of a text that the captions have, and how often it has each."""
        hashes, times = np.unique(hashes_of(text), return_counts=True)
        at = np.searchsorted(self._hashes, hashes)
        known = at < len(self._hashes)
        known[known] = self._hashes[at[known]] == hashes[known]
        return at[known], times[known]

    def _window(self, begin: int, end: int, start: int) -> list[tuple[int, int]]:
        """At most ``most_postings`` places of a word's list, from row ``start`` on, wrapping around."""
        if end - begin <= self._most:
            return [(begin, end)]
        first = begin + int(np.searchsorted(self._rows[begin:end], np.int32(start)))
        stop = first + self._most
        return [(first, stop)] if stop <= end else [(first, end), (begin, begin + stop - end)]


def _best(rows: NDArray[np.int32], cosines: NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """The ``count`` best, best first, then by row; cosines are compared to six digits."""
    rounded = np.round(cosines, 6)
    if 0 < count < len(rows):
        least = np.partition(rounded, len(rows) - count)[len(rows) - count]
        kept = np.flatnonzero(rounded >= least)
        rows, cosines, rounded = rows[kept], cosines[kept], rounded[kept]
    order = np.lexsort((rows, -rounded))[:count]
    return list(zip(rows[order].tolist(), cosines[order].tolist(), strict=True))
