"""Expansion: a unit of a unified step becomes its rows (UNIMO, ACL 2021, section 2).

An image is one row whose regions are masked; a text is one row that is masked or generated. A pair is such a row, with
the other modality visible, and all its views: itself, rewritten captions that say the same or something false, its
image and caption alone, and images and texts that were retrieved for it. Which, is drawn from (seed, dataset, pass,
row). Nothing but lengths is read, and the lists of retrieved candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.beside import Modality
from vlscale.data.choosing import choose
from vlscale.data.lengths import SPECIALS, DatasetLengths
from vlscale.data.random import Draws
from vlscale.data.source import PlanSettings, Source, Step
from vlscale.data.store_base import within
from vlscale.data.views import UNIFIED, Role, Views, joined, most_fragments
from vlscale.errors import VlscaleError

EXPANSION_VERSION = 1
"""Part of a plan's fingerprint: a checkpoint goes on only with the rows that it was written under."""

IMAGE_SLOT = 1
"""[IMG], which every image of a batch carries and no store holds."""

_NONE = -1


@dataclass(frozen=True, eq=False)
class Units:
    """U units of a step, in the order in which they are met.

    Attributes:
        source: int64 [U], number of the dataset.
        rows: int64 [U], text rows (image rows of a dataset without texts).
        passes: int64 [U], pass of the dataset.
    """

    source: NDArray[np.int64]
    rows: NDArray[np.int64]
    passes: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of units U."""
        return len(self.rows)

    def behind(self, count: int) -> Units:
        """All but the first ``count``."""
        return Units(self.source[count:], self.rows[count:], self.passes[count:])


class _Table:
    """Rows in the making: columns unit, role, source, text, image, view."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.int64]] = []

    def add(
        self,
        unit: NDArray[np.int64],
        role: NDArray[np.int64] | int,
        source: int,
        text: NDArray[np.int64] | int = _NONE,
        image: NDArray[np.int64] | int = _NONE,
        view: NDArray[np.int64] | int = _NONE,
    ) -> None:
        """Append rows; what is one number is the same for all of them."""
        part = np.empty((6, len(unit)), np.int64)
        for place, column in enumerate((unit, role, source, text, image, view)):
            part[place] = column
        self._parts.append(part)

    def sorted(self) -> NDArray[np.int64]:
        """int64 [6, B], by unit, and by role within a unit; otherwise as they were added."""
        table = np.concatenate(self._parts, 1)
        return table[:, np.argsort(table[0] * len(Role) + table[1], kind="stable")]


