"""The plan: whole optimiser steps, cut as a pure function of (recipe, lengths, seed).

The plan decides the task and dataset of a step, its examples, their order, their image-text-matching labels and their
partners. It does not know how many processes there are: :mod:`vlscale.data.deal` divides a finished step. So the number
of GPUs, the gradient accumulation and the token ceiling change speed, never what is learnt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.config import Recipe
from vlscale.data.lengths import DatasetLengths
from vlscale.data.order import ORDER_VERSION
from vlscale.data.random import Draws
from vlscale.data.reference import ReferenceOrder
from vlscale.data.source import Mix, PlanSettings, Source, Step
from vlscale.errors import VlscaleError

__all__ = ["FixedSteps", "Plan", "PlanSettings", "Position", "Step", "evaluation_seed", "evaluation_steps"]


@dataclass(frozen=True)
class Position:
    """Where the plan stands: all that a checkpoint has to keep of it.

    Attributes:
        step: the next step.
        cursors: dataset name -> (pass, offset of the next text in it).
    """

    step: int
    cursors: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Return the position as plain JSON types."""
        return {"step": self.step, "cursors": {name: list(cursor) for name, cursor in self.cursors.items()}}

    @classmethod
    def from_json(cls, raw: Any) -> Position:
        """Read what :meth:`to_json` wrote.

        Raises:
            VlscaleError: ``raw`` is anything else.
        """
        try:
            step, cursors = raw["step"], {str(name): tuple(cursor) for name, cursor in raw["cursors"].items()}
        except (TypeError, KeyError, AttributeError):
            step, cursors = None, {}
        numbers = [step, *(number for cursor in cursors.values() for number in cursor)]
        whole = all(type(number) is int and number >= 0 for number in numbers)
        if not whole or any(len(cursor) != 2 for cursor in cursors.values()):
            raise VlscaleError(
                f"resume state: expected {{step: N, cursors: {{dataset: [pass, offset]}}}}, found {str(raw)[:120]}; "
                f"the checkpoint is damaged: resume from another one"
            )
        return cls(step, cursors)


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
        pairs: (dataset name, task) in the order they are drawn from, with ``shares`` float64, adding up to 1.
        left_out: dataset name -> texts that are longer than ``max_text_tokens`` and take no part.
        dropped: dataset name -> texts that mode ``reference`` drops in the first pass; others drop about as many.
        sources: dataset name -> :class:`Source`.

    Raises:
        VlscaleError: a dataset is empty after filtering or lacks what a task needs; a step cannot hold one group.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[DatasetLengths, Mix]],
        settings: PlanSettings,
        fingerprints: Mapping[str, str] | None = None,
        sizes: Mapping[str, tuple[str, float]] | None = None,
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
        self._edges = np.cumsum(self.shares)[:-1]
        self.left_out = {name: source.survey.left_out for name, source in self.sources.items()}
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
            largest = self.sources[name].heaviest(task, group)
            if tokens is not None and tokens < largest:
                unit = "one example" if group == 1 else f"one group of {group} examples"
                raise VlscaleError(
                    f"batch.global_batch_tokens {tokens} is smaller than {unit} of dataset {name}, task {task}: "
                    f"{largest} tokens; raise it to at least {largest}"
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
        source = self.sources[name]
        cursor = self._cursor(position, name)
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

    def _cursor(self, position: Position, name: str) -> tuple[int, int]:
        cursor = position.cursors.get(name)
        if set(position.cursors) != set(self.sources) or cursor is None or cursor[1] >= len(self.sources[name].order):
            sizes = {name: len(source.order) for name, source in self.sources.items()}
            raise VlscaleError(
                f"resume state: cursors {position.cursors} do not fit the datasets' texts {sizes}; "
                f"the data set or its settings have changed since: start a new run"
            )
        return cursor

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
            "mix": [(*pair, round(float(share), 12)) for pair, share in zip(self.pairs, self.shares, strict=True)],
            "data": [settings.max_text_tokens, settings.max_regions, settings.window_shards],
            "order": ORDER_VERSION,
            "batch": self._batch(),
            "itm": itm if any(task == "itm" for _, task in self.pairs) else None,
        }
        for name, source in self.sources.items():
            stores = self._fingerprints.get(name) or source.lengths.digest
            parts[f"dataset {name}"] = [stores, len(source.lengths), source.survey.left_out]
        return ",".join(f"{part}={_digest(value)}" for part, value in parts.items())

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
        old = dict(part.partition("=")[::2] for part in str(fingerprint).split(","))
        new = dict(part.partition("=")[::2] for part in self.fingerprint.split(","))
        changed = [part for part in {**old, **new} if old.get(part) != new.get(part)]
        if changed:
            raise VlscaleError(
                f"resume: a changed {_plain(changed[0])}: {', '.join(changed)} of the plan differ from the "
                f"checkpoint's; restore what was changed, or start a new run in another folder"
            )


