"""The learning rate as a pure function of the optimiser steps taken, overflow skips excluded."""

from __future__ import annotations

from vlscale.config import ScheduleSection
from vlscale.train.paddle import linear_warmup_decay

LEARNING_RATE_FLOOR = 1e-8
"""What UNITER's authors put in place of a rate that would be zero, from the last step on."""


def warmup_linear(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor in 0..1 for the ``step``-th step, counted from 1: linear up, then linear down to zero.

    It reaches 1 at ``warmup_steps`` and 0 at ``total_steps`` (UNITER, ``optim/sched.py``).
    """
    if step <= warmup_steps:
        return step / max(warmup_steps, 1)
    return max(0.0, (total_steps - step) / max(total_steps - warmup_steps, 1))


def learning_rate(section: ScheduleSection, peak: float, steps_taken: int) -> float:
    """Return the rate for the next step, when ``steps_taken`` (0 at the start) have changed the weights so far.

    Args:
        section: the recipe's schedule.
        peak: ``optimizer.lr``, the rate at the end of the warm-up.
        steps_taken: optimiser steps that were taken; skipped ones do not count.
    """
    if section.kind == "paddle":
        return linear_warmup_decay(steps_taken, peak, section.warmup_steps, section.total_steps)
    rate = peak * warmup_linear(steps_taken + 1, section.warmup_steps, section.total_steps)
    return rate if rate > 0 else LEARNING_RATE_FLOOR
