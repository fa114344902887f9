"""The plan: whole optimiser steps, cut as a pure function of (recipe, lengths, seed).

The plan decides the task and dataset of a step, its examples, their order, their image-text-matching labels and their
partners. It does not know how many processes there are: :mod:`vlscale.data.deal` divides a finished step. So the number
of GPUs, the gradient accumulation and the token ceiling change speed, never what is learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from vlscale.config import Recipe
from vlscale.data.evaluation import FixedSteps, evaluation_seed, evaluation_steps
from vlscale.data.expansion import EXPANSION_VERSION
from vlscale.data.fingerprint import check_same, fingerprint_of
from vlscale.data.lengths import DatasetLengths
from vlscale.data.order import ORDER_VERSION
from vlscale.data.position import Position
from vlscale.data.random import Draws
from vlscale.data.reference import ReferenceOrder
from vlscale.data.shares import Sizes, step_shares
from vlscale.data.source import Mix, PlanSettings, Source, Step
from vlscale.data.unified import UnifiedSteps
from vlscale.data.views import UNIFIED, joined
from vlscale.errors import VlscaleError

__all__ = ["FixedSteps", "Plan", "PlanSettings", "Position", "Step", "evaluation_seed", "evaluation_steps"]


MOST_OF_A_STEP = 1 << 28
"""Tokens or examples; a step is planned as a whole, and more is a slip of the pen."""


class Plan:
    """Cuts optimiser steps for a mix of datasets and tasks.

    Args:
        datasets: (lengths, mix) per dataset, in the recipe's order; the mix gives the relative number of steps per
            task. A dataset without any positive share is left out.
        settings: the recipe's part of the plan.
        fingerprints: dataset name -> fingerprint of its stores; where absent, the digest of its lengths.
        sizes: dataset name -> texts per epoch: of it (``choose``), or as a multiple of its eligible texts (``repeat``),
            as ``("choose", n)`` or ``("repeat", r)``. With sizes, the mix only divides a dataset's texts among tasks.

    Attributes:
        pairs: (dataset name, task) in the order they are drawn from, with ``shares`` float64, adding up to 1. Task
            ``unified`` mixes all datasets in each step: one pair, of their names joined with ``+``.
        left_out: dataset name -> texts that are longer than ``max_text_tokens`` and take no part.
        dropped: dataset name -> texts that mode ``reference`` drops in the first pass; others drop about as many.
        left_out_views: dataset name -> rewritten captions that are longer than that, of datasets that draw from any.
        unit_shares: dataset name -> its part of the units of each step; task ``unified`` only.
        sources: dataset name -> :class:`Source`.

    Raises:
        VlscaleError: a dataset is empty after filtering or lacks what a task needs; a step cannot hold one group.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[DatasetLengths, Mix]],
        settings: PlanSettings,
        fingerprints: Mapping[str, str] | None = None,
        sizes: Sizes | None = None,
    ) -> None:
        self.settings = settings
        given = (settings.global_batch_tokens, settings.global_batch_examples, settings.reference_batches)
        if sum(value is not None for value in given) != 1 or (
            (settings.mode == "reference") != (settings.reference_batches is not None)
        ):
            raise VlscaleError(
                "set exactly one of batch.global_batch_tokens and batch.global_batch_examples (batch.mode reference: "
                "batch.reference_batches)"
            )
        wanted = [(lengths, mix) for lengths, mix in datasets if any(share > 0 for share in mix.values())]
        self.sources = {lengths.name: Source(lengths, mix, settings) for lengths, mix in wanted}
        if not self.sources:
            raise VlscaleError("no dataset has a task with a positive share: set data.datasets[].mix")
        self.pairs = [(name, task) for name, source in self.sources.items() for task in source.mix]
        self.shares = step_shares(self.sources, self.pairs, settings, sizes or {})
        self._mix = [(*pair, round(float(share), 12)) for pair, share in zip(self.pairs, self.shares, strict=True)]
        self.unit_shares: dict[str, float] = {}
        self._unified = self._mixed()
        self._edges = np.cumsum(self.shares)[:-1]
        self.left_out = {name: source.survey.left_out for name, source in self.sources.items()}
        bounds = {} if self._unified is None else self._unified.bounds
        self.left_out_views = {name: bound.left_out for name, bound in bounds.items() if bound.views + bound.left_out}
        orders = {name: source.order for name, source in self.sources.items()}
        self.dropped = {name: order.dropped for name, order in orders.items() if isinstance(order, ReferenceOrder)}
        self._draws = Draws(settings.seed)
        self._fingerprints = dict(fingerprints or {})
        self._check_batch()

    @classmethod
    def from_recipe(cls, recipe: Recipe, datasets: Mapping[str, Any]) -> Plan:
        """Plan the training of ``recipe`` over opened datasets (name -> :class:`vlscale.data.dataset.Dataset`)."""
        sections = recipe.data.datasets
        pairs: list[tuple[DatasetLengths, Mix]] = []
        for section in sections:
            pairs.append((datasets[section.name].lengths, {str(task): share for task, share in section.mix.items()}))
        fingerprints = {section.name: datasets[section.name].fingerprint for section in sections}
        sizes = {section.name: size for section in sections if (size := section.size) is not None}
        for held_out in recipe.data.validation:
            if held_out.size is not None:
                raise VlscaleError(
                    f"data.validation {held_out.name}: {held_out.size[0]} has no effect on a validation set: drop it"
                )
        return cls(pairs, PlanSettings.from_recipe(recipe), fingerprints, sizes)

    def _mixed(self) -> UnifiedSteps | None:
        """What cuts unified steps, if that is the task; all datasets then are one pair."""
        others = [pair for pair in self.pairs if pair[1] != UNIFIED]
        if len(others) == len(self.pairs):
            return None
        if others:
            raise VlscaleError(
                f"dataset {others[0][0]}: task {others[0][1]} cannot be trained beside task unified, whose steps mix "
                f"all datasets; give every dataset the mix {{unified: SHARE}}, or none"
            )
        found = UnifiedSteps(self.sources, self.shares, self.settings)
        self.unit_shares = dict(zip(self.sources, self.shares.tolist(), strict=True))
        self.pairs, self.shares = [(joined(self.sources), UNIFIED)], np.ones(1)
        return found

    def twin(self) -> Plan:
        """The same plan for another thread: what it remembers of passes and windows is not safe to share."""
        other = copy.copy(self)
        other.sources = {name: source.twin() for name, source in self.sources.items()}
        other._unified = None if self._unified is None else self._unified.twin(other.sources)
        return other

    @property
    def drawn_from(self) -> frozenset[str]:
        """Names of the datasets whose rows may come at any time (retrieved views), not only in their window."""
        return frozenset() if self._unified is None else self._unified.drawn_from

    def heaviest(self, name: str, task: str, count: int) -> int:
        """Most tokens that ``count`` consecutive examples (units, for ``unified``) of one of ``pairs`` can cost."""
        return self.sources[name].heaviest(task, count) if self._unified is None else self._unified.heaviest(count)

    def largest_of(self, name: str) -> str:
        """Which dataset of ``name`` the largest group is of, and (``unified``) what is long there; for messages."""
        if self._unified is None:
            return f"dataset {name}"
        dataset, why = self._unified.largest
        return f"dataset {dataset} ({why})"

    def most_groups(self, name: str, task: str) -> int:
        """Most groups that a step of one of ``pairs`` can hold."""
        settings, group = self.settings, self.settings.group_of(task)
        if settings.global_batch_examples is not None:
            return settings.global_batch_examples // group
        budget = settings.global_batch_tokens or 0
        if self._unified is not None:
            return self._unified.most_groups(budget)
        return budget // (group * self.sources[name].smallest_example(task))

    def _check_batch(self) -> None:
        if self.settings.mode == "reference" and self.settings.itm_group > 1:
            raise VlscaleError(
                "batch.mode reference keeps UNITER's batches whole, and objectives.wra.loss hinge its groups: set "
                "wra.loss to reference or off, or batch.mode to packed"
            )
        examples, tokens = self.settings.global_batch_examples, self.settings.global_batch_tokens
        for key, found in (("global_batch_examples", examples), ("global_batch_tokens", tokens)):
            if found is not None and found > MOST_OF_A_STEP:
                raise VlscaleError(f"batch.{key} is {found}, at most {MOST_OF_A_STEP} are planned for a step; lower it")
        for name, task in self.pairs:
            group = self.settings.group_of(task)
            if examples is not None and examples % group:
                raise VlscaleError(
                    f"batch.global_batch_examples {examples} is not a multiple of objectives.wra.group {group}, which "
                    f"task itm needs for wra.loss hinge; set it to {-(-examples // group) * group} or change the group"
                )
            largest = self.heaviest(name, task, group)
            if tokens is not None and tokens < largest:
                unit = unit_of(task, group)
                raise VlscaleError(
                    f"batch.global_batch_tokens {tokens} is smaller than {unit} of {self.largest_of(name)}, task "
                    f"{task}: {largest} tokens; raise it to at least {largest}"
                )

    def start(self) -> Position:
        """Return the position before the first step."""
        return Position(0, {name: (0, 0) for name in self.sources})

    def pair(self, step: int) -> tuple[str, str]:
        """Return the (dataset, task) of a step: drawn from (seed, step) alone."""
        chance = self._draws.uniform("task", 0, step)[0]
        return self.pairs[int(np.searchsorted(self._edges, chance, side="right"))]

    def step(self, position: Position) -> tuple[Step, Position]:
        """Cut the step at ``position``.

        Returns:
            The step, and the position of the next one.

        Raises:
            VlscaleError: the position names other datasets, or a place beyond a dataset's end.
        """
        name, task = self.pair(position.step)
        if self._unified is not None:
            self._check_cursors(position)
            step, cursors = self._unified.step(position.step, position.cursors)
            return step, Position(position.step + 1, cursors)
        source = self.sources[name]
        self._check_cursors(position)
        cursor = position.cursors[name]
        if self.settings.reference_batches is not None:
            step = source.batches(position.step, task, cursor, self.settings.reference_batches)
        elif self.settings.global_batch_examples is not None:
            step = source.block(position.step, task, cursor, self.settings.global_batch_examples)
        else:
            step = self._fill(source, position.step, task, cursor)
        cursors = {**position.cursors, name: source.order.advance(*cursor, len(step))}
        return step, Position(position.step + 1, cursors)

    def steps(self, position: Position) -> Iterator[tuple[Step, Position]]:
        """Yield (step, position after it) from ``position`` on, without end."""
        while True:
            step, position = self.step(position)
            yield step, position

    def _check_cursors(self, position: Position) -> None:
        cursors, sizes = position.cursors, {name: len(source.order) for name, source in self.sources.items()}
        if set(cursors) != set(sizes) or any(cursors[name][1] >= size for name, size in sizes.items()):
            raise VlscaleError(
                f"resume state: cursors {cursors} do not fit the datasets' texts {sizes}; "
                f"the data set or its settings have changed since: start a new run"
            )

    def _fill(self, source: Source, index: int, task: str, cursor: tuple[int, int]) -> Step:
        """Take whole groups while their cumulative cost stays within the token budget; at least one."""
        budget = self.settings.global_batch_tokens
        assert budget is not None
        group = self.settings.group_of(task)
        mean = source.survey.costs.mean
        groups = int(budget / mean / group * 1.02) + 2
        while True:
            step = source.block(index, task, cursor, groups * group)
            totals = np.cumsum(step.costs.reshape(groups, group).sum(1, dtype=np.int64))
            if totals[-1] > budget:
                fit = max(1, int(np.searchsorted(totals, budget, side="right")))
                return step.part(index, 0, fit * group)
            groups = groups * 5 // 4 + 1

    @cached_property
    def fingerprint(self) -> str:
        """What the plan depends on, one short hash per part: ``seed=..,mix=..,data=..,order=..,batch=.. ...``.

        Neither the number of processes is in it, nor (but for mode ``reference``) ``micro_batch_tokens``.
        """
        settings = self.settings
        itm = [settings.itm_negative_probability, settings.itm_replace, settings.itm_group]
        parts: dict[str, Any] = {
            "seed": settings.seed,
            "mix": self._mix,
            "data": [settings.max_text_tokens, settings.max_regions, settings.window_shards],
            "order": ORDER_VERSION,
            "batch": self._batch(),
            "itm": itm if any(task == "itm" for _, task in self.pairs) else None,
        }
        if self._unified is not None:
            views = asdict(settings.views)
            del views["units"]  # it changes no row; whether they are read, and which, the datasets' parts say
            parts |= {"unified": views, "expansion": EXPANSION_VERSION}
        for name, source in self.sources.items():
            stores = self._fingerprints.get(name) or source.lengths.digest
            parts[f"dataset {name}"] = [stores, len(source.lengths), source.survey.left_out]
            if self._unified is not None:
                beside = source.beside.read(source.lengths.kind, settings.views)
                parts |= {f"dataset {name} {store}": digests for store, digests in beside.items()}
        return fingerprint_of(parts)

    def _batch(self) -> list[Any]:
        """What decides which examples a step holds. In mode ``padded`` they are those of ``packed``."""
        settings = self.settings
        if settings.mode == "reference":
            return [settings.mode, settings.reference_batches, settings.micro_batch_tokens]
        return [settings.global_batch_tokens, settings.global_batch_examples]

    def check_resume(self, fingerprint: str) -> None:
        """Refuse to go on with a plan that differs from the one a checkpoint was written under.

        Args:
            fingerprint: :attr:`fingerprint` as the checkpoint holds it.

        Raises:
            VlscaleError: something differs; the message names what.
        """
        check_same(fingerprint, self.fingerprint)


def unit_of(task: str, group: int) -> str:
    """What a group of ``task`` is, in messages."""
    if task == UNIFIED:
        return "one unit with all its views"
    return "one example" if group == 1 else f"one group of {group} examples"
