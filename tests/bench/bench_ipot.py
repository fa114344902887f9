"""IPOT, forward and backward: vlscale's kernels beside the eager loop, torch.compile, POT and others.

Sizes are those of UNITER's matching steps; "ragged" draws words and regions of each example between a third and all of
them. Rivals get padded tensors ready made. The floor of a CPU is the operations of the matrix products that cost and
gradients cannot do without, padding left out, at the best rate that any product measured between the runs reaches; that
of a GPU is the time to read the inputs (and to write gradients of their size) at the best bandwidth of copies measured
likewise, and 50 iterations of a chain of 200 clocks at the highest clock. A row faster than its floor is marked:
then the floor is wrong.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench import ipot_rivals as rivals
from tests.bench.ipot_rivals import ITERATIONS, Pairs
from tests.bench.timing import with_best
from vlscale.kernels.ipot import backends, ipot_distance

SIZES = ((96, 20, 36, 768), (128, 24, 50, 1024), (256, 32, 64, 1024), (256, 60, 100, 1024))
RUNS = {"cpu": 7, "cuda": 50}
CHAIN_CLOCKS = 200
"""Of one iteration, at the least: two reductions and two barriers that wait for each other."""
CLOCK_RATE = 13
"""CU_DEVICE_ATTRIBUTE_CLOCK_RATE: the highest clock in kilohertz."""
SQUARE = 1024
LARGE = 1 << 30
"""Bytes, more than any cache."""
LOOP = "eager loop"


def kernels(pairs: Pairs, device: str) -> dict[str, Callable[[], Tensor]]:
    """Every compiled backend that runs here."""
    settings = pairs.settings

    def call(name: str) -> Callable[[], Tensor]:
        return lambda: ipot_distance(
            pairs.words, pairs.regions, pairs.cu_words, pairs.cu_regions, backend=name,
            max_words=settings.max_words, max_regions=settings.max_regions,
        )  # fmt: skip

    names = [name for name in backends.BACKENDS[1:] if backends.problem(name, torch.device(device)) is None]
    return {name: call(name) for name in names}


def rivals_of(device: str, compile_too: bool) -> dict[str, Callable[[Pairs], Callable[[], Tensor]]]:
    """Name -> what makes the rival for a batch."""
    found = {
        LOOP: rivals.loop,
        "POT sinkhorn": lambda pairs: rivals.pot(pairs, "sinkhorn"),
        "POT proximal": lambda pairs: rivals.pot(pairs, "proximal"),
        "geomloss": rivals.geomloss,
    }
    if compile_too:
        found["torch.compile"] = rivals.compiled_loop
    if device == "cuda":
        found |= {"CUDA graph": rivals.graphed_loop, "flash-sinkhorn": rivals.flash_sinkhorn}
    return found


@dataclass(frozen=True)
class Measured:
    """What one batch took.

    Attributes:
        seconds: median forward, and forward with backward, of each way.
        floor: seconds that nothing can be below, in the same order.
    """

    seconds: dict[str, tuple[float, float]]
    floor: tuple[float, float]


def measure(pairs: Pairs, ways: dict[str, Callable[[], Tensor]], device: str) -> Measured:
    """Time the ways, and what the floor is computed from between their runs."""
    steps = {name: partial(trained, way, inputs(pairs, name)) for name, way in ways.items()}
    forward, best = with_best(ways, yardsticks(pairs, device), RUNS[device], device)
    both, later = with_best(steps, yardsticks(pairs, device), RUNS[device], device)
    return Measured({name: (forward[name], both[name]) for name in ways}, floor(pairs, device, max(best, later)))


def inputs(pairs: Pairs, name: str) -> tuple[Tensor, Tensor]:
    """What the way differentiates: the kernels take packed rows, all others padded ones."""
    if name in backends.BACKENDS:
        return pairs.words, pairs.regions
    return pairs.padded_words, pairs.padded_regions


def trained(way: Callable[[], Tensor], leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Distances and both gradients."""
    distances = way()
    return distances, *torch.autograd.grad(distances.sum(), leaves)


def yardsticks(pairs: Pairs, device: str) -> dict[str, tuple[Callable[[], object], float]]:
    """What tells the best that the machine does: products in operations, on a GPU copies in bytes."""
    if device == "cpu":
        x, y = pairs.padded_words.detach(), pairs.padded_regions.detach()
        square = torch.randn(SQUARE, SQUARE)
        return {
            "the cost's products": (lambda: torch.bmm(x, y.transpose(1, 2)), 2.0 * x.numel() * y.shape[1]),
            "a large product": (lambda: square @ square, 2.0 * SQUARE**3),
        }
    packed = torch.cat([pairs.words.detach(), pairs.regions.detach()])
    large = torch.empty(LARGE, dtype=torch.uint8, device=device)
    return {
        "a copy of the inputs": (packed.clone, 2.0 * packed.numel() * packed.element_size()),
        "a large copy": (large.clone, 2.0 * LARGE),
    }


