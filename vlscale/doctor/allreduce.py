"""Measuring an all-reduce over all ranks, and the speed of each rank by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from vlscale.train.processes import Processes

SMALLEST, LARGEST_CPU, LARGEST_GPU = 1 << 10, 16 << 20, 256 << 20
WARM_UP = 2
_PERIOD = 251
_EXACT = 1 << 24
"""Whole numbers up to here are exact in float32, so any order of adding gives the same sum."""


@dataclass(frozen=True)
class Measured:
    """The all-reduce of one size.

    Attributes:
        bytes: of every rank's tensor.
        seconds: median over repetitions of the time of the slowest rank.
        ranks: their number.
        wrong: ranks that got a wrong sum at least once.
    """

    bytes: int
    seconds: float
    ranks: int
    wrong: tuple[int, ...] = ()

    @property
    def right(self) -> bool:
        """Whether all ranks got the right sums."""
        return not self.wrong

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second: the tensor's size over the time."""
        return self.bytes / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second over each rank's link: 2 (n - 1) / n of the tensor are sent and received by each of n."""
        return self.algorithm_bandwidth * 2 * (self.ranks - 1) / self.ranks


def measure(processes: Processes) -> Iterator[Measured]:
    """All-reduce float32 tensors of growing size, 1 KiB to 16 MiB on CPUs and 256 MiB on GPUs; all ranks call it."""
    largest = LARGEST_CPU if processes.device.type == "cpu" else LARGEST_GPU
    size = SMALLEST
    while size <= largest:
        yield _measure(processes, size, repetitions=20 if size <= 1 << 20 else 8)
        size *= 4


def _measure(processes: Processes, size: int, repetitions: int) -> Measured:
    mine = values(processes.rank, size // 4).to(processes.device)
    expected = expected_sum(processes.world_size, size // 4).to(processes.device)
    work, times, right = torch.empty_like(mine), [], True
    for repetition in range(WARM_UP + repetitions):
        work.copy_(mine)
        _finish(work)
        processes.barrier()
        start = time.perf_counter()
        dist.all_reduce(work)
        _finish(work)
        if repetition >= WARM_UP:
            times.append(time.perf_counter() - start)
        right &= torch.equal(work, expected)
    seen = processes.gather((times, right))
    slowest = [max(of_ranks) for of_ranks in zip(*(found[0] for found in seen), strict=True)]
    wrong = tuple(rank for rank, found in enumerate(seen) if not found[1])
    return Measured(size, median(slowest), processes.world_size, wrong)


def values(rank: int, count: int) -> Tensor:
    """float32 [count], different for every rank and place."""
    return (torch.arange(count) % _PERIOD + rank % _PERIOD).float()


def expected_sum(ranks: int, count: int) -> Tensor:
    """float32 [count], the sum of :func:`values` over all ranks."""
    if 2 * _PERIOD * ranks >= _EXACT:
        raise ValueError(f"{ranks} ranks: sums are not exact in float32")
    offsets = sum(rank % _PERIOD for rank in range(ranks))
    return (torch.arange(count) % _PERIOD * ranks + offsets).float()


def own_work(device: torch.device, repetitions: int = 10) -> float:
    """Seconds of a matrix product that a rank computes alone: who is slow here makes all others wait.

    The median on a GPU, which nobody shares; the least on a CPU, where other programs come and go.
    """
    side, dtype = (512, torch.float32) if device.type == "cpu" else (8192, torch.float16)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(WARM_UP + repetitions):
        start = time.perf_counter()
        product = matrix @ matrix
        _finish(product)
        times.append(time.perf_counter() - start)
    return (min if device.type == "cpu" else median)(times[WARM_UP:])


def _finish(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
