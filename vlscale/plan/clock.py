"""Seconds of short computations on this machine, so that what else runs on it disturbs as little as possible."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)

_LONG_S, _VERY_LONG_S = 0.05, 1.0
"""Seconds from which a call is measured twice, and once."""


class Clock:
    """Measures on one device.

    On a GPU both ends wait for it. A CPU with one thread is asked for the time that this process has computed, which
    leaves out the time that other processes took; with more threads the wall clock is read.

    Args:
        device: where the computations run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self.cpu_time = not self._cuda and torch.get_num_threads() == 1

    @property
    def name(self) -> str:
        """What is read, in words."""
        return "CPU time of one thread" if self.cpu_time else "wall clock"

    def now(self) -> float:
        """Return seconds; only differences mean anything."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        return time.process_time() if self.cpu_time else time.perf_counter()

    def seconds(self, call: Callable[[], object], least_s: float = 0.0, most: int = 50) -> float:
        """Return seconds of one call, over as many calls as take ``least_s`` (``most`` at most) together."""
        began, calls = self.now(), 0
        while True:
            call()
            calls += 1
            # Asking a GPU for the time would wait for it, and so count launches that a queue hides.
            if calls >= most or (not self._cuda and self.now() - began >= least_s):
                return (self.now() - began) / calls

    def _first(self, call: Callable[[], object]) -> float:
        """Seconds of a second call, the first being a measure only where it takes so long that it has to be."""
        seconds = self.seconds(call)
        return seconds if seconds > _VERY_LONG_S else self.seconds(call)

    def least(
        self, calls: Mapping[Name, Callable[[], object]], rounds: int = 3, least_s: float = 0.0, most: int = 50
    ) -> dict[Name, float]:
        """Return the least seconds of each call, measured in turns, after an unmeasured call of each.

        The least, because whatever else runs on the machine can only add. Long calls are measured once or twice.
        """
        found = {name: self._first(call) for name, call in calls.items()}
        for number in range(rounds):
            for name, call in calls.items():
                if found[name] < _LONG_S or (number < 1 and found[name] < _VERY_LONG_S):
                    if found[name] < _LONG_S:
                        call()  # gives back what the call before has freed, which is not its own cost
                    found[name] = min(found[name], self.seconds(call, least_s, most))
        return found
