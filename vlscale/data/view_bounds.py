"""What the groups of a unified step can cost, before any is drawn: bounds for dealing, and a mean to plan by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.beside import ViewTable
from vlscale.data.chunks import slices
from vlscale.data.expansion import IMAGE_SLOT, Expansion
from vlscale.data.lengths import SPECIALS
from vlscale.data.source import PlanSettings, Source
from vlscale.data.survey import Histogram
from vlscale.data.views import most_fragments

_TEXTS = 1 << 18
"""Texts that are looked at together: each may have dozens of views."""


@dataclass(frozen=True, eq=False)
class GroupBounds:
    """What the groups of one dataset cost, over all its units that take part.

    Attributes:
        most: the most that each unit's group can cost.
        least: the least that any group can cost.
        views: rewritten captions that can be drawn; left_out: those with more word pieces than
            ``data.max_text_tokens``, which never are.
        largest: what is long in the unit whose group can cost most, in words.
    """

    most: Histogram
    least: int
    views: int
    left_out: int
    largest: str


def group_bounds(number: int, source: Source, settings: PlanSettings, expansion: Expansion) -> GroupBounds:
    """Look over the lengths of one dataset, which is number ``number`` of ``expansion``."""
    most, heaviest, least, largest = Histogram(), 0, np.iinfo(np.int64).max, ""
    rewrites = source.beside.rewrites if source.lengths.kind == "pairs" and settings.views.contrast else None
    retrieved, views, left_out = _retrieved(number, settings, expansion), 0, 0
    for part in slices(len(source.lengths), _TEXTS):
        rewritten = _rewritten(rewrites, part, settings)
        views, left_out = views + rewritten.kept, left_out + rewritten.left_out
        inside = np.flatnonzero(source.lengths.tokens[part] <= settings.max_text_tokens)
        if not len(inside):
            continue
        rows = part.start + inside
        whole, generated, image = _sizes(source, rows, settings)
        high, low = whole + generated, whole + (generated if settings.views.seq2seq_share == 1 else 0)
        low = np.where(image > 0, whole, low)  # regions may be masked instead
        if settings.views.contrast and not source.lengths.images_only:
            alone = whole * (2 if settings.views.alone else 1)
            views_of = alone + rewritten.tokens[inside] + rewritten.count[inside] * image + retrieved
            high = high + np.where(image > 0, views_of, 0)
            low = low + np.where(image > 0, alone, 0)
        at = int(high.argmax())
        if int(high[at]) > heaviest:
            heaviest = int(high[at])
            largest = _described(source, int(rows[at]), int(image[at]), int(rewritten.tokens[inside[at]]), retrieved)
        most.add(high)
        least = min(least, int(low.min()))
    return GroupBounds(most, least, views, left_out, largest)


@dataclass(frozen=True, eq=False)
class _Rewritten:
    """Rewritten captions of T texts.

    Attributes:
        tokens: int64 [T], most tokens of those that a group can have, [CLS] and [SEP] included; count: their number.
        kept, left_out: views of all T texts that are short enough, and that are not.
    """

    tokens: NDArray[np.int64]
    count: NDArray[np.int64]
    kept: int = 0
    left_out: int = 0


def _rewritten(rewrites: ViewTable | None, part: slice, settings: PlanSettings) -> _Rewritten:
    """Bound each text by its own longest views that are short enough."""
    none = np.zeros(part.stop - part.start, np.int64)
    if rewrites is None:
        return _Rewritten(none, none)
    ptr = np.asarray(rewrites.ptr[part.start : part.stop + 1], np.int64)
    tokens = np.asarray(rewrites.view_tokens[ptr[0] : ptr[-1]])
    says_the_same = np.asarray(rewrites.view_positive[ptr[0] : ptr[-1]]) == 1
    fits = tokens <= settings.max_text_tokens
    total, count = none.copy(), none.copy()
    has = np.flatnonzero(np.diff(ptr))  # reduceat knows no empty parts
    firsts = (ptr[:-1] - ptr[0])[has]
    for wanted, right in ((settings.views.positives, says_the_same), (settings.views.negatives, ~says_the_same)):
        if not wanted or not len(has):
            continue
        usable = fits & right
        longest = np.maximum.reduceat(np.where(usable, tokens + np.int32(SPECIALS), 0), firsts)
        found = np.minimum(np.add.reduceat(usable, firsts, dtype=np.int64), wanted)
        total[has] += longest * found
        count[has] += found
    kept = int(np.count_nonzero(fits))
    return _Rewritten(total, count, kept, len(tokens) - kept)


def _described(source: Source, row: int, image: int, rewritten: int, retrieved: int) -> str:
    """What a unit's group can hold, in words."""
    if source.lengths.images_only:
        return f"image row {row}: {image - IMAGE_SLOT} regions"
    parts = [f"text row {row}: {int(source.lengths.tokens[row])} word pieces"]
    parts += [f"{image - IMAGE_SLOT} regions"] if image else []
    parts += [f"rewritten captions of up to {rewritten} tokens in all"] if image and rewritten else []
    parts += [f"retrieved views of up to {retrieved} tokens in all"] if image and retrieved else []
    return ", ".join(parts)


def _sizes(
    source: Source, rows: NDArray[np.int64], settings: PlanSettings
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens of the units ``rows`` with their images, of them the image's, and what generated fragments may add."""
    lengths, chosen = source.lengths, settings.views
    first = lengths.first_image(rows)
    image = np.zeros(len(rows), np.int64)
    if len(lengths.regions):
        image = np.where(first >= 0, np.minimum(lengths.regions[first], settings.max_regions) + IMAGE_SLOT, 0)
    whole = lengths.tokens[rows] + lengths.specials + image
    if lengths.images_only or not chosen.seq2seq_share:
        return whole, np.zeros_like(whole), image
    added = 2 * most_fragments(lengths.tokens[rows], chosen.seq2seq_probability, chosen.shortest_fragment)
    never = (image > 0) & (chosen.pair_visual_share == 1)
    return whole, np.where(never, 0, added), image


def _retrieved(number: int, settings: PlanSettings, expansion: Expansion) -> int:
    """Most tokens of all retrieved views of a pair."""
    images, texts = (expansion.collection(number, kind) for kind in ("images", "texts"))
    total = 0
    if images is not None:
        regions = min(int(images.lengths.regions.max(initial=0)), settings.max_regions)
        total += expansion.wanted("images") * (regions + IMAGE_SLOT)
    if texts is not None:
        total += expansion.wanted("texts") * texts.survey.words.most
    return total
