"""``--sweep``: the same recipe under every ZeRO stage, micro-batch, checkpointing and number of GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from vlscale.errors import VlscaleError
from vlscale.plan.predict import Assumptions, Job, Prediction, predict
from vlscale.plan.workload import Planner, Source

POLICIES = ("none", "full")
SHARES = (1.0, 0.5, 0.25)
"""Of ``batch.micro_batch_tokens``: a smaller ceiling means more accumulation and less memory."""
SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of GPUs in a scaling plot."""


@dataclass(frozen=True)
class Point:
    """One setting and what became of it.

    Attributes:
        gpus, stage, policy, micro_batch_tokens: the setting.
        prediction: what is predicted; None: it cannot be run.
        reason: why not.
    """

    gpus: int
    stage: int
    policy: str
    micro_batch_tokens: int
    prediction: Prediction | None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the setting and its main figures."""
        found: dict[str, Any] = {
            "gpus": self.gpus, "stage": self.stage, "activation_checkpointing": self.policy,
            "micro_batch_tokens": self.micro_batch_tokens, "reason": self.reason or None,
        }  # fmt: skip
        if self.prediction is None:
            return found
        made = self.prediction
        return found | {
            "accumulation": made.workload.accumulation, "fits": made.memory.fits, "peak_bytes": made.memory.peak,
            "step_s": made.step_s, "exposed_s": made.traffic.exposed_s, "tokens_per_s": made.tokens_per_s,
            "mfu": made.mfu, "days": made.days, "gpu_hours": made.gpu_hours,
        }  # fmt: skip


def sweep(job: Job, source: Source, gpus: Iterable[int], assumptions: Assumptions | None = None) -> list[Point]:
    """Predict every combination; those that deal the same step in the same way are listed once.

    Args:
        job: recipe, JSON and GPU type; its stage, policy, ceiling and number are varied.
        source: the recipe's lengths.
        gpus: numbers of GPUs.
        assumptions: see :class:`Assumptions`.
    """
    numbers = list(dict.fromkeys(gpus))
    return [point for tokens in _ceilings(job) for point in _under(job, source, tokens, numbers, assumptions)]


def scaling(job: Job, planner: Planner, gpus: Iterable[int], assumptions: Assumptions | None = None) -> list[Point]:
    """Predict the job as it is on other numbers of GPUs, the global batch unchanged."""
    return [_point(replace(job, gpus=number), planner, assumptions) for number in gpus]


def _ceilings(job: Job) -> list[int]:
    whole = job.recipe.batch.micro_batch_tokens
    return list(dict.fromkeys(max(1, int(whole * share)) for share in SHARES))


def _under(
    job: Job, source: Source, tokens: int, numbers: list[int], assumptions: Assumptions | None
) -> Iterator[Point]:
    batch = job.recipe.batch.model_copy(update={"micro_batch_tokens": tokens})
    recipe = job.recipe.model_copy(update={"batch": batch})
    try:
        planner = Planner(recipe, source)
    except VlscaleError as error:
        for number in numbers:
            yield Point(number, job.zero.stage, job.checkpointing, tokens, None, str(error))
        return
    # Stage 0 in half precision is refused by the trainer, so it is no choice there.
    stages = (0, 1, 2, 3) if job.zero.precision == "fp32" else (1, 2, 3)
    for number in numbers:
        for stage in stages:
            for policy in dict.fromkeys((*POLICIES, job.checkpointing)):
                zero = replace(job.zero, stage=stage)
                yield _point(replace(job, recipe=recipe, zero=zero, gpus=number, policy=policy), planner, assumptions)


def _point(job: Job, planner: Planner, assumptions: Assumptions | None) -> Point:
    setting = (job.gpus, job.zero.stage, job.checkpointing, job.recipe.batch.micro_batch_tokens)
    try:
        return Point(*setting, predict(job, planner, assumptions))
    except VlscaleError as error:
        return Point(*setting, None, str(error))


def best(points: Iterable[Point]) -> dict[int, Point]:
    """Return, per number of GPUs, the fastest setting that fits."""
    found: dict[int, Point] = {}
    for point in points:
        if point.prediction is None or not point.prediction.memory.fits:
            continue
        other = found.get(point.gpus)
        if other is None or other.prediction is None or point.prediction.step_s < other.prediction.step_s:
            found[point.gpus] = point
    return found
