"""IPOT, forward and backward: vlscale's kernels beside the eager loop, torch.compile, POT and others.

Sizes are those of UNITER's matching steps; "ragged" draws words and regions of each example between a third and all of
them. Rivals get padded tensors ready made. The floor of a CPU is the matrix products that cost and gradients cannot do
without, measured beside; that of a GPU is the time to read the inputs (and to write gradients of their size) at the
bandwidth of a copy measured beside, and 50 iterations of a chain of 200 clocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.bench import ipot_rivals as rivals
from tests.bench.ipot_rivals import ITERATIONS, Pairs
from tests.bench.timing import medians
from vlscale.kernels.ipot import backends, ipot_distance

SIZES = ((96, 20, 36, 768), (128, 24, 50, 1024), (256, 32, 64, 1024), (256, 60, 100, 1024))
RUNS = {"cpu": 7, "cuda": 50}
CHAIN_CLOCKS = 200
"""Of one iteration, at the least: two reductions and two barriers that wait for each other."""
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


def measure(pairs: Pairs, ways: dict[str, Callable[[], Tensor]], device: str) -> dict[str, tuple[float, float]]:
    """Median seconds forward, and forward with backward."""
    rows = {name: (pairs.words, pairs.regions) for name in kernels(pairs, device)}
    padded = (pairs.padded_words, pairs.padded_regions)

    def step(name: str) -> Callable[[], object]:
        return lambda: torch.autograd.grad(ways[name]().sum(), rows.get(name, padded))

    forward = medians(ways, RUNS[device], device)
    both = medians({name: step(name) for name in ways}, RUNS[device], device)
    return {name: (forward[name], both[name]) for name in ways}


def floor(pairs: Pairs, device: str) -> tuple[float, float]:
    """Seconds that nothing can be below, forward and with backward; see the top."""
    if device == "cpu":
        ways = dict(zip(("forward", "both"), rivals.products(pairs), strict=True))
        found = medians(ways, RUNS[device])
        used = (
            float((pairs.cu_words.diff() * pairs.cu_regions.diff()).sum()) / pairs.cells
        )  # rivals' products are padded
        return used * found["forward"], used * found["both"]
    packed = torch.cat([pairs.words.detach(), pairs.regions.detach()])
    read = medians({"copy": packed.clone}, RUNS[device], device)["copy"] / 2
    clock = torch.cuda.clock_rate() * 1e6
    chain = ITERATIONS * CHAIN_CLOCKS / clock
    return read + chain, 3 * read + chain


def ratio(size: tuple[int, int, int, int], ragged: bool = True) -> float:
    """How many times as fast the CPU kernel is as the eager loop, forward and backward, with as many threads as set."""
    pairs = Pairs.draw(size, ragged)
    found = measure(pairs, {"cpu": kernels(pairs, "cpu")["cpu"], LOOP: rivals.loop(pairs)}, "cpu")
    return found[LOOP][1] / found["cpu"][1]


def case(size: tuple[int, int, int, int], ragged: bool, device: str, compile_too: bool) -> list[dict[str, Any]]:
    """One batch: a row for each way, best kernel first; what cannot run says why."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    pairs = Pairs.draw(size, ragged, device, dtype)
    ways, rows = kernels(pairs, device), []
    shape = dict(zip(("examples", "words", "regions", "hidden"), size, strict=True)) | {"ragged": ragged}
    for name, make in rivals_of(device, compile_too).items():
        try:
            ways[name] = make(pairs)
            torch.autograd.grad(ways[name]().sum(), (pairs.padded_words, pairs.padded_regions))
        except Exception as error:  # another library, in a benchmark: say so, go on
            ways.pop(name, None)
            rows.append({**shape, "way": name, "not_run": str(error).strip().splitlines()[0][:200]})
    found = measure(pairs, ways, device)
    least = floor(pairs, device)
    timed = [
        {**shape, "way": name, "forward_s": forward, "both_s": both, "floor_s": least}
        for name, (forward, both) in found.items()
    ]
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
    best = min(row["both_s"] for row in rows if row["way"] in backends.BACKENDS) if rows else 1
    for row in rows:
        head = f"{size!s:26} {'ragged' if ragged else 'full':7} {row['way']:15}"
        if "not_run" in row:
            print(f"{head} not run: {row['not_run']}", flush=True)
            continue
        times = (1000 * value for value in (row["forward_s"], row["floor_s"][0], row["both_s"], row["floor_s"][1]))
        print(head, *(f"{value:6.2f} ms" for value in times), f"{row['both_s'] / best:7.1f}", flush=True)


if __name__ == "__main__":
    main()
