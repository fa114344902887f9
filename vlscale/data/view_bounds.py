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


@dataclass(frozen=True, eq=False)
class GroupBounds:
    """What the groups of one dataset cost, over all its units that take part.

    Attributes:
        most: the most that each unit's group can cost.
        least: the least that any group can cost.
        views: rewritten captions that can be drawn; left_out: those with more word pieces than
            ``data.max_text_tokens``, which never are.
    """

    most: Histogram
    least: int
    views: int
    left_out: int


def group_bounds(number: int, source: Source, settings: PlanSettings, expansion: Expansion) -> GroupBounds:
    """Look over the lengths of one dataset, which is number ``number`` of ``expansion``."""
    most, least = Histogram(), np.iinfo(np.int64).max
    rewrites = source.beside.rewrites if source.lengths.kind == "pairs" and settings.views.contrast else None
    longest, views, left_out = _longest_view(rewrites, settings.max_text_tokens)
    retrieved = _retrieved(number, settings, expansion)
    rewritten = (settings.views.positives + settings.views.negatives) if longest else 0
    for part in slices(len(source.lengths)):
        rows = part.start + np.flatnonzero(source.lengths.tokens[part] <= settings.max_text_tokens)
        if not len(rows):
            continue
        whole, generated, image = _sizes(source, rows, settings)
        high, low = whole + generated, whole + (generated if settings.views.seq2seq_share == 1 else 0)
        low = np.where(image > 0, whole, low)  # regions may be masked instead
        if settings.views.contrast and not source.lengths.images_only:
            views_of = whole * (2 if settings.views.alone else 1) + rewritten * (image + longest) + retrieved
            high = high + np.where(image > 0, views_of, 0)
            low = low + np.where(image > 0, whole * (2 if settings.views.alone else 1), 0)
        most.add(high)
        least = min(least, int(low.min()))
    return GroupBounds(most, least, views, left_out)


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


def _longest_view(rewrites: ViewTable | None, max_text_tokens: int) -> tuple[int, int, int]:
    """Tokens of the longest view that takes part ([CLS] and [SEP] included), how many do, and how many do not."""
    if rewrites is None:
        return 0, 0, 0
    longest = kept = 0
    tokens = rewrites.view_tokens
    for part in slices(len(tokens)):
        usable = tokens[part][tokens[part] <= max_text_tokens]
        kept += len(usable)
        longest = max(longest, int(usable.max(initial=0)))
    return (longest + SPECIALS if kept else 0), kept, len(tokens) - kept


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
