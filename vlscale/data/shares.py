"""How often a plan's steps are of each dataset and task, and what part of a unified step each dataset is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlscale.data.reference import ReferenceOrder
from vlscale.data.source import PlanSettings, Source
from vlscale.data.views import UNIFIED
from vlscale.errors import VlscaleError

Sizes = Mapping[str, tuple[str, float]]
"""Dataset -> ``("choose", n)`` or ``("repeat", r)``; see :class:`~vlscale.data.plan.Plan`."""


def step_shares(
    sources: Mapping[str, Source],
    pairs: Sequence[tuple[str, str]],
    settings: PlanSettings,
    sizes: Sizes,
) -> NDArray[np.float64]:
    """float64, the probability that a step is of each (dataset, task); of task ``unified`` its part of units.

    Shares that count samples (``mix_unit: samples``, ``repeat``, ``choose``) become shares of steps by the mean cost of
    an example: a step of so many tokens holds more short examples than long ones. Shares of unified steps count units,
    which are samples already: ``mix_unit`` makes no difference to them.

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
        if task != UNIFIED and (sizes or settings.mix_unit == "samples"):
            share /= _relative_examples(source, settings)
        shares.append(share)
    found = np.array(shares)
    return np.asarray(found / found.sum())


def _relative_examples(source: Source, settings: PlanSettings) -> float:
    """Examples of a step of ``source``, up to a factor that all datasets share."""
    if isinstance(source.order, ReferenceOrder):
        return source.order.mean_batch
    return 1.0 if settings.global_batch_tokens is None else 1.0 / source.survey.costs.mean
