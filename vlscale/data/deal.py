"""Dealing: a finished step is divided into world size x accumulation balanced micro-batches under a token ceiling.

Groups (single examples, or the pairs' groups of the hinge loss) are laid, largest first, into the lightest micro-batch
(LPT, Graham 1969). Any such list scheduling over n micro-batches obeys

    heaviest <= total / n + largest group * (1 - 1 / n)

which is what the accumulation is derived from: it holds for every step, before any step is cut.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.plan import Plan, Step
from vlscale.errors import VlscaleError


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank runs in one micro-step: B examples of a :class:`~vlscale.data.plan.Step`, still only row numbers.

    Attributes:
        step: number of the step; micro: number of the micro-step in it.
        task, dataset, texts, images, passes, examples, labels, group: as in ``Step``, restricted to these examples.
        weight: 1.0, or 0.0 for an empty slot, which repeats the step's cheapest group and must not count.
        tokens: tokens and regions that the micro-batch runs.
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
    ceiling = settings.micro_batch_tokens
    needed = 1
    bounds = [plan.sources[name].heaviest(task, settings.group_of(task)) for name, task in plan.pairs]
    if max(bounds) > ceiling:
        name, task = plan.pairs[bounds.index(max(bounds))]
        raise VlscaleError(_too_small(ceiling, max(bounds), settings.group_of(task), name))
    for (name, task), largest in zip(plan.pairs, bounds, strict=True):
        source, group = plan.sources[name], settings.group_of(task)
        if settings.global_batch_examples is not None:
            total = source.heaviest(task, settings.global_batch_examples)
            most_groups = settings.global_batch_examples // group
        else:
            total = settings.global_batch_tokens or 0
            most_groups = total // (group * source.smallest_example(task))
        if most_groups < world_size:
            unit = "examples" if group == 1 else f"groups of {group} examples"
            raise VlscaleError(
                f"more processes than examples in a step: {world_size} processes, but a step of dataset {name}, task "
                f"{task}, holds at most {most_groups} {unit}; start fewer processes or raise the global batch"
            )
        # A micro-batch per group always fits; fewer fit when the bound above says so.
        micro_batches = most_groups
        if ceiling > largest:
            micro_batches = min(micro_batches, max(1, -(-(total - largest) // (ceiling - largest))))
        needed = max(needed, -(-micro_batches // world_size))
    return needed


def _too_small(ceiling: int, largest: int, group: int, dataset: str) -> str:
    unit = "one example" if group == 1 else f"one group of {group} examples"
    group_cure = "" if group == 1 else " / objectives.wra.group"
    return (
        f"micro_batch_tokens {ceiling} is smaller than {unit} of dataset {dataset}: {largest} tokens; "
        f"raise batch.micro_batch_tokens to at least {largest} or lower data.max_regions / max_text_tokens{group_cure}"
    )


def deal(step: Step, world_size: int, gas: int, ceiling: int) -> list[list[MicroBatch]]:
    """Divide ``step`` into ``world_size * gas`` micro-batches, balanced by tokens.

    Every example lands in exactly one micro-batch of weight 1 and groups stay whole and in order. Micro-batches of
    similar size share a micro-step, and ranks take turns with the larger ones.

    Returns:
        [rank][micro-step].

    Raises:
        VlscaleError: a micro-batch exceeds ``ceiling``: ``gas`` is smaller than :func:`accumulation` or
            :func:`fitting_accumulation` says.
    """
    layout = _Layout(step, world_size, gas, ceiling)
    return [layout.hand(rank) for rank in range(world_size)]


def deal_hand(step: Step, rank: int, world_size: int, gas: int, ceiling: int) -> list[MicroBatch]:
    """Return ``deal(step, world_size, gas, ceiling)[rank]`` without building what the other ranks get."""
    return _Layout(step, world_size, gas, ceiling).hand(rank)


class _Layout:
    """Which examples of a step lie in which micro-batch."""

    def __init__(self, step: Step, world_size: int, gas: int, ceiling: int) -> None:
        self._step, self._world_size, self._gas = step, world_size, gas
        starts, costs = _groups(step)
        bin_of_group, self._loads = _lay(costs, world_size * gas)
        heaviest = int(self._loads.max())
        if heaviest > ceiling:
            raise VlscaleError(
                f"step {step.index}: a micro-batch of {heaviest} tokens exceeds batch.micro_batch_tokens {ceiling} "
                f"at {world_size} processes x {gas} micro-steps; raise the ceiling or the accumulation"
            )
        sizes = np.diff(np.r_[starts, len(step)])
        bin_of_example = np.repeat(bin_of_group, sizes)
        self._by_bin = np.argsort(bin_of_example, kind="stable")
        self._edges = np.r_[0, np.cumsum(np.bincount(bin_of_example, minlength=world_size * gas))]
        self._falling = np.argsort(-self._loads, kind="stable")
        cheapest = int(np.argmin(costs))
        self._spare = np.arange(starts[cheapest], starts[cheapest] + sizes[cheapest])
        self._spare_tokens = int(costs[cheapest])

    def hand(self, rank: int) -> list[MicroBatch]:
        """What one rank gets, micro-step by micro-step; empty slots repeat the cheapest group at weight 0."""
        dealt = []
        for micro in range(self._gas):
            turn = rank if micro % 2 == 0 else self._world_size - 1 - rank
            chosen = self._falling[micro * self._world_size + turn]
            members = self._by_bin[self._edges[chosen] : self._edges[chosen + 1]]
            if len(members):
                dealt.append(_micro_batch(self._step, micro, members, 1.0, int(self._loads[chosen])))
            else:
                dealt.append(_micro_batch(self._step, micro, self._spare, 0.0, self._spare_tokens))
        return dealt


def fitting_accumulation(step: Step, world_size: int, ceiling: int) -> int:
    """Return the least accumulation under which this one step fits (evaluation, where steps need not be alike).

    Raises:
        VlscaleError: one group alone exceeds the ceiling.
    """
    starts, costs = _groups(step)
    largest = int(costs.argmax())
    if costs[largest] > ceiling:
        size = int(np.diff(np.r_[starts, len(step)])[largest])
        raise VlscaleError(_too_small(ceiling, int(costs[largest]), size, step.dataset))
    gas = max(1, -(-step.tokens // (world_size * ceiling)))
    while int(_lay(costs, world_size * gas)[1].max()) > ceiling:
        gas += 1
    return gas


def straggler(dealt: list[list[MicroBatch]]) -> float:
    """Return tokens of the busiest rank over the mean of all ranks; 1.0 is a perfect balance."""
    tokens = np.array([sum(micro.tokens for micro in rank) for rank in dealt], np.float64)
    return float(tokens.max() / tokens.mean())


def _groups(step: Step) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each group starts (int64 [G]) and what it costs (int64 [G])."""
    starts = np.flatnonzero(np.r_[True, step.group[1:] != step.group[:-1]])
    return starts, np.add.reduceat(step.costs.astype(np.int64), starts)


def _lay(costs: NDArray[np.int64], bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay groups into bins, largest first into the lightest. Returns the bin per group and the load per bin."""
    falling = np.argsort(-costs, kind="stable")
    bin_of_group = np.empty(len(costs), np.int64)
    if bins == 1:
        bin_of_group[:] = 0
        return bin_of_group, costs.sum(keepdims=True)
    # Load and bin share one integer: comparing integers is several times faster than comparing tuples.
    shift = bins.bit_length()
    mask = (1 << shift) - 1
    heap = list(range(bins))
    chosen = []
    take = heapq.heapreplace
    for cost in (costs[falling] << shift).tolist():
        lightest = heap[0]
        chosen.append(lightest & mask)
        take(heap, lightest + cost)
    bin_of_group[falling] = chosen
    loads = np.zeros(bins, np.int64)
    for packed in heap:
        loads[packed & mask] = packed >> shift
    return bin_of_group, loads


def _micro_batch(step: Step, micro: int, members: NDArray[np.int64], weight: float, tokens: int) -> MicroBatch:
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
        tokens=tokens,
    )
