"""What every benchmark needs: interleaved medians, on a CPU or a GPU, and the description of the machine."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from vlscale.plan.calibration import processor

PACKAGES = ("torch", "triton", "numpy", "transformers", "pot", "geomloss", "flash-sinkhorn", "deepspeed")


def seconds_of(ways: Mapping[str, Callable[[], object]], runs: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way, ``runs`` times each and interleaved, after one unmeasured round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(runs):
        for name, way in ways.items():
            _wait(device)
            begin = time.perf_counter()
            way()
            _wait(device)
            found[name].append(time.perf_counter() - begin)
    return found


def medians(ways: Mapping[str, Callable[[], object]], runs: int, device: str = "cpu") -> dict[str, float]:
    """Median seconds; see :func:`seconds_of`."""
    return {name: statistics.median(seconds) for name, seconds in seconds_of(ways, runs, device).items()}


def with_best(
    ways: Mapping[str, Callable[[], object]],
    yardsticks: Mapping[str, tuple[Callable[[], object], float]],
    runs: int,
    device: str = "cpu",
) -> tuple[dict[str, float], float]:
    """Median seconds of the ways, and the most per second that any run of the yardsticks reached, all interleaved.

    A yardstick is a call and how much it does (operations, bytes). The best run counts, because what a machine can do
    at most is sought, and a neighbour slows some of the runs.
    """
    seconds = seconds_of({**ways, **{name: call for name, (call, _) in yardsticks.items()}}, runs, device)
    best = max((amount / min(seconds[name]) for name, (_, amount) in yardsticks.items()), default=0.0)
    return {name: statistics.median(seconds[name]) for name in ways}, best


def machine(device: str) -> dict[str, Any]:
    """Date, processor or GPU, threads and versions: what a figure means nothing without."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