def own_candidates(
    lengths: DatasetLengths, kind: Modality, texts: NDArray[np.int64], found: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """bool [K], which candidates int64 [K] ``found`` are the own of the ``texts`` int64 [K] that they were found for.

    All are rows of ``lengths``. A text's own are its images, itself, and the other texts of its first image.
    """
    if kind == "images":
        return lengths.refers_to(texts, found)
    image = lengths.first_image(texts)
    shared = np.zeros(len(texts), np.bool_)
    has = np.flatnonzero(image >= 0)
    shared[has] = lengths.refers_to(found[has], image[has])
    return shared | (found == texts)


class Expansion:
    """Turns units of several datasets into rows.

    Args:
        sources: name -> dataset, in the recipe's order; ``Units.source`` counts them.
        settings: the recipe's part of the plan.
        training: retrieved views are drawn, and every store that a recipe's views need has to be there. Otherwise
            (a validation set stands alone) retrieved views are left out, and so are rewritten ones without a store.

    Raises:
        VlscaleError: a store that the recipe's views need is missing, or names a collection that is not in the recipe.
    """

    def __init__(self, sources: Mapping[str, Source], settings: PlanSettings, training: bool = True) -> None:
        self._sources, self._names = list(sources.values()), tuple(sources)
        self._settings, self._views = settings, settings.views
        self._draws = [Draws(settings.seed, name) for name in self._names]
        self._collections: dict[tuple[int, Modality], int] = {}
        kinds: dict[Modality, int] = {"images": self._views.images, "texts": self._views.texts}
        self._retrieved = {kind: wanted if training else 0 for kind, wanted in kinds.items()}
        if training:
            self._require(kinds)

    def twin(self, sources: Mapping[str, Source]) -> Expansion:
        """The same over the sources of another thread."""
        other = Expansion(sources, self._settings, training=False)
        other._collections, other._retrieved = self._collections, self._retrieved
        return other

    def collection(self, source: int, kind: Modality) -> Source | None:
        """The dataset that ``source`` has its retrieved views of a kind from; None if it has none."""
        found = self._collections.get((source, kind))
        return None if found is None else self._sources[found]

    @property
    def drawn_from(self) -> frozenset[str]:
        """Names of the datasets that retrieved views are rows of."""
        return frozenset(self._names[found] for found in self._collections.values())

    def wanted(self, kind: Modality) -> int:
        """Retrieved views of a kind that a pair has at most."""
        return self._retrieved[kind]

    def _require(self, kinds: Mapping[Modality, int]) -> None:
        for number, source in enumerate(self._sources):
            if source.lengths.kind != "pairs" or not self._views.contrast:
                continue
            name, beside = source.lengths.name, source.beside
            if self._views.positives + self._views.negatives and beside.rewrites is None:
                raise VlscaleError(
                    f"dataset {name}: objectives.unified.contrast wants rewritten captions, but there is no "
                    f"{beside.root}/rewrites; run python -m data_tools.rewrite_captions {beside.root}, or set "
                    f"contrast.positives and contrast.negatives to 0"
                )
            for kind, wanted in kinds.items():
                if wanted:
                    self._collections[number, kind] = self._collection_of(source, number, kind)

    def _collection_of(self, source: Source, number: int, kind: Modality) -> int:
        name, beside = source.lengths.name, source.beside
        cure = f"or set objectives.unified.contrast.{kind} to 0"
        tool = f"run python -m data_tools.build_retrieval {beside.root}"
        found = None if beside.retrieved is None else beside.retrieved.collection(kind)
        if found is None:
            lacking = f"no {beside.root}/retrieved" if beside.retrieved is None else f"no {kind} in its retrieved/"
            raise VlscaleError(f"dataset {name}: retrieved {kind} are wanted, but there are {lacking}; {tool}, {cure}")
        others = [each for each in range(len(self._sources)) if each != number]
        for each in (number, *others):  # itself first: a copy under another name would do as well
            if self._sources[each].beside.digest_of(kind) == found.digest:
                return each
        raise VlscaleError(
            f"dataset {name}: its retrieved {kind} are rows of a store ({found.rows} rows, index {found.digest[:12]}) "
            f"that no dataset of the recipe has; add that dataset to data.datasets with a positive share (0.001 will "
            f"do), {tool} again, {cure}"
        )

    def step(self, index: int, units: Units) -> Step:
        """The rows of ``units`` as a step, not cut to any budget; a unit is a group."""
        table = _Table()
        for number, source in enumerate(self._sources):
            at = np.flatnonzero(units.source == number)
            if len(at):
                self._expand(table, number, source, units, at)
        unit, role, origin, texts, images, view = table.sorted()
        views = Views(self._names, origin.astype(np.int8), role.astype(np.int8), view)
        return Step(
            index=index,
            task=UNIFIED,
            dataset=joined(self._names),
            texts=texts,
            images=images,
            passes=units.passes[unit],
            examples=units.rows[unit],
            labels=np.ones(len(unit), np.int8),
            group=unit.astype(np.int32),
            costs=self._costs(texts, images, views),
            views=views,
        )

    def _expand(self, table: _Table, number: int, source: Source, units: Units, at: NDArray[np.int64]) -> None:
        rows, passes, settings = units.rows[at], units.passes[at], self._views
        image = source.lengths.first_image(rows)
        has_text = not source.lengths.images_only
        chance = self._draws[number].uniform("unified role", passes, rows)
        visual = (image >= 0) & ((chance[:, 0] < settings.pair_visual_share) | (not has_text))
        language = np.where(chance[:, 1] < settings.seq2seq_share, Role.SEQ2SEQ, Role.BIDIRECTIONAL)
        role = np.where(visual, int(Role.VISUAL), language)
        table.add(at, role, number, rows if has_text else _NONE, image)
        paired = np.flatnonzero(image >= 0)
        if not (has_text and settings.contrast and len(paired)):
            return
        at, rows, passes, image = at[paired], rows[paired], passes[paired], image[paired]
        table.add(at, Role.PAIR, number, rows, image)
        self._rewrite(table, number, source, Units(at, rows, passes), image)
        if settings.alone:
            table.add(at, Role.IMAGE, number, image=image)
            table.add(at, Role.TEXT, number, rows)
        for kind in self._retrieved:
            self._retrieve(table, number, source, Units(at, rows, passes), image, kind)

    def _rewrite(self, table: _Table, number: int, source: Source, pairs: Units, image: NDArray[np.int64]) -> None:
        """Rewritten captions of some pairs (``pairs.source``: their units), those that are not too long."""
        rewrites, settings = source.beside.rewrites, self._views
        if rewrites is None or not settings.positives + settings.negatives:
            return
        first = np.asarray(rewrites.ptr[pairs.rows], np.int64)
        counts = np.asarray(rewrites.ptr[pairs.rows + 1], np.int64) - first
        owners, flat = np.repeat(np.arange(len(pairs)), counts), np.repeat(first, counts) + within(counts)
        fits = rewrites.view_tokens[flat] <= self._settings.max_text_tokens
        positive = rewrites.view_positive[flat] == 1
        counted = ((Role.POSITIVE, settings.positives, positive), (Role.NEGATIVE, settings.negatives, ~positive))
        for role, wanted, right in counted:
            usable = fits & right
            owner, view = self._chosen(number, role.name.lower(), pairs, owners[usable], flat[usable], wanted)
            table.add(pairs.source[owner], role, number, pairs.rows[owner], image[owner], view)

    def _retrieve(
        self, table: _Table, number: int, source: Source, pairs: Units, image: NDArray[np.int64], kind: Modality
    ) -> None:
        """Retrieved images or texts of some pairs; texts that are too long are left out."""
        wanted, other = self._retrieved[kind], self._collections.get((number, kind))
        if not wanted or other is None:
            return
        retrieved, theirs = source.beside.retrieved, self._sources[other].lengths
        assert retrieved is not None
        packed, counts = retrieved.packed(kind, pairs.rows)
        found, owners = packed.astype(np.int64), np.repeat(np.arange(len(pairs)), counts)
        if other == number:
            own = own_candidates(theirs, kind, pairs.rows[owners], found)
            if own.any():
                bad = int(np.argmax(own))
                retrieved.check_original(kind, int(pairs.rows[owners[bad]]), found[bad : bad + 1], found[bad : bad + 1])
        if kind == "texts":
            usable = theirs.tokens[found] <= self._settings.max_text_tokens
            owner, text = self._chosen(number, "retrieved text", pairs, owners[usable], found[usable], wanted)
            table.add(pairs.source[owner], Role.RETRIEVED_TEXT, other, text=text)
        else:
            owner, row = self._chosen(number, "retrieved image", pairs, owners, found, wanted)
            table.add(pairs.source[owner], Role.RETRIEVED_IMAGE, other, image=row)

    def _chosen(
        self, number: int, purpose: str, pairs: Units, owners: NDArray[np.int64], found: NDArray[np.int64], wanted: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Some of each pair's candidates ``found``, which stand by owner: (owner, candidate)."""
        counts = np.bincount(owners, minlength=len(pairs))
        firsts = np.cumsum(counts) - counts
        owner, place = choose(
            self._draws[number], f"unified {purpose}", pairs.passes, pairs.rows, counts.astype(np.int64), wanted
        )
        return owner, found[firsts[owner] + place]

    def _costs(self, texts: NDArray[np.int64], images: NDArray[np.int64], views: Views) -> NDArray[np.int32]:
        """int32 [B], tokens that each row runs at most."""
        costs = np.zeros(len(texts), np.int32)
        settings = self._views
        for number, source in enumerate(self._sources):
            mine = views.source == number
            lengths, rewrites = source.lengths, source.beside.rewrites
            shown = np.flatnonzero(mine & (images >= 0))
            costs[shown] += (
                np.minimum(lengths.regions[images[shown]], np.int32(self._settings.max_regions)) + IMAGE_SLOT
            )
            read = np.flatnonzero(mine & (texts >= 0) & (views.view < 0))
            costs[read] += lengths.tokens[texts[read]] + np.int32(SPECIALS)
            rewritten = np.flatnonzero(mine & (views.view >= 0))
            if len(rewritten):
                assert rewrites is not None
                costs[rewritten] += rewrites.view_tokens[views.view[rewritten]] + np.int32(SPECIALS)
            made = np.flatnonzero(mine & (views.role == Role.SEQ2SEQ))
            pieces = lengths.tokens[texts[made]]
            costs[made] += 2 * most_fragments(pieces, settings.seq2seq_probability, settings.shortest_fragment)
        return costs
