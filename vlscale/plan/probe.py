"""``--probe``: the largest token budget that fits on this machine, and how fast the recipe trains with it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from vlscale.config import Recipe
from vlscale.data.deal import accumulation
from vlscale.data.plan import Plan
from vlscale.errors import VlscaleError
from vlscale.plan.clock import Clock
from vlscale.plan.ladder import Found, Ladder
from vlscale.plan.memory import GIB, MemoryBytes, Zero, cures, memory_bytes, withheld_bytes
from vlscale.plan.model import model_sizes
from vlscale.plan.sample import Sampler
from vlscale.plan.trial import Trial, peak_of, ran_out
from vlscale.plan.workload import Planner, Source, TaskWork, Workload, least_ceiling

_FIRST, _SIZING = 1024, 256
"""Tokens of the first trial, and of the micro-batches that tell how long a longer one will take."""
_ROUNDS = 3
STAGE_3 = "ZeRO stage 3 was measured with whole weights on the GPU; the real run needs less memory and fetches weights"


@dataclass
class Allowance:
    """Seconds that the probe may still take.

    Attributes:
        search_s: until the search has to end; total_s: until everything has.
    """

    search_s: float = 25.0
    total_s: float = 50.0
    _began: float = field(default_factory=time.monotonic)

    def search(self) -> float:
        """Seconds left to the search."""
        return self.search_s - (time.monotonic() - self._began)

    def total(self) -> float:
        """Seconds left."""
        return self.total_s - (time.monotonic() - self._began)


@dataclass(frozen=True)
class Throughput:
    """What was measured with the budget, in one process and without communication.

    Attributes:
        accumulation: micro-steps per step; tokens: of a step on one GPU; flops: of those.
        passes_s: forward and backward of a step; update_s: the optimiser; micro_s: task -> seconds of a micro-step.
        scaled: micro-batches were shorter than those of the recipe, and their time was scaled: more takes too long.
        clock: what was read.
    """

    accumulation: int
    tokens: float
    flops: float
    passes_s: float
    update_s: float
    micro_s: dict[str, float]
    scaled: bool
    clock: str

    @property
    def step_s(self) -> float:
        """Seconds of an optimiser step."""
        return self.passes_s + self.update_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of one GPU."""
        return self.tokens / self.step_s

    def least(self, other: Throughput) -> Throughput:
        """Return the least times of two measurements of the same."""
        micro = {task: min(seconds, other.micro_s[task]) for task, seconds in self.micro_s.items()}
        passes, update = min(self.passes_s, other.passes_s), min(self.update_s, other.update_s)
        return dataclasses.replace(self, passes_s=passes, update_s=update, micro_s=micro)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return asdict(self) | {"step_s": self.step_s, "tokens_per_s": self.tokens_per_s}