def floor(pairs: Pairs, device: str, best: float) -> tuple[float, float]:
    """Seconds that nothing can be below, forward and with backward, if ``best`` is what the yardsticks reach."""
    if device == "cpu":
        return pairs.cost_flops / best, 3 * pairs.cost_flops / best
    read = (pairs.words.numel() + pairs.regions.numel()) * pairs.words.element_size() / best
    chain = ITERATIONS * CHAIN_CLOCKS / highest_clock(ctypes.CDLL("libcuda.so.1"), torch.cuda.current_device())
    return read + chain, 3 * read + chain


def highest_clock(driver: Any, index: int) -> float:
    """Clocks per second of a GPU at its highest, which idling does not lower; asked of the driver itself.

    Raises:
        RuntimeError: the driver does not tell.
    """
    device, kilohertz = ctypes.c_int(), ctypes.c_int()
    calls = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), index),
        driver.cuDeviceGetAttribute(ctypes.byref(kilohertz), CLOCK_RATE, device),
    )
    if any(calls) or kilohertz.value <= 0:
        raise RuntimeError(f"the driver does not tell the clock of GPU {index} (errors {calls})")
    return 1e3 * kilohertz.value


def ratio(size: tuple[int, int, int, int], ragged: bool = True) -> float:
    """How many times as fast the CPU kernel is as the eager loop, forward and backward, with as many threads as set."""
    pairs = Pairs.draw(size, ragged)
    found = measure(pairs, {"cpu": kernels(pairs, "cpu")["cpu"], LOOP: rivals.loop(pairs)}, "cpu").seconds
    return found[LOOP][1] / found["cpu"][1]


def case(size: tuple[int, int, int, int], ragged: bool, device: str, compile_too: bool) -> list[dict[str, Any]]:
    """One batch: a row for each way, kernels first; what cannot run, or computes no numbers, says why and is not timed.

    ``below_floor`` is true where a time is less than the floor, which then is none.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    pairs = Pairs.draw(size, ragged, device, dtype)
    made: dict[str, Callable[[Pairs], Callable[[], Tensor]]] = {
        name: lambda _, way=way: way for name, way in kernels(pairs, device).items()
    }
    ways: dict[str, Callable[[], Tensor]] = {}
    shape, rows = dict(zip(("examples", "words", "regions", "hidden"), size, strict=True)) | {"ragged": ragged}, []
    for name, make in (made | rivals_of(device, compile_too)).items():
        try:
            way = make(pairs)
            if not all(bool(tensor.isfinite().all()) for tensor in trained(way, inputs(pairs, name))):
                raise ArithmeticError("not finite")
            ways[name] = way
        except Exception as error:  # another library, in a benchmark: say so, go on
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            rows.append({**shape, "way": name, "not_run": why[:200]})
    found = measure(pairs, ways, device)
    timed = [
        {
            **shape, "way": name, "forward_s": times[0], "both_s": times[1], "floor_s": found.floor,
            "below_floor": any(time < least for time, least in zip(times, found.floor, strict=True)),
        }
        for name, times in found.seconds.items()
    ]  # fmt: skip
    return timed + rows


def main() -> list[dict[str, Any]]:
    """Print the table and return it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, all_rows = torch.get_num_threads(), []
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    heads = (f"{head:>9}" for head in ("fwd", "floor", "fwd+bwd", "floor"))
    print(f"{'B, words, regions, hidden':50}", *heads, " times the kernel")
    for size in SIZES:
        for ragged in (False, True):
            # Unrolling 50 iterations takes a compiler minutes on a CPU, where it does not pay: one size tells.
            rows = case(size, ragged, device, compile_too=device == "cuda" or (size == SIZES[0] and not ragged))
            _print(size, ragged, rows)
            all_rows += rows
    torch.set_num_threads(before)
    return all_rows


def _print(size: tuple[int, int, int, int], ragged: bool, rows: list[dict[str, Any]]) -> None:
    best = min((row["both_s"] for row in rows if row["way"] in backends.BACKENDS and "both_s" in row), default=None)
    for row in rows:
        head = f"{size!s:26} {'ragged' if ragged else 'full':7} {row['way']:15}"
        if "not_run" in row:
            print(f"{head} not run: {row['not_run']}", flush=True)
            continue
        times = (1000 * value for value in (row["forward_s"], row["floor_s"][0], row["both_s"], row["floor_s"][1]))
        factor = f"{row['both_s'] / best:7.1f}" if best else "      -"
        flag = "  BELOW THE FLOOR" if row["below_floor"] else ""
        print(head, *(f"{value:6.2f} ms" for value in times), factor + flag, flush=True)


if __name__ == "__main__":
    main()
