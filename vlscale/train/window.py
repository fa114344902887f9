"""Window negatives: the pairs of the whole step as each other's negatives, whatever micro-batch they are in (UNIMO).

Contrast over a whole step does not fit into memory, so the step runs twice. A first pass without gradients leaves a few
numbers per pair (gradient caching; Gao et al., 2021). In the second pass each micro-batch computes the whole step's
contrast with its own pairs live and all others as those numbers, and the gradients of all micro-batches add up to the
gradient of one large batch. Both passes draw the same dropout, because every micro-batch is seeded by itself.

Before that, keys tell which pairs are no negatives of each other (the same image, the same caption).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from vlscale.objectives import Objective
from vlscale.ragged import RaggedBatch
from vlscale.train.engine import Engine
from vlscale.train.processes import Processes


def with_keys(
    processes: Processes, objective: Objective, window: Sequence[RaggedBatch]
) -> tuple[list[RaggedBatch], dict[str, float]]:
    """Tell the micro-batches of a step of all pairs' keys; all ranks have to call it.

    Args:
        processes: of this run.
        objective: of the step's task; without window negatives there is nothing to tell.
        window: this rank's micro-batches, on the CPU.

    Returns:
        The batches, and the counts of the whole step that depend on the keys: they replace those that were added up
        before.
    """
    if not objective.needs_window:
        return list(window), {}
    everybody = processes.gather_rows(torch.cat([objective.window_keys(batch) for batch in window]))
    return objective.share_keys(window, everybody.rows, sum(everybody.counts[: processes.rank]))


def with_window(
    engine: Engine,
    processes: Processes,
    objective: Objective,
    window: Sequence[RaggedBatch],
    seed: Callable[[int], None] | None = None,
) -> list[RaggedBatch]:
    """Return the micro-batches of a step, each with what it must know of all others; all ranks have to call it.

    Args:
        engine: runs the first pass.
        processes: of this run.
        objective: of the step's task; without window negatives the micro-batches are returned as they are.
        window: this rank's micro-batches; :func:`with_keys` is called for those that have no keys yet.
        seed: seeds torch's generators for a micro-step; None: nothing is drawn (evaluation).

    Returns:
        Batches whose targets also hold ``window`` float32 [G, R], a row per pair of the step.
    """
    if not objective.needs_window:
        return list(window)
    if any("window_keys" not in batch.targets for batch in window):
        window, _ = with_keys(processes, objective, window)
    found = []
    for micro, batch in enumerate(window):
        if seed is not None:
            seed(micro)
        with torch.no_grad():
            found.append(engine.represent(batch.task, batch.to(processes.device)))
    rows = processes.gather_rows(torch.cat(found)).rows
    return [dataclasses.replace(batch, targets=batch.targets | {"window": rows}) for batch in window]
