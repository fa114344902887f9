"""UNIMO's optimiser and schedule as its authors ran them, on Paddle, where they differ from torch's and UNITER's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlscale.train.adamw import ReferenceAdamW


class PaddleAdamW(ReferenceAdamW):
    """Adam with Paddle's rule for epsilon, and UNIMO's decay.

    ``p = p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps) - lr weight_decay p``. Epsilon is added to the root of
    the raw second moment, as in :class:`~vlscale.train.adamw.ReferenceAdamW`; the decay takes the value from before the
    step, not from after it. Clip the gradients to a norm of 1 before.
    """

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        super()._update(params, {**group, "weight_decay": 0.0})


def linear_warmup_decay(steps_taken: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return UNIMO's learning rate for the next step: from 0 up to ``peak``, then down to 0 at ``total_steps``.

    The first step's rate is 0. The way down does not start at the end of the warm-up but at step 0: the rate jumps from
    nearly ``peak`` to ``peak * (1 - warmup_steps / total_steps)``.

    Args:
        steps_taken: optimiser steps taken so far.
        peak: the highest rate.
        warmup_steps: steps of the warm-up.
        total_steps: where the rate is 0.
    """
    if steps_taken < warmup_steps:
        return peak * steps_taken / warmup_steps
    return peak * max(0.0, 1 - steps_taken / total_steps)
