"""One dataset within the plan: the steps' raw material, and bounds of what its examples cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from vlscale.config import TASKS, Recipe
from vlscale.data.lengths import DatasetLengths
from vlscale.data.order import PassOrder, Taken
from vlscale.data.partners import Partners
from vlscale.data.random import Draws
from vlscale.data.reference import ReferenceOrder
from vlscale.data.survey import survey
from vlscale.data.views import UNIFIED, Views, ViewSettings
from vlscale.errors import VlscaleError

Mix = Mapping[str, float]


@dataclass(frozen=True)
class PlanSettings:
    """The part of the recipe that the plan depends on (see :class:`vlscale.config.Recipe` for each).

    Exactly one of ``global_batch_tokens``, ``global_batch_examples`` and (with mode ``reference``)
    ``reference_batches`` is set. ``itm_group`` is the number of consecutive examples of an itm step that are never
    split: ``wra.group`` for the hinge loss, otherwise 1. ``micro_batch_tokens`` is only read when a step is dealt, and
    in mode ``reference``. ``views`` is only read for task ``unified``.
    """

    seed: int
    global_batch_tokens: int | None = None
    global_batch_examples: int | None = None
    micro_batch_tokens: int = 10240
    max_text_tokens: int = 60
    max_regions: int = 100
    window_shards: int = 16
    itm_negative_probability: float = 0.5
    itm_replace: str = "image"
    itm_group: int = 1
    mode: str = "packed"
    reference_batches: int | None = None
    mix_unit: str = "steps"
    views: ViewSettings = field(default_factory=ViewSettings)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PlanSettings:
        """Read the plan's settings from a recipe."""
        objectives = recipe.objectives
        return cls(
            seed=recipe.seed,
            global_batch_tokens=recipe.batch.global_batch_tokens,
            global_batch_examples=recipe.batch.global_batch_examples,
            micro_batch_tokens=recipe.batch.micro_batch_tokens,
            max_text_tokens=recipe.data.max_text_tokens,
            max_regions=recipe.data.max_regions,
            window_shards=recipe.data.window_shards,
            itm_negative_probability=objectives.itm.negative_probability,
            itm_replace=objectives.itm.replace,
            itm_group=objectives.wra.group if objectives.wra.loss == "hinge" else 1,
            mode=recipe.batch.mode,
            reference_batches=recipe.batch.reference_batches,
            mix_unit=recipe.data.mix_unit,
            views=ViewSettings.from_section(objectives.unified),
        )

    def group_of(self, task: str) -> int:
        """Examples per group in a step of ``task``."""
        return self.itm_group if task == "itm" else 1


