"""Labels and partners of image-text matching: which examples become negatives, and with whom.

UNITER replaces the image of a negative; the paper speaks of image or text. Either way the pair that comes out never
shares an image id: the text refers to the image neither first nor in another place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlscale.data.lengths import DatasetLengths
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError

_TRIALS = 32
"""Re-draws before the few examples that are still without a partner get one from an explicit list."""


class Partners:
    """Draws labels and partners for one dataset, keyed by (pass, text row) only.

    Args:
        lengths: the dataset; every text has an image.
        eligible: int64 [n], text rows that may be met at all (over-long ones are not drawn as partners either).
        draws: random numbers of (seed, dataset).
        negative_probability: share of negatives.
        replace: ``image``, ``text`` or ``both`` (a coin per negative).

    Raises:
        VlscaleError: negatives are wanted and there is only one image to choose from.
    """

    def __init__(
        self,
        lengths: DatasetLengths,
        eligible: NDArray[np.int64],
        draws: Draws,
        negative_probability: float,
        replace: str,
    ) -> None:
        self._lengths = lengths
        self._eligible = eligible
        self._draws = draws
        self._probability = negative_probability
        self._replace = replace
        if negative_probability > 0:
            first = lengths.first_image[eligible]
            if replace in ("image", "both") and len(lengths.regions) < 2:
                raise VlscaleError(self._lonely("1 image"))
            if replace in ("text", "both") and not np.any(first != first[:1]):
                raise VlscaleError(self._lonely("texts of 1 image"))

    def _lonely(self, found: str) -> str:
        return (
            f"dataset {self._lengths.name}: task itm needs negatives, but the dataset holds only {found}; add images, "
            f"set objectives.itm.negative_probability to 0, or drop itm from its mix"
        )

    def draw(
        self, rows: NDArray[np.int64], passes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
        """Return (texts int64 [B], images int64 [B], labels int8 [B]) for text rows met in given passes."""
        chance = self._draws.uniform("itm_label", passes, rows)
        negative = chance[:, 0] < self._probability
        by_text = negative & (chance[:, 1] < {"image": 0.0, "both": 0.5, "text": 1.0}[self._replace])
        texts, images = rows.copy(), self._lengths.first_image[rows]
        which = np.flatnonzero(by_text)
        texts[which] = self._other_texts(rows[which], passes[which], images[which])
        which = np.flatnonzero(negative & ~by_text)
        images[which] = self._other_images(rows[which], passes[which])
        return texts, images, np.where(negative, 0, 1).astype(np.int8)

    def _other_images(self, rows: NDArray[np.int64], passes: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B], uniform over the images that each text does not refer to."""
        lengths, count = self._lengths, len(self._lengths.regions)
        found = np.empty(len(rows), np.int64)
        open_ = np.arange(len(rows))
        for trial in range(_TRIALS):
            if not len(open_):
                return found
            found[open_] = self._draws.below("itm_image", count, passes[open_], rows[open_], trial)
            open_ = open_[lengths.refers_to(rows[open_], found[open_])]
        for place in open_:
            own = lengths.image_refs[lengths.image_ptr[rows[place]] : lengths.image_ptr[rows[place] + 1]]
            others = np.setdiff1d(np.arange(count), own)
            found[place] = self._choose("itm_image", others, passes[place], rows[place])
        return found

    def _other_texts(
        self, rows: NDArray[np.int64], passes: NDArray[np.int64], images: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """int64 [B], uniform over the texts that do not refer to each example's image."""
        lengths, eligible = self._lengths, self._eligible
        found = np.empty(len(rows), np.int64)
        open_ = np.arange(len(rows))
        for trial in range(_TRIALS):
            if not len(open_):
                return found
            found[open_] = eligible[self._draws.below("itm_text", len(eligible), passes[open_], rows[open_], trial)]
            open_ = open_[lengths.refers_to(found[open_], images[open_])]
        for place in open_:
            others = eligible[~lengths.refers_to(eligible, np.full(len(eligible), images[place]))]
            found[place] = self._choose("itm_text", others, passes[place], rows[place])
        return found

    def _choose(self, purpose: str, others: NDArray[np.int64], pass_index: int, row: int) -> int:
        if not len(others):
            raise VlscaleError(
                f"dataset {self._lengths.name}: text row {row} has no negative: everything else in the dataset shares "
                f"its image; drop itm from its mix"
            )
        return int(others[self._draws.below(purpose, len(others), pass_index, row, _TRIALS)])
