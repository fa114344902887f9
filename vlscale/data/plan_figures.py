"""What a plan makes of a dataset: fill, padding, straggler factor and steps per pass for a budget and a world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.beside import MODALITIES
from vlscale.data.deal import Rule, accumulation, deal, fill_advice, straggler
from vlscale.data.lengths import DatasetLengths
from vlscale.data.plan import MOST_OF_A_STEP, Plan, PlanSettings, Step
from vlscale.data.views import UNIFIED, Role, ViewSettings
from vlscale.errors import VlscaleError

MOST_STEPS = 1000
"""Steps that are looked at unless asked otherwise; a pass of a large dataset has more."""
MOST_MICRO_BATCHES = 1 << 20
"""Of a step."""


@dataclass(frozen=True, eq=False)
class PlanFigures:
    """Figures of the first pass of a dataset under a plan.

    Attributes:
        world_size: processes; accumulation: micro-steps per step.
        micro_batch_tokens: the ceiling; global_batch_tokens: tokens of a step at most.
        longest: tokens of the longest example.
        texts: texts in a pass; left_out: texts longer than the limit, which take no part.
        steps: steps that were looked at; examples: texts in them.
        steps_per_pass: texts in a pass / texts per step.
        mode: ``packed`` or ``padded``.
        fill: what the ceiling counts / (micro-batches x ceiling): real tokens, or (padded) longest example x examples.
        padding: share of positions that hold padding; 0 where batches are packed.
        padding_if_padded: the same if every micro-batch were padded to its longest example.
        straggler_mean, straggler_most: tokens of the busiest rank / mean over ranks, over the steps.
        empty: micro-batches without an example.
        advice: one line if a small change of the batch would fill it, or None.
        tokens: int64 [steps, world_size * accumulation], real tokens of each micro-batch; 0 in an empty one.
        mixed: of a step of task ``unified``, on average: ``units`` of each dataset, its ``rows``, and for each role of
            rows (``roles``) its ``rows`` and its ``share`` of the tokens. Examples then are units.
    """

    world_size: int
    accumulation: int
    micro_batch_tokens: int
    global_batch_tokens: int
    longest: int
    texts: int
    left_out: int
    steps: int
    examples: int
    steps_per_pass: float
    mode: str
    fill: float
    padding: float
    padding_if_padded: float
    straggler_mean: float
    straggler_most: float
    empty: int
    advice: str | None
    tokens: NDArray[np.int64]
    mixed: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON types; ``tokens`` becomes ``micro_batches`` (least, median, most)."""
        left_out = {"tokens"} if self.mixed is not None else {"tokens", "mixed"}
        found = {name: value for name, value in self.__dict__.items() if name not in left_out}
        used = self.tokens[self.tokens > 0]
        spread = {"least": int(used.min()), "median": float(np.median(used)), "most": int(used.max())}
        return {**found, "micro_batches": {"count": int(used.size), **spread}}


def plan_figures(
    lengths: DatasetLengths,
    task: str,
    settings: PlanSettings,
    world_size: int = 1,
    gas: int | None = None,
    most_steps: int = MOST_STEPS,
    hidden_size: int | None = None,
    share: float = 1.0,
    others: Sequence[tuple[DatasetLengths, float]] = (),
) -> PlanFigures:
    """Plan and deal a pass (or its first steps), without reading a row; views without a store are left out.

    Args:
        lengths: the dataset.
        task: pre-training task of every step.
        settings: ``global_batch_tokens`` is replaced if ``gas`` is given.
        world_size: number of processes.
        gas: take the largest global batch that is sure to fit in so many micro-steps.
        most_steps: steps that are looked at.
        hidden_size: of the model: micro-batches are then even in operations, as in training; None: in tokens.
        share: of the dataset's units in each step of task ``unified``; others: datasets mixed with it, with theirs.

    Raises:
        VlscaleError: the ceiling is below the longest example, or the step below what ``world_size`` needs.
    """
    ceiling = settings.micro_batch_tokens
    datasets = [(each, {task: share}) for each, share in ((lengths, share), *others)]
    if task == UNIFIED:
        settings = replace(settings, views=possible_views(settings.views, [each for each, _ in datasets]))
    # A plan with a step that takes anything, to learn the longest example before the step's size is chosen.
    trial = Plan(datasets, replace(settings, global_batch_tokens=MOST_OF_A_STEP, global_batch_examples=None))
    name, unit = trial.pairs[0][0], "the largest unit with its views" if task == UNIFIED else "the longest example"
    longest = trial.heaviest(name, task, 1)
    _check_fits("--budget", ceiling, longest, unit, name)
    total = settings.global_batch_tokens
    if gas is not None:
        # The largest total that list scheduling is sure to lay into world_size x gas micro-batches (see deal.py).
        total = world_size * gas * (ceiling - longest) + longest
    if total is None:
        raise VlscaleError("give --gas or --global-tokens")
    _check_fits("--global-tokens", total, longest, unit, name)
    plan = Plan(datasets, replace(settings, global_batch_tokens=total, global_batch_examples=None))
    needed = accumulation(plan, world_size)
    if world_size * needed > MOST_MICRO_BATCHES:
        raise VlscaleError(
            f"{world_size} processes x {needed} micro-batches are more than {MOST_MICRO_BATCHES} per step; lower "
            f"--world, or raise --budget"
        )
    return _walk(plan, lengths, world_size, needed, longest, most_steps, hidden_size)