class Probe:
    """Tries and measures one recipe.

    Args:
        recipe: the recipe; source: its lengths and model.
        zero: the DeepSpeed JSON; gpus: GPUs that share states and steps.
        device: where; limit: bytes that may be taken.
        allowance: seconds.

    Raises:
        VlscaleError: recipe and lengths do not go together.
    """

    def __init__(
        self, recipe: Recipe, source: Source, zero: Zero, gpus: int, device: torch.device, limit: float,
        allowance: Allowance,
    ) -> None:  # fmt: skip
        self.recipe, self.source, self.zero, self.gpus = recipe, source, zero, gpus
        self._device, self._limit, self._allowance = device, limit, allowance
        if recipe.batch.mode == "reference":
            raise VlscaleError(
                "--probe: batch.mode is reference, where batch.micro_batch_tokens decides what is learnt, so it is not "
                "chosen by size: probe with --set batch.mode=packed"
            )
        self.planner = Planner(recipe, source)
        self._sampler = Sampler(self.planner)
        self._withheld = withheld_bytes(zero, model_sizes(source.config), gpus, limit, device.type == "cpu")
        self._heaviest = max(self.planner.tasks, key=lambda task: self._memory(task, _FIRST).activations.peak)

    def search(self) -> Found:
        """Find the largest budget; where a whole step fits, the recipe's own if that is larger.

        Raises:
            VlscaleError: not even the least micro-batch fits; what to change is named.
        """
        floor = least_ceiling(self.planner.plan)
        if self._device.type == "cpu" and not self._memory(self._heaviest, floor).fits:
            raise self._too_large(f"the states and a micro-batch of {floor} tokens, the least,")
        found = self._search(self._trial)
        if found.bounded == "step":
            found = dataclasses.replace(found, tokens=max(found.tokens, self.recipe.batch.micro_batch_tokens))
        return found

    @cached_property
    def _trial(self) -> Trial:
        config, objectives = self.source.config, self._sampler.objectives
        try:
            return Trial(self.recipe, config, objectives, self.zero, self.gpus, self._device)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise self._too_large("the model's states") from None

    def _memory(self, task: TaskWork, tokens: float, zero: Zero | None = None, policy: str = "") -> MemoryBytes:
        policy, cpu = policy or self.recipe.activation_checkpointing, self._device.type == "cpu"
        sizes = model_sizes(self.source.config)
        loads = [task.load(tokens)]
        return memory_bytes(zero or self.zero, self.source.config, sizes, self.gpus, loads, policy, self._limit, cpu)

    def _too_large(self, what: str) -> VlscaleError:
        """An error that names what to change; micro-batches cannot be smaller than they are."""
        least = least_ceiling(self.planner.plan)

        def memory_of(zero: Zero, policy: str, tokens: float) -> MemoryBytes:
            return self._memory(self._heaviest, tokens, zero, policy)

        policy = self.recipe.activation_checkpointing
        named = [c for c in cures(memory_of, self.zero, policy, self.gpus, least) if "micro_batch_tokens" not in c]
        change = "; ".join(named) or "a smaller model, or more memory"
        parts = self._withheld.describe()
        return VlscaleError(
            f"--probe: recipe {self.recipe.name} does not fit: {what} exceed the {self._limit / GIB:.2f} GiB at hand"
            f"{f' (GiB a run needs beside: {parts})' if parts else ''}; change: {change}"
        )

    def _search(self, trial: Trial) -> Found:
        floor = least_ceiling(self.planner.plan)
        cap = max(floor, whole_step(self.planner.plan, self.gpus))
        predicted = self._predicted(floor, cap)
        ladder = Ladder(floor, cap, self._limit, self._withheld, self._slope(floor))
        tokens = min(max(floor, _FIRST), predicted) if self._device.type == "cpu" else predicted
        slowest = 0.0
        while True:
            began = time.monotonic()
            ladder.add(tokens, self._attempt(trial, tokens))
            slowest = max(slowest, (time.monotonic() - began) / tokens)
            if ladder.hopeless:
                raise self._too_large(f"micro-batches of {floor} tokens, the least,")
            following = ladder.following()
            if following is None:
                return ladder.found(predicted, False)
            if following * slowest * 1.5 > self._allowance.search():
                if self._device.type == "cuda":
                    return ladder.found(predicted, False)
                within = int(self._allowance.search() / (1.5 * slowest))
                if within < 2 * tokens or len(ladder.tried) > 2:
                    return ladder.found(predicted, True)
                following = within
            tokens = following

    def _slope(self, floor: int) -> float:
        """Bytes per token, as predicted."""
        low, high = (self._memory(self._heaviest, tokens).peak for tokens in (4 * floor, 8 * floor))
        return (high - low) / (4 * floor)

    def _predicted(self, floor: int, cap: int) -> int:
        low, high = floor, cap
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._memory(self._heaviest, middle).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _attempt(self, trial: Trial, tokens: int) -> float | None:
        """Peak of a step with the heaviest task's fullest micro-batch; None if memory ran out."""
        batch = None
        try:
            batch = self._sampler.batch(self._heaviest.task, tokens).to(self._device)
            # On a CPU nothing stops a process that takes too much: what is predicted not to fit is not run.
            if self._device.type == "cpu" and self._memory(self._heaviest, batch.tokens).peak > 1.2 * self._limit:
                return None
            trial.step()  # the optimiser's states exist from the first step on
            with peak_of(trial, [batch]) as peak:
                trial.micro_step(batch)
                trial.step()
        except RuntimeError as error:
            if not ran_out(error):
                raise
            peak = []
        del batch
        trial.clear()
        _release(self._device)
        return peak[0] if peak else None

    def measure(self, budget: int) -> Throughput:
        """Measure mean micro-batches of each task, and the update, with a budget that :meth:`search` found."""
        work, trial = self.dealt(budget), self._trial
        clock, left = Clock(self._device), max(5.0, self._allowance.total())
        sizes: dict[str, tuple[float, list[int]]] = {}
        calls: dict[tuple[str, int], Callable[[], object]] = {("update", 0): trial.step}
        for task in work.tasks:
            tokens = task.tokens / (work.gpus * work.accumulation)
            small = self._sampler.batch(task.task, min(tokens, _SIZING)).to(self._device)
            once = clock.seconds(partial(trial.micro_step, small)) / small.tokens
            most = left / len(work.tasks) / (_ROUNDS + 2) / once
            large = self._sampler.batch(task.task, min(tokens, max(most, 2 * small.tokens))).to(self._device)
            shortened = large.tokens < 0.9 * tokens
            timed = [small, large] if shortened and large.tokens > small.tokens else [large]
            sizes[task.task] = (tokens, [batch.tokens for batch in timed])
            for number, batch in enumerate(timed):
                calls[task.task, number] = partial(trial.micro_step, batch)
        found = clock.least(calls, _ROUNDS)
        micro = {
            name: at_tokens(tokens, lengths, [found[name, number] for number in range(len(lengths))])
            for name, (tokens, lengths) in sizes.items()
        }
        passes = work.accumulation * sum(task.share * micro[task.task] for task in work.tasks)
        scaled = any(lengths[-1] < 0.9 * tokens for tokens, lengths in sizes.values())
        return Throughput(
            work.accumulation, work.mean("tokens") / self.gpus, work.mean("flops") / self.gpus, passes,
            found["update", 0], micro, scaled, clock.name,
        )  # fmt: skip

    def dealt(self, budget: int) -> Workload:
        """Return the recipe's steps dealt under another budget."""
        return Planner(with_budget(self.recipe, budget), self.source).deal(self.gpus)


def whole_step(plan: Plan, gpus: int) -> int:
    """Return the least budget under which a step needs no accumulation; more changes nothing."""

    def enough(tokens: int) -> bool:
        other = copy.copy(plan)
        other.settings = dataclasses.replace(plan.settings, micro_batch_tokens=tokens)
        return accumulation(other, gpus) == 1

    low = high = least_ceiling(plan)
    while not enough(high):
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    """Return the recipe with another ``batch.micro_batch_tokens``."""
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_batch_tokens": tokens})})


def at_tokens(tokens: float, lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds of a micro-batch: of one measured length in proportion, of two along their line."""
    if len(lengths) == 1:
        return seconds[0] * tokens / lengths[0]
    slope = max(0.0, seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
    return seconds[1] + slope * (tokens - lengths[1])


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
