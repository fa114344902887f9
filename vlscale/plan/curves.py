"""Measured costs as functions of size: interpolated between the sizes that were measured, proportional beyond them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, le=1e15)]
_MOST = 64


class Measured(BaseModel):
    """Base of everything that a calibration holds: frozen, finite numbers, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Curve(Measured):
    """Seconds of one operation over its size.

    Attributes:
        sizes: rising; seconds: of each size.
    """

    sizes: tuple[Positive, ...] = Field(min_length=2, max_length=_MOST)
    seconds: tuple[Positive, ...] = Field(min_length=2, max_length=_MOST)

    @model_validator(mode="after")
    def _fits(self) -> Curve:
        if len(self.sizes) != len(self.seconds):
            raise ValueError(f"{len(self.sizes)} sizes, but {len(self.seconds)} times")
        _check_rising(self.sizes)
        return self

    def at(self, size: float) -> float:
        """Return seconds at ``size``: log-log between two sizes; below the least its time; above, proportional."""
        if size <= 0:
            return 0.0
        beyond = max(1.0, size / self.sizes[-1])
        return beyond * between(size, self.sizes, lambda index: self.seconds[index])


class Surface(Measured):
    """Seconds of a product of [rows, in] and [in, out] over its rows and its width, sqrt(in x out).

    Attributes:
        widths: rising; curves: over rows, of a square product of each width.
    """

    widths: tuple[Positive, ...] = Field(min_length=1, max_length=_MOST)
    curves: tuple[Curve, ...] = Field(min_length=1, max_length=_MOST)

    @model_validator(mode="after")
    def _fits(self) -> Surface:
        if len(self.widths) != len(self.curves):
            raise ValueError(f"{len(self.widths)} widths, but {len(self.curves)} curves")
        _check_rising(self.widths)
        return self

    def at(self, rows: float, fan_in: float, fan_out: float) -> float:
        """Return seconds: the cost per multiplication is interpolated over the width, and kept beyond its ends."""
        if rows <= 0:
            return 0.0
        width = math.sqrt(fan_in * fan_out)
        unit = between(width, self.widths, lambda index: self.curves[index].at(rows) / self.widths[index] ** 2)
        return unit * fan_in * fan_out


def between(at: float, places: Sequence[float], value: Callable[[int], float]) -> float:
    """Return ``value`` between the neighbours of ``at`` among rising ``places``, log-log; outside, the end's value."""
    right = bisect.bisect_right(places, at)
    if right == 0 or right == len(places):
        return value(min(right, len(places) - 1))
    share = math.log(at / places[right - 1]) / math.log(places[right] / places[right - 1])
    return math.exp((1 - share) * math.log(value(right - 1)) + share * math.log(value(right)))


def _check_rising(places: Sequence[float]) -> None:
    if any(after <= before for before, after in itertools.pairwise(places)):
        raise ValueError("sizes do not rise")