def step_shares(
    sources: Mapping[str, Source],
    pairs: Sequence[tuple[str, str]],
    settings: PlanSettings,
    sizes: Mapping[str, tuple[str, float]],
) -> NDArray[np.float64]:
    """float64, the probability that a step is of each (dataset, task).

    Shares that count samples (``mix_unit: samples``, ``repeat``, ``choose``) become shares of steps by the mean cost of
    an example: a step of so many tokens holds more short examples than long ones.

    Raises:
        VlscaleError: some datasets have a size and others have none.
    """
    lacking = [name for name in sources if name not in sizes]
    if sizes and lacking:
        raise VlscaleError(
            f"dataset {lacking[0]}: others have data.datasets[].repeat or .choose, it has neither; all or none need one"
        )
    shares = []
    for name, task in pairs:
        source = sources[name]
        share = source.mix[task]
        if sizes:
            kind, size = sizes[name]
            texts = size * source.survey.total if kind == "repeat" else size
            share *= texts / sum(source.mix.values())
        if sizes or settings.mix_unit == "samples":
            share /= _relative_examples(source, settings)
        shares.append(share)
    found = np.array(shares)
    return np.asarray(found / found.sum())


def _relative_examples(source: Source, settings: PlanSettings) -> float:
    """Examples of a step of ``source``, up to a factor that all datasets share."""
    if isinstance(source.order, ReferenceOrder):
        return source.order.mean_batch
    return 1.0 if settings.global_batch_tokens is None else 1.0 / source.survey.costs.mean


class FixedSteps:
    """A finite list of steps behind the interface that the loader reads a :class:`Plan` through."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = list(steps)
        self.pairs = list(dict.fromkeys((step.dataset, step.task) for step in steps))

    def __len__(self) -> int:
        """Number of steps."""
        return len(self._steps)

    def start(self) -> Position:
        """Return the position before the first step."""
        return Position(0, {})

    def steps(self, position: Position) -> Iterator[tuple[Step, Position]]:
        """Yield (step, position after it) from ``position`` to the end."""
        for index in range(position.step, len(self._steps)):
            yield self._steps[index], Position(index + 1, {})


def evaluation_seed(seed: int) -> int:
    """Return the seed of everything drawn in evaluation, so that no training draw is met again."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0evaluation".encode(), digest_size=7).digest(), "little")


def evaluation_steps(lengths: DatasetLengths, task: str, examples: int, settings: PlanSettings) -> list[Step]:
    """Return the fixed steps of one task over the first ``examples`` texts of a validation set's first pass.

    The order, labels, partners and masks depend on the recipe's seed (through :func:`evaluation_seed`) and on nothing
    else: not on the training step, nor on the number of processes. Steps are cut to the training batch size; the last
    one is shorter. Texts over ``max_text_tokens`` are left out, as in training.

    Raises:
        VlscaleError: the set is empty after filtering or lacks what the task needs.
    """
    if settings.reference_batches is not None:  # held-out steps are cut by tokens, however training's are
        tokens = settings.reference_batches * settings.micro_batch_tokens
        settings = replace(settings, mode="packed", reference_batches=None, global_batch_tokens=tokens)
    source = Source(lengths, {task: 1.0}, replace(settings, seed=evaluation_seed(settings.seed)))
    block = source.block(0, task, (0, 0), min(examples, len(source.order)))
    group = settings.group_of(task)
    if settings.global_batch_examples is not None:
        ends = list(range(settings.global_batch_examples, len(block), settings.global_batch_examples))
    else:
        ends = _cuts(block, group, settings.global_batch_tokens or 1)
    edges = [0, *ends, len(block)]
    return [block.part(index, begin, end) for index, (begin, end) in enumerate(pairwise(edges))]


def _cuts(block: Step, group: int, budget: int) -> list[int]:
    """Places inside ``block`` where a step ends, each holding whole groups within ``budget`` or a single one."""
    starts = np.arange(0, len(block), group)
    totals = np.r_[0, np.cumsum(np.add.reduceat(block.costs.astype(np.int64), starts))]
    ends: list[int] = []
    begin = 0
    while True:
        begin = max(begin + 1, int(np.searchsorted(totals, totals[begin] + budget, side="right")) - 1)
        if begin >= len(starts):
            return ends
        ends.append(begin * group)


def _plain(part: str) -> str:
    """The user's words for a part of the fingerprint."""
    words = {
        "seed": "recipe (seed)",
        "mix": "recipe (data.datasets[].mix, repeat or choose, or data.mix_unit)",
        "data": "recipe (data.max_text_tokens, data.max_regions or data.window_shards)",
        "batch": "recipe (batch.global_batch_tokens or batch.global_batch_examples; mode reference: any of batch)",
        "itm": "recipe (objectives.itm or objectives.wra.group)",
        "order": "order of examples (another version of vlscale)",
    }
    return words.get(part, "data set on resume")


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