def _check_fits(option: str, given: int, longest: int, unit: str, name: str) -> None:
    if longest > given:
        raise VlscaleError(
            f"{option} {given} is smaller than {unit} of {name}: {longest} tokens; raise it to at least {longest}, or "
            f"lower --max-regions or --max-text-tokens"
        )


def possible_views(wanted: ViewSettings, datasets: Sequence[DatasetLengths]) -> ViewSettings:
    """Of the views that are wanted those that the datasets have stores for."""
    pairs = [lengths.beside for lengths in datasets if lengths.kind == "pairs"]
    if any(beside.rewrites is None for beside in pairs):
        wanted = replace(wanted, positives=0, negatives=0)
    for kind in MODALITIES:
        known = {lengths.beside.digest_of(kind) for lengths in datasets}
        found = [None if beside.retrieved is None else beside.retrieved.collection(kind) for beside in pairs]
        if any(collection is None or collection.digest not in known for collection in found):
            wanted = replace(wanted, images=0) if kind == "images" else replace(wanted, texts=0)
    return wanted


class _Mixed:
    """What unified steps are made of, added up."""

    def __init__(self, plan: Plan, first: str) -> None:
        self._names = [*plan.sources]
        self._first = self._names.index(first)
        self.units = np.zeros(len(self._names), np.int64)
        self.rows, self.tokens = np.zeros(len(Role), np.int64), np.zeros(len(Role), np.int64)

    def add(self, step: Step) -> int:
        """Add a step; returns how many of its examples (units, where it is a unified one) the first dataset has."""
        if step.views is None:
            return len(step)
        begins = np.flatnonzero(np.r_[True, step.group[1:] != step.group[:-1]])
        units = np.bincount(step.views.source[begins], minlength=len(self._names))
        self.units += units
        self.rows += np.bincount(step.views.role, minlength=len(Role))
        self.tokens += np.bincount(step.views.role, step.costs, len(Role)).astype(np.int64)
        return int(units[self._first])

    def found(self, steps: int) -> dict[str, Any] | None:
        """Plain JSON types per step, or None where no step was a unified one."""
        if not self.rows.any():
            return None
        total = int(self.tokens.sum())
        roles = {
            role.name.lower(): {"rows": int(self.rows[role]) / steps, "share": int(self.tokens[role]) / total}
            for role in Role
            if self.rows[role]
        }
        units = {name: count / steps for name, count in zip(self._names, self.units.tolist(), strict=True)}
        return {"units": units, "rows": int(self.rows.sum()) / steps, "roles": roles}


def _walk(
    plan: Plan,
    lengths: DatasetLengths,
    world_size: int,
    gas: int,
    longest: int,
    most_steps: int,
    hidden_size: int | None,
) -> PlanFigures:
    settings, source = plan.settings, plan.sources[lengths.name]
    in_pass, ceiling = source.survey.total, settings.micro_batch_tokens
    position, examples, padded, empty = plan.start(), 0, 0, 0
    rule, mixed = Rule(settings.mode, hidden_size), _Mixed(plan, lengths.name)
    tokens: list[list[int]] = []
    stragglers: list[float] = []
    while examples < in_pass and len(tokens) < most_steps:
        step, position = plan.step(position)
        dealt = deal(step, world_size, gas, ceiling, rule)
        micro_batches = [micro for rank in dealt for micro in rank]
        tokens.append([micro.tokens if micro.weight else 0 for micro in micro_batches])
        padded += sum(micro.padded for micro in micro_batches if micro.weight)
        empty += sum(not micro.weight for micro in micro_batches)
        stragglers.append(straggler(dealt))
        examples += mixed.add(step)
    table = np.array(tokens, np.int64)
    real = int(table.sum())
    return PlanFigures(
        world_size=world_size,
        accumulation=gas,
        micro_batch_tokens=ceiling,
        global_batch_tokens=settings.global_batch_tokens or 0,
        longest=longest,
        texts=in_pass,
        left_out=source.survey.left_out,
        steps=len(tokens),
        examples=examples,
        steps_per_pass=in_pass * len(tokens) / max(examples, 1),
        mode=settings.mode,
        fill=(padded if settings.mode == "padded" else real) / (table.size * ceiling),
        padding=1 - real / padded if settings.mode == "padded" else 0.0,
        padding_if_padded=1 - real / padded,
        straggler_mean=float(np.mean(stragglers)),
        straggler_most=float(np.max(stragglers)),
        empty=empty,
        advice=fill_advice(plan, world_size),
        tokens=table,
        mixed=mixed.found(len(tokens)),
    )
