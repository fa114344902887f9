"""Dealing: a finished step is divided into world size x accumulation balanced micro-batches under a token ceiling.

``packed`` micro-batches are even in work and hold at most so many real tokens. ``padded`` ones hold examples of like
length, and the ceiling counts longest example x examples, for attention that pads. ``reference`` ones are the batches
of UNITER's sampler, one each. :mod:`vlscale.data.laying` has the rules; the accumulation is derived from their bounds,
so that it is right for every step before any step is cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.laying import lay_evenly, lay_in_runs, runs_under
from vlscale.data.plan import Plan, Step, unit_of
from vlscale.data.views import UNIFIED, Views
from vlscale.errors import VlscaleError


@dataclass(frozen=True)
class Rule:
    """How a step is dealt; it changes speed and nothing that is learnt.

    Attributes:
        mode: ``packed``, ``padded`` or ``reference``.
        hidden_size: width H of the model. An example of L tokens counts as L + L^2 / (6 H): a Transformer layer does
            24 H^2 operations per token in its linear parts and 4 L H in attention. None counts tokens.
    """

    mode: str = "packed"
    hidden_size: int | None = None

    def work(self, costs: NDArray[np.int32]) -> NDArray[np.int64]:
        """int64 [B], work of examples of int32 [B] tokens, in units that compare within a step."""
        tokens = costs.astype(np.int64)
        return tokens if self.hidden_size is None else tokens * (6 * self.hidden_size + tokens)


PACKED = Rule()


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank runs in one micro-step: B examples of a :class:`~vlscale.data.plan.Step`, still only row numbers.

    Attributes:
        step: number of the step; micro: number of the micro-step in it.
        task, dataset, texts, images, passes, examples, labels, group, views: as in ``Step``, of these examples.
        weight: 1.0, or 0.0 for an empty slot, which repeats the step's cheapest group and must not count.
        tokens: tokens and regions that the micro-batch runs.
        padded: positions that they take where every example is padded to the longest.
    """

    step: int
    micro: int
    task: str
    dataset: str
    texts: NDArray[np.int64]
    images: NDArray[np.int64]
    passes: NDArray[np.int64]
    examples: NDArray[np.int64]
    labels: NDArray[np.int8]
    group: NDArray[np.int32]
    weight: float
    tokens: int
    padded: int = 0
    views: Views | None = None

    def __len__(self) -> int:
        """Number of examples B."""
        return len(self.examples)


