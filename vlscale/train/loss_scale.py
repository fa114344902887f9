"""One dynamic loss scale per task (fp16): the tasks' gradients differ by orders of magnitude.

A scale that serves them all would be the smallest of them, and the others' small gradients would vanish. UNITER's
authors kept one scale per task, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from vlscale.errors import VlscaleError

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
MAX_SKIPS_IN_A_ROW = 40
"""From the usual 2**16 down to 1 takes 17 skips: a task that skips more than twice as many does not recover."""


class TaskLossScales:
    """Swaps the loss scaler of a ZeRO optimiser, task by task, and notices when one collapses.

    Args:
        optimizer: anything with an attribute ``loss_scaler`` that has ``cur_scale`` and ``update_scale``.
        tasks: every task of the run.

    Attributes:
        skipped: task -> steps skipped in the whole run.
    """

    def __init__(self, optimizer: Any, tasks: Iterable[str]) -> None:
        self._optimizer = optimizer
        self._scalers = {task: copy.deepcopy(optimizer.loss_scaler) for task in tasks}
        for scaler in self._scalers.values():
            scaler.raise_error_at_min_scale = False  # the diagnosis says more than DeepSpeed's exception
        self._in_a_row = dict.fromkeys(self._scalers, 0)
        self.skipped = dict.fromkeys(self._scalers, 0)

    def select(self, task: str) -> float:
        """Put ``task``'s scaler in charge, before the step's first backward; return its scale."""
        self._optimizer.loss_scaler = self._scalers[task]
        return float(self._scalers[task].cur_scale)

    def record(self, task: str, scale: float, applied: bool) -> bool:
        """Note what became of a step that ran under ``scale``.

        Returns:
            Whether the scale has collapsed: gradients overflow although it is as small as it may be, or the task has
            skipped :data:`MAX_SKIPS_IN_A_ROW` steps in a row.
        """
        if applied:
            self._in_a_row[task] = 0
            return False
        self.skipped[task] += 1
        self._in_a_row[task] += 1
        smallest = getattr(self._scalers[task], "min_scale", None)  # a static scale has none
        at_bottom = smallest is not None and scale <= smallest
        return at_bottom or self._in_a_row[task] >= MAX_SKIPS_IN_A_ROW

    def state(self) -> dict[str, dict[str, Any]]:
        """Return all that a checkpoint has to keep, as plain JSON types."""
        return {
            task: {
                "skipped": self.skipped[task],
                "in_a_row": self._in_a_row[task],
                **{name: getattr(scaler, name) for name in _STATE if hasattr(scaler, name)},
            }
            for task, scaler in self._scalers.items()
        }

    def load(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore what :meth:`state` returned; a task that is new keeps its fresh scale.

        Raises:
            VlscaleError: the state is damaged.
        """
        for task, scaler in self._scalers.items():
            saved = state.get(task)
            if saved is None:
                continue
            try:
                self.skipped[task], self._in_a_row[task] = int(saved["skipped"]), int(saved["in_a_row"])
                for name in _STATE:
                    if hasattr(scaler, name):
                        setattr(scaler, name, type(getattr(scaler, name))(saved[name]))
            except (KeyError, TypeError, ValueError) as error:
                raise VlscaleError(
                    f"checkpoint: loss scale of task {task} is damaged ({error!r}); resume from another checkpoint"
                ) from None
