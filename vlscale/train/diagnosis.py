"""What to say when gradients stop being finite: the objective, the layer, the rank, the steps that were skipped."""

from __future__ import annotations

import math
from collections.abc import Callable

from vlscale.errors import VlscaleError
from vlscale.train.engine import Engine, StepReport
from vlscale.train.metrics import TermSums
from vlscale.train.processes import Processes

_SHOWN = 3


def stop_with_diagnosis(
    engine: Engine, processes: Processes, place: str, task: str, report: StepReport, replay: Callable[[TermSums], None]
) -> None:
    """Run the failed window once more while watching each gradient, and raise with what was seen.

    Args:
        engine: its weights have not been changed by the failed step.
        processes: all of them have to call it.
        place: where it happened, for the message.
        task: the objective.
        report: of the failed step.
        replay: runs forward and backward of the window again, adding its terms.

    Raises:
        VlscaleError: always.
    """
    sums = TermSums()
    with engine.watching_gradients() as layers:
        replay(sums)
    names = sums.names()
    terms = [name for name, value in zip(names, sums.local(), strict=True) if not math.isfinite(value)]
    seen = processes.gather((terms, list(dict.fromkeys(layers))))
    parts = [f"rank {rank}: {_describe(*found)}" for rank, found in enumerate(seen) if found[0] or found[1]]
    shown = "; ".join(parts[:_SHOWN]) + (f"; and {len(parts) - _SHOWN} more ranks" if len(parts) > _SHOWN else "")
    skipped = ""
    if engine.loss_scales is not None:
        counts = ", ".join(f"{name} {count}" for name, count in engine.loss_scales.skipped.items())
        skipped = f"; loss scale {report.loss_scale:g} cannot go lower; steps skipped so far: {counts}"
    raise VlscaleError(
        f"{place}: the gradient of objective {task} is not finite ({shown or 'not so when the step is run again'})"
        f"{skipped}; lower optimizer.lr or gradient_clipping, warm up for longer, or look at the data of this step"
    )


def _describe(terms: list[str], layers: list[str]) -> str:
    parts = []
    if terms:
        parts.append(f"loss term {', '.join(terms)}")
    if layers:
        parts.append(f"{len(layers)} parameters, first {layers[0].removeprefix('model.')}")
    return ", ".join(parts)
