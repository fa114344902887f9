"""Planning over a billion lengths in memory-mapped side files: memory, and the time to the first step anywhere.

The rows are captions of one image each in the first tenth and texts without images in the rest, so that both ways of
shuffling are seen. Files of zeros (no image: a pointer that does not rise) are sparse; about 5 GB are really written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vlscale.data.chunks import slices
from vlscale.data.lengths import DatasetLengths
from vlscale.data.plan import Plan, PlanSettings, Position

ROWS = 1_000_000_000
SHARD = 40_000
TOKENS = 64 * 10_240


def write(folder: Path, rows: int, paired: int) -> None:
    """Write side files of ``rows`` texts, the first ``paired`` of them with five texts to an image."""
    rng = np.random.default_rng(0)
    draws = {"tokens": rng.integers(5, 60, 1 << 20, np.int32), "regions": rng.integers(10, 100, 1 << 20, np.int32)}
    sizes = {"tokens": (rows, np.int32), "image_ptr": (rows + 1, np.int64), "image_refs": (paired, np.int64)}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (size,))
        for name, (size, kind) in {**sizes, "regions": (paired // 5, np.int32)}.items()
    }
    for name in ("tokens", "regions"):
        for part in slices(len(arrays[name])):
            arrays[name][part] = draws[name][: part.stop - part.start]
    for part in slices(paired):
        arrays["image_refs"][part] = np.arange(part.start, part.stop) // 5
    for part in slices(rows + 1):
        arrays["image_ptr"][part] = np.minimum(np.arange(part.start, part.stop), paired)


def load(folder: Path) -> DatasetLengths:
    """Open the side files, memory-mapped."""
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    rows = len(arrays["tokens"])
    return DatasetLengths(name="many", text_shards=np.append(np.arange(0, rows, SHARD), rows), **arrays)


def anonymous_mib() -> float:
    """Memory of this process that is not a file's pages (what a memory map does not give back), MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("no RssAnon in /proc/self/status")


def measure(folder: Path) -> dict[str, float]:
    """Plan a few steps at the beginning, in the middle and at the end of a pass; return what it took."""
    before, began = anonymous_mib(), time.perf_counter()
    plan = Plan([(load(folder), {"mlm": 1.0})], PlanSettings(seed=1, global_batch_tokens=TOKENS))
    found = {"survey_s": time.perf_counter() - began, "mib": 0.0, "first_s": 0.0, "per_s": 0.0}
    texts = len(plan.sources["many"].order)
    done, seconds = 0, 0.0
    for place in (0, texts // 3, texts * 2 // 3, texts - 1):
        position = Position(0, {"many": (0, place)})
        for number in range(6):
            began = time.perf_counter()
            step, position = plan.step(position)
            took = time.perf_counter() - began
            if number == 0:
                found["first_s"] = max(found["first_s"], took)
            done, seconds = done + len(step), seconds + took
            found["mib"] = max(found["mib"], anonymous_mib() - before)
    found["per_s"] = done / seconds
    return found


def measured(rows: int, paired: int) -> dict[str, float]:
    """Write side files, and measure in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="many_") as folder:
        write(Path(folder), rows, paired)
        command = [sys.executable, "-m", "tests.bench.bench_billion", "--folder", folder]
        return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Print the table."""
    print(f"{'texts':>15} {'survey':>9} {'first step':>11} {'lengths/s':>11} {'memory':>10}")
    for rows in (ROWS // 100, ROWS):
        found = measured(rows, rows // 10)
        print(
            f"{rows:15,} {found['survey_s']:7.1f} s {found['first_s']:9.2f} s {found['per_s']:11,.0f} "
            f"{found['mib']:6.0f} MiB",
            flush=True,
        )
    print("first step: the slowest of four places of a pass, its window included; memory: anonymous, most at any time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    print(json.dumps(measure(parser.parse_args().folder)))