def accumulation(plan: Plan, world_size: int) -> int:
    """Return the least gradient accumulation that is sure to keep every step of ``plan`` under the token ceiling.

    Steps given in tokens are bounded tightly by the budget. Steps given in examples are bounded by the heaviest
    examples that may come together, which is above what a common step holds: prefer tokens at scale.

    Raises:
        VlscaleError: the ceiling is smaller than one group, or a step can never give every process an example.
    """
    settings = plan.settings
    if settings.mode == "reference":
        assert settings.reference_batches is not None
        if settings.reference_batches < world_size:
            raise VlscaleError(
                f"more processes than batches in a step: {world_size} processes, batch.reference_batches "
                f"{settings.reference_batches}; start fewer processes or raise it"
            )
        return -(-settings.reference_batches // world_size)
    largest = [_largest_group(plan, name, task) for name, task in plan.pairs]
    if max(largest) > settings.micro_batch_tokens:
        name, task = plan.pairs[largest.index(max(largest))]
        unit = unit_of(task, settings.group_of(task))
        raise VlscaleError(_too_small(settings.micro_batch_tokens, max(largest), unit, plan.largest_of(name)))
    return max(_accumulation_of(plan, name, task, world_size) for name, task in plan.pairs)


def fill_advice(plan: Plan, world_size: int) -> str | None:
    """One line if micro-batches will be less than 95 % full though a small change would fill them, else None.

    For packed steps counted in tokens: their accumulation jumps by one micro-batch on every process, so a step that is
    a little too large for g of them leaves g + 1 nearly empty. With one micro-batch on every process nothing is lost.
    """
    settings, total = plan.settings, plan.settings.global_batch_tokens
    if settings.mode != "packed" or total is None:
        return None
    bins, ceiling = world_size * accumulation(plan, world_size), settings.micro_batch_tokens
    largest = max(_largest_group(plan, name, task) for name, task in plan.pairs)
    fill = total / (bins * ceiling)
    if fill >= 0.95 or bins == world_size:
        return None
    smallest, fewer = -(-(total - largest) // bins) + largest, bins - world_size
    raised = -(-(total - largest) // fewer) + largest
    return (
        f"batch: {bins} micro-batches of at most {ceiling} tokens will be {fill:.0%} full; batch.micro_batch_tokens "
        f"{smallest} ({bins}) or {raised} ({fewer} micro-batches), or batch.global_batch_tokens "
        f"{bins * (ceiling - largest) + largest}, fills them"
    )


def _largest_group(plan: Plan, name: str, task: str) -> int:
    """Most that one group can take of what the ceiling counts."""
    group = plan.settings.group_of(task)
    padded = plan.settings.mode == "padded"
    return group * plan.heaviest(name, task, 1) if padded else plan.heaviest(name, task, group)


def _accumulation_of(plan: Plan, name: str, task: str, world_size: int) -> int:
    settings = plan.settings
    ceiling, group = settings.micro_batch_tokens, settings.group_of(task)
    largest, most_groups = _largest_group(plan, name, task), plan.most_groups(name, task)
    if settings.global_batch_examples is not None:
        total = plan.heaviest(name, task, settings.global_batch_examples)
    else:
        total = settings.global_batch_tokens or 0
    if most_groups < world_size:
        unit = "units" if task == UNIFIED else "examples" if group == 1 else f"groups of {group} examples"
        raise VlscaleError(
            f"more processes than examples in a step: {world_size} processes, but a step of dataset {name}, task "
            f"{task}, holds at most {most_groups} {unit}; start fewer processes or raise the global batch"
        )
    # A micro-batch per group always fits; fewer fit when the bounds say so.
    micro_batches = most_groups
    if ceiling > largest:
        if settings.mode == "padded":
            source = plan.sources[name]
            longest, shortest = source.heaviest(task, 1), source.smallest_example(task)
            # Padded to its longest example, a group takes at most so many times its tokens.
            swollen = -(-total * group * longest // (longest + (group - 1) * shortest))
            needed = _padded_bound(swollen, ceiling, largest, longest / shortest)
        else:
            needed = -(-(total - largest) // (ceiling - largest))
        micro_batches = min(micro_batches, max(1, needed))
    return -(-micro_batches // world_size)


def _padded_bound(total: int, ceiling: int, largest: int, spread: float) -> int:
    """Most runs of length-sorted groups, each filled up to the ceiling, that ``total`` positions can need.

    ``total`` counts every group padded to its own longest example (for single examples: their tokens). A full run of c
    examples, the longest of them L, has (c + g) L > ceiling for groups of g examples, and the longest of each of its
    groups is at least the next run's, L'. So its groups take at least c L' > ceiling L' / L - g L positions.
    Over all full runs the ratios L' / L multiply to at least 1 / spread, and so (by the inequality of the means, and
    exp(-x) >= 1 - x) add up to at least their number - ln(spread).
    """
    return 1 + math.floor((total + ceiling * math.log(spread)) / (ceiling - largest))


def _where(step: Step, row: int) -> str:
    """Where a step's example is from, in words."""
    if step.views is None:
        return f"dataset {step.dataset}"
    name = step.views.datasets[int(step.views.source[row])]
    return f"dataset {name} ({'image' if step.texts[row] < 0 else 'text'} row {step.examples[row]})"


def _too_small(ceiling: int, largest: int, unit: str, dataset: str) -> str:
    group_cure = " / objectives.wra.group" if "group of" in unit else ""
    if unit == unit_of(UNIFIED, 1):
        group_cure = " / the numbers of views in objectives.unified.contrast"
    return (
        f"micro_batch_tokens {ceiling} is smaller than {unit} of {dataset}: {largest} tokens; "
        f"raise batch.micro_batch_tokens to at least {largest} or lower data.max_regions / max_text_tokens{group_cure}"
    )


def deal(step: Step, world_size: int, gas: int, ceiling: int, rule: Rule = PACKED) -> list[list[MicroBatch]]:
    """Divide ``step`` into ``world_size * gas`` balanced micro-batches.

    Every example lands in exactly one micro-batch of weight 1 and groups stay whole and in order. Micro-batches of
    similar work share a micro-step, and ranks take turns with the larger ones.

    Returns:
        [rank][micro-step].

    Raises:
        VlscaleError: a micro-batch exceeds ``ceiling``: ``gas`` is smaller than :func:`accumulation` or
            :func:`fitting_accumulation` says.
    """
    layout = _Layout(step, world_size, gas, ceiling, rule)
    return [layout.hand(rank) for rank in range(world_size)]


def deal_hand(step: Step, rank: int, world_size: int, gas: int, ceiling: int, rule: Rule = PACKED) -> list[MicroBatch]:
    """Return ``deal(step, world_size, gas, ceiling, rule)[rank]`` without building what the other ranks get."""
    return _Layout(step, world_size, gas, ceiling, rule).hand(rank)


class _Groups:
    """The groups of a step: where each begins, its examples, tokens, work and longest example; int64 [G] each."""

    def __init__(self, step: Step, rule: Rule) -> None:
        self.starts = np.flatnonzero(np.r_[True, step.group[1:] != step.group[:-1]])
        self.sizes = np.diff(np.r_[self.starts, len(step)])
        self.tokens = np.add.reduceat(step.costs.astype(np.int64), self.starts)
        self.work = np.add.reduceat(rule.work(step.costs), self.starts)
        self.longest = np.maximum.reduceat(step.costs.astype(np.int64), self.starts)

    def lay(self, bins: int, ceiling: int, mode: str) -> tuple[NDArray[np.int64], int]:
        """The bin of each group, and what the fullest bin holds of what the ceiling counts."""
        if mode == "padded":
            found = lay_in_runs(self.longest, self.sizes, bins)
            return found, int(self._padded(found, bins).max())
        found = lay_evenly(self.work, bins)
        heaviest = int(np.bincount(found, self.tokens, bins).max())
        if heaviest > ceiling and mode == "packed":  # even in work is not even in tokens, whose bound is proved
            found = lay_evenly(self.tokens, bins)
            heaviest = int(np.bincount(found, self.tokens, bins).max())
        return found, heaviest

    def _padded(self, bin_of_group: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
        longest = np.zeros(bins, np.int64)
        np.maximum.at(longest, bin_of_group, self.longest)
        return longest * np.bincount(bin_of_group, self.sizes, bins).astype(np.int64)


class _Layout:
    """Which examples of a step lie in which micro-batch."""

    def __init__(self, step: Step, world_size: int, gas: int, ceiling: int, rule: Rule) -> None:
        self._step, self._world_size, self._gas = step, world_size, gas
        groups, bins = _Groups(step, rule), world_size * gas
        bin_of_group, heaviest = groups.lay(bins, ceiling, rule.mode)
        # UNITER's budget does not count [CLS] and [SEP]; its batches are run as they are.
        if heaviest > ceiling and rule.mode != "reference":
            raise VlscaleError(
                f"step {step.index}: a micro-batch of {heaviest} tokens exceeds batch.micro_batch_tokens {ceiling} "
                f"at {world_size} processes x {gas} micro-steps; raise the ceiling or the accumulation"
            )
        bin_of_example = np.repeat(bin_of_group, groups.sizes)
        self._by_bin = np.argsort(bin_of_example, kind="stable")
        self._edges = np.r_[0, np.cumsum(np.bincount(bin_of_example, minlength=bins))]
        self._falling = np.argsort(-np.bincount(bin_of_group, groups.work, bins), kind="stable")
        cheapest = int(np.argmin(groups.tokens))
        self._spare = np.arange(groups.starts[cheapest], groups.starts[cheapest] + groups.sizes[cheapest])

    def hand(self, rank: int) -> list[MicroBatch]:
        """What one rank gets, micro-step by micro-step; empty slots repeat the cheapest group at weight 0."""
        dealt = []
        for micro in range(self._gas):
            turn = rank if micro % 2 == 0 else self._world_size - 1 - rank
            chosen = self._falling[micro * self._world_size + turn]
            members = self._by_bin[self._edges[chosen] : self._edges[chosen + 1]]
            weight = 1.0 if len(members) else 0.0
            dealt.append(_micro_batch(self._step, micro, members if weight else self._spare, weight))
        return dealt


def fitting_accumulation(step: Step, world_size: int, ceiling: int, rule: Rule = PACKED) -> int:
    """Return the least accumulation under which this one step fits (evaluation, where steps need not be alike).

    Raises:
        VlscaleError: one group alone exceeds the ceiling.
    """
    groups = _Groups(step, rule)
    each = groups.longest * groups.sizes if rule.mode == "padded" else groups.tokens
    largest = int(each.argmax())
    if each[largest] > ceiling:
        unit = unit_of(step.task, int(groups.sizes[largest]))
        raise VlscaleError(_too_small(ceiling, int(each[largest]), unit, _where(step, int(groups.starts[largest]))))
    if rule.mode == "padded":
        falling = np.argsort(-groups.longest, kind="stable")
        ends = np.cumsum(groups.sizes[falling])
        return -(-len(runs_under(groups.longest[falling], ends, ceiling, len(falling))) // world_size)
    gas = max(1, -(-step.tokens // (world_size * ceiling)))
    while groups.lay(world_size * gas, ceiling, rule.mode)[1] > ceiling:
        gas += 1
    return gas


def straggler(dealt: list[list[MicroBatch]]) -> float:
    """Return tokens of the busiest rank over the mean of all ranks; 1.0 is a perfect balance."""
    tokens = np.array([sum(micro.tokens for micro in rank) for rank in dealt], np.float64)
    return float(tokens.max() / tokens.mean())


def _micro_batch(step: Step, micro: int, members: NDArray[np.int64], weight: float) -> MicroBatch:
    costs = step.costs[members]
    return MicroBatch(
        step=step.index,
        micro=micro,
        task=step.task,
        dataset=step.dataset,
        texts=step.texts[members],
        images=step.images[members],
        passes=step.passes[members],
        examples=step.examples[members],
        labels=step.labels[members],
        group=step.group[members],
        weight=weight,
        tokens=int(costs.sum(dtype=np.int64)),
        padded=int(costs.max()) * len(costs),
        views=None if step.views is None else step.views.take(members),
    )
