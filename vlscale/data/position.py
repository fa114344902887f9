"""Where a plan stands: all that a checkpoint has to keep of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlscale.errors import VlscaleError


@dataclass(frozen=True)
class Position:
    """Where the plan stands: all that a checkpoint has to keep of it.

    Attributes:
        step: the next step.
        cursors: dataset name -> (pass, offset of the next text in it).
    """

    step: int
    cursors: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        """Return the position as plain JSON types."""
        return {"step": self.step, "cursors": {name: list(cursor) for name, cursor in self.cursors.items()}}

    @classmethod
    def from_json(cls, raw: Any) -> Position:
        """Read what :meth:`to_json` wrote.

        Raises:
            VlscaleError: ``raw`` is anything else.
        """
        try:
            step, cursors = raw["step"], {str(name): tuple(cursor) for name, cursor in raw["cursors"].items()}
        except (TypeError, KeyError, AttributeError):
            step, cursors = None, {}
        numbers = [step, *(number for cursor in cursors.values() for number in cursor)]
        whole = all(type(number) is int and number >= 0 for number in numbers)
        if not whole or any(len(cursor) != 2 for cursor in cursors.values()):
            raise VlscaleError(
                f"resume state: expected {{step: N, cursors: {{dataset: [pass, offset]}}}}, found {str(raw)[:120]}; "
                f"the checkpoint is damaged: resume from another one"
            )
        return cls(step, cursors)
