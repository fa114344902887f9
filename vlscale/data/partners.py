"""Labels and partners of image-text matching: which examples become negatives, and with whom.

UNITER replaces the image of a negative; the paper speaks of image or text. Either way the pair that comes out never
shares an image id: the text refers to the image neither first nor in another place.

Partners come from the window of the order that the example stands in (thousands of images for ordinary shards), so
that a negative costs no shard that is not being read anyway. Where a window holds few images, they come from the whole
dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import DatasetLengths
from vlscale.data.order import Taken, Window
from vlscale.data.random import Draws
from vlscale.data.survey import Survey
from vlscale.errors import VlscaleError

FEW_IMAGES = 64
"""A window with fewer images is too poor to draw negatives from."""

_TRIALS = 32
"""Re-draws before the few examples that are still without a partner get one from an explicit list."""


@dataclass(frozen=True)
class _Pool:
    """What partners are drawn from: int64 image rows, and int64 text rows."""

    images: NDArray[np.int64]
    texts: NDArray[np.int64]


class Partners:
    """Draws labels and partners for one dataset, keyed by (pass, text row), from the window that the row stands in.

    Args:
        lengths: the dataset; every text that takes part has an image.
        survey: what a look over it has found.
        draws: random numbers of (seed, dataset).
        negative_probability: share of negatives.
        replace: ``image``, ``text`` or ``both`` (a coin per negative).
        max_text_tokens: longer texts are not drawn as partners either.

    Raises:
        VlscaleError: negatives are wanted and there is only one image to choose from.
    """

    def __init__(
        self,
        lengths: DatasetLengths,
        survey: Survey,
        draws: Draws,
        negative_probability: float,
        replace: str,
        max_text_tokens: int,
    ) -> None:
        self._lengths = lengths
        self._draws = draws
        self._probability = negative_probability
        self._replace = replace
        self._longest = max_text_tokens
        if negative_probability > 0:
            if replace in ("image", "both") and len(lengths.regions) < 2:
                raise VlscaleError(self._lonely("1 image"))
            if replace in ("text", "both") and survey.one_image:
                raise VlscaleError(self._lonely("texts of 1 image"))

    def _lonely(self, found: str) -> str:
        return (
            f"dataset {self._lengths.name}: task itm needs negatives, but the dataset holds only {found}; add images, "
            f"set objectives.itm.negative_probability to 0, or drop itm from its mix"
        )

    @cached_property
    def _everything(self) -> _Pool:
        """The whole dataset; only ever needed where windows hold few images."""
        return _Pool(np.arange(len(self._lengths.regions)), np.flatnonzero(self._lengths.tokens <= self._longest))

    def _pool(self, window: Window) -> _Pool:
        if len(window.images) < FEW_IMAGES:
            return self._everything
        return _Pool(window.images, window.rows)

    def draw(self, taken: Taken) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
        """Return (texts int64 [B], images int64 [B], labels int8 [B]) for consecutive texts of the order."""
        rows, passes = taken.rows, taken.passes
        chance = self._draws.uniform("itm_label", passes, rows)
        negative = chance[:, 0] < self._probability
        by_text = negative & (chance[:, 1] < {"image": 0.0, "both": 0.5, "text": 1.0}[self._replace])
        texts, images = rows.copy(), self._lengths.first_image(rows)
        for begin, end, window in taken.pieces:
            inside = slice(begin, end)
            which = begin + np.flatnonzero(by_text[inside])
            if len(which):
                texts[which] = self._other_texts(rows[which], passes[which], images[which], self._pool(window))
            which = begin + np.flatnonzero(negative[inside] & ~by_text[inside])
            if len(which):
                images[which] = self._other_images(rows[which], passes[which], self._pool(window))
        return texts, images, np.where(negative, 0, 1).astype(np.int8)

    def _other_images(self, rows: NDArray[np.int64], passes: NDArray[np.int64], pool: _Pool) -> NDArray[np.int64]:
        """int64 [B], uniform over the pool's images that each text does not refer to."""
        lengths = self._lengths
        found = np.empty(len(rows), np.int64)
        open_ = np.arange(len(rows))
        for trial in range(_TRIALS):
            if not len(open_):
                return found
            drawn = self._draws.below("itm_image", len(pool.images), passes[open_], rows[open_], trial)
            found[open_] = pool.images[drawn]
            open_ = open_[lengths.refers_to(rows[open_], found[open_])]
        for place in open_:
            own = lengths.image_refs[lengths.image_ptr[rows[place]] : lengths.image_ptr[rows[place] + 1]]
            others = np.setdiff1d(pool.images, own)
            if not len(others):
                others = np.setdiff1d(self._everything.images, own)
            found[place] = self._choose("itm_image", others, passes[place], rows[place])
        return found

    def _other_texts(
        self, rows: NDArray[np.int64], passes: NDArray[np.int64], images: NDArray[np.int64], pool: _Pool
    ) -> NDArray[np.int64]:
        """int64 [B], uniform over the pool's texts that do not refer to each example's image."""
        found = np.empty(len(rows), np.int64)
        open_ = np.arange(len(rows))
        for trial in range(_TRIALS):
            if not len(open_):
                return found
            found[open_] = pool.texts[self._draws.below("itm_text", len(pool.texts), passes[open_], rows[open_], trial)]
            open_ = open_[self._lengths.refers_to(found[open_], images[open_])]
        for place in open_:
            others = self._strangers(pool.texts, images[place])
            if not len(others):
                others = self._strangers(self._everything.texts, images[place])
            found[place] = self._choose("itm_text", others, passes[place], rows[place])
        return found

    def _strangers(self, texts: NDArray[np.int64], image: int) -> NDArray[np.int64]:
        return texts[~self._lengths.refers_to(texts, np.full(len(texts), image))]

    def _choose(self, purpose: str, others: NDArray[np.int64], pass_index: int, row: int) -> int:
        if not len(others):
            raise VlscaleError(
                f"dataset {self._lengths.name}: text row {row} has no negative: everything else in the dataset shares "
                f"its image; drop itm from its mix"
            )
        return int(others[self._draws.below(purpose, len(others), pass_index, row, _TRIALS)])
