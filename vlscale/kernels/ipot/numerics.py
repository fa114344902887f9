"""The constants of IPOT's numerics that all backends share."""

from __future__ import annotations

import math

import torch

NORM_FLOOR = 1e-5
"""Norms are clamped below by this value, so a zero vector has cost 1 to everything and a finite gradient."""

COSINE_RANGE = 2.0
"""Largest spread that cosine costs can have."""

PLAN_FORM_LIMITS = {torch.float32: 60.0, torch.float64: 600.0}
"""Largest spread of logits in the plan form, also in ``ipot_cpu.cpp``: so far below a word's largest entry nothing
counts, and the exponent's range (87 and 709) is not yet near."""


def needs_log_form(cost_range: float, beta: float, pairs: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether costs are too wide for the plan form.

    Args:
        cost_range: a bound on the largest minus the smallest cost of an example.
        beta: proximal step.
        pairs: a bound on words times regions of an example.
        dtype: of the computation, float32 or float64.
    """
    return cost_range / beta + math.log(pairs) >= PLAN_FORM_LIMITS[dtype]
