"""IPOT on a CPU, one thread: forward and backward of the compiled kernel, beside the loop in PyTorch.

The rivals compute the same numbers: the eager loop is the reference backend, padded to the longest example; the same
under ``torch.compile`` where a compiler is found. Sizes are those of UNITER's matching steps; "ragged" draws words and
regions of each example between a third and all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vlscale.kernels.ipot import backends, ipot_distance, reference
from vlscale.kernels.ipot.function import Settings
from vlscale.ragged import cumulative

SIZES = ((96, 20, 36, 768), (128, 24, 50, 1024), (256, 32, 64, 1024), (256, 60, 100, 1024))
RUNS = 7


def make(examples: int, words: int, regions: int, hidden: int, ragged: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed words and regions with their cumulative lengths."""
    rng = np.random.default_rng(0)
    counts = [
        torch.as_tensor(rng.integers(most // 3, most + 1, examples) if ragged else np.full(examples, most))
        for most in (words, regions)
    ]
    x, y = (torch.randn(int(count.sum()), hidden).requires_grad_(True) for count in counts)
    return x, y, cumulative(counts[0]), cumulative(counts[1])


def times(ways: dict[str, Callable[[], object]], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of interleaved runs."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(runs):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def ways_of(inputs: tuple[Tensor, Tensor, Tensor, Tensor], words: int, regions: int) -> dict[str, Callable[[], object]]:
    """The kernel and its rivals, each forward and backward."""

    def step(distance: Tensor) -> None:
        torch.autograd.grad(distance.sum(), inputs[:2])

    def padded(x: Tensor, y: Tensor, cu_x: Tensor, cu_y: Tensor) -> Tensor:
        return reference.ipot_packed(x, y, cu_x, cu_y, Settings(0.5, 50, 1, words, regions))[0]

    ways: dict[str, Callable[[], object]] = {
        "kernel": lambda: step(ipot_distance(*inputs, backend="cpu", max_words=words, max_regions=regions)),
        "forward only": lambda: ipot_distance(*inputs, backend="cpu", max_words=words, max_regions=regions),
        "eager loop": lambda: step(padded(*inputs)),
    }
    return ways


def ratio(examples: int, words: int, regions: int, hidden: int, ragged: bool = True, runs: int = RUNS) -> float:
    """How many times as fast the kernel is as the eager loop, forward and backward, with the threads that are set."""
    found = times(ways_of(make(examples, words, regions, hidden, ragged), words, regions), runs)
    return found["eager loop"] / found["kernel"]


def main() -> None:
    """Print the table."""
    why = backends.problem("cpu", torch.device("cpu"))
    if why:
        print(f"no compiled kernel: {why}")
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"{'B, words, regions, hidden':26} {'':7} {'eager loop':>11} {'kernel':>9} {'its fwd':>9} {'times':>6}")
    for size in SIZES:
        for ragged in (False, True):
            found = times(ways_of(make(*size, ragged), size[1], size[2]))
            eager, kernel, forward = (1000 * found[name] for name in ("eager loop", "kernel", "forward only"))
            print(
                f"{size!s:26} {'ragged' if ragged else 'full':7} {eager:8.1f} ms {kernel:6.1f} ms {forward:6.1f} ms "
                f"{eager / kernel:6.1f}",
                flush=True,
            )
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()