@dataclass(frozen=True, eq=False)
class Step:
    """One optimiser step of B examples, the same for every number of processes.

    A step of task ``unified`` mixes datasets; its examples are the rows of its units (see :mod:`~vlscale.data.views`),
    and a unit is a group.

    Attributes:
        index: number of the step.
        task: one task for all examples, on all ranks.
        dataset: name of the dataset all examples come from; of task ``unified`` the names joined with ``+``.
        texts: int64 [B], text row that is read (the partner's, for a replaced text).
        images: int64 [B], image row that is read (the partner's, for a replaced image); -1 for none.
        passes: int64 [B] and examples: int64 [B], pass and text row that were met: they key every random draw.
        labels: int8 [B], 1 for a match, 0 for a negative; all 1 unless the task is itm.
        group: int32 [B], rising from 0; examples of one group are never split.
        costs: int32 [B], tokens and regions that each example runs, [CLS] and [SEP] included; of task ``unified`` also
            [IMG] and room for what a generated fragment adds.
        views: what each example is and which dataset it is from; task ``unified`` only. ``texts`` is -1 where there is
            no text, and passes and examples are those of the unit (its text row, or image row without texts).
    """

    index: int
    task: str
    dataset: str
    texts: NDArray[np.int64]
    images: NDArray[np.int64]
    passes: NDArray[np.int64]
    examples: NDArray[np.int64]
    labels: NDArray[np.int8]
    group: NDArray[np.int32]
    costs: NDArray[np.int32]
    views: Views | None = None

    def __len__(self) -> int:
        """Number of examples B."""
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens and regions of the whole step."""
        return int(self.costs.sum(dtype=np.int64))

    def part(self, index: int, begin: int, end: int) -> Step:
        """Return examples ``begin`` to ``end`` as step ``index``, groups counted from 0 again."""
        names = ("texts", "images", "passes", "examples", "labels", "costs")
        group = self.group[begin:end] - self.group[begin]
        views = None if self.views is None else self.views.take(slice(begin, end))
        parts = {name: getattr(self, name)[begin:end] for name in names}
        return replace(self, index=index, group=group, views=views, **parts)

    def joined(self, other: Step) -> Step:
        """Return these examples and then those of ``other``, a step of the same task and datasets."""
        names = ("texts", "images", "passes", "examples", "labels", "costs")
        parts = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names}
        group = np.concatenate([self.group, other.group + (self.group[-1] + np.int32(1))])
        views = self.views if self.views is None or other.views is None else self.views.joined(other.views)
        return replace(self, group=group, views=views, **parts)


class Source:
    """One dataset within the plan: its order, its partners, and the bounds of what its examples cost."""

    def __init__(self, lengths: DatasetLengths, mix: Mix, settings: PlanSettings) -> None:
        self.lengths = lengths
        self.mix = {task: float(mix[task]) for task in TASKS if mix.get(task, 0) > 0}
        self.settings = settings
        self.beside = lengths.beside
        longest = settings.max_text_tokens
        self.survey = survey(lengths, longest, settings.max_regions)
        self._check()
        self.order: PassOrder | ReferenceOrder
        if settings.mode == "reference":
            budget = settings.micro_batch_tokens
            self.order = ReferenceOrder(lengths, settings.seed, budget, longest, settings.max_regions)
        else:
            self.order = PassOrder(lengths, self.survey, settings.seed, settings.window_shards, longest)
        self._partners = None
        if "itm" in self.mix:
            self._partners = Partners(
                lengths,
                self.survey,
                Draws(settings.seed, lengths.name),
                settings.itm_negative_probability,
                settings.itm_replace,
                longest,
            )

    def _check(self) -> None:
        name, longest = self.lengths.name, self.settings.max_text_tokens
        if not self.survey.total:
            why = f"all {len(self.lengths)} texts are longer" if len(self.lengths) else "there are no texts at all"
            raise VlscaleError(
                f"dataset {name}: no text is left with data.max_text_tokens {longest} ({why}); raise it, or leave "
                f"the dataset out"
            )
        if self.lengths.images_only and set(self.mix) - {UNIFIED}:
            raise VlscaleError(
                f"dataset {name}: has no texts/, which task {next(iter(self.mix))} needs; give it texts, or leave it "
                f"out (task unified alone takes images without texts)"
            )
        wanted = [task for task in self.mix if task not in ("mlm", UNIFIED)]
        found = self.survey
        if found.lonely and wanted:
            raise VlscaleError(
                f"dataset {name}: text row {found.first_lonely} ({found.lonely} of {found.total}) has no image, which "
                f"task {wanted[0]} needs; drop {', '.join(wanted)} from its mix (mlm alone takes texts without images)"
            )

    def twin(self) -> Source:
        """The same dataset for another thread: what an order remembers and a reader has open is not safe to share."""
        other = copy.copy(self)
        other.order = self.order.twin()
        other.beside = self.beside.twin()
        return other

    def block(self, index: int, task: str, cursor: tuple[int, int], count: int) -> Step:
        """Return the next ``count`` texts from ``cursor`` as a step, not yet cut to any budget."""
        assert isinstance(self.order, PassOrder)
        group = (np.arange(count) // self.settings.group_of(task)).astype(np.int32)
        return self._step(index, task, self.order.take(*cursor, count), group)

    def batches(self, index: int, task: str, cursor: tuple[int, int], count: int) -> Step:
        """Return the next ``count`` batches of UNITER's sampler as a step; each is a group."""
        assert isinstance(self.order, ReferenceOrder)
        return self._step(index, task, *self.order.batches(*cursor, count))

    def _step(self, index: int, task: str, taken: Taken, group: NDArray[np.int32]) -> Step:
        rows = taken.rows
        if task == "itm":
            assert self._partners is not None
            texts, images, labels = self._partners.draw(taken)
        else:
            texts, images, labels = rows, self.lengths.first_image(rows), np.ones(len(rows), np.int8)
        return Step(
            index=index,
            task=task,
            dataset=self.lengths.name,
            texts=texts,
            images=images,
            passes=taken.passes,
            examples=rows,
            labels=labels,
            group=group,
            costs=self.lengths.costs(texts, images, self.settings.max_regions),
        )

    def smallest_example(self, task: str) -> int:
        """Fewest tokens that one example of ``task`` can cost, whatever its partner."""
        if task != "itm" or self.settings.itm_negative_probability == 0:
            return self.survey.costs.least
        return self.survey.words.least + self.survey.fewest_regions

    def heaviest(self, task: str, count: int) -> int:
        """Most tokens that ``count`` consecutive examples of ``task`` can cost together.

        A run of consecutive examples meets each text once per pass it touches; drawn partners may be the largest
        every time.
        """
        found = self.survey
        if task != "itm" or self.settings.itm_negative_probability == 0:
            return found.costs.heaviest(count)
        if self.settings.itm_replace == "image":
            return found.words.heaviest(count) + count * found.most_regions
        if self.settings.itm_replace == "text":
            return count * found.words.most + found.regions.heaviest(count)
        return count * (found.words.most + found.most_regions)
