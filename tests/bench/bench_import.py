"""Importing region features: bytes per second beside a bare loop that only decodes the source, and memory.

The rival reads a bottom-up-attention TSV line by line, splits it, decodes boxes and features, and does nothing with
them; once with the standard library's base64, as the public loaders do, and once with pybase64, which is twenty times
as fast (the import uses it where it is installed) and leaves little but reading. The import checks the records, writes
shards and hashes them. CPU seconds of one process are compared, which is what "per core" means; wall-clock
seconds are printed beside them. ``VLSCALE_BENCH_GB`` sets the size of the source whose import is watched for memory
(default 0.5; the claim was measured with 5).
"""

from __future__ import annotations

import base64
import binascii
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pybase64
from rich.console import Console

from data_tools.build import import_images
from data_tools.formats.arrays import BoxRule
from data_tools.formats.bottom_up_tsv import BottomUpTsv
from data_tools.parts import Run

REGIONS, WIDTH, ROWS, RUNS = 36, 2048, 500, 7


def write_tsv(path: Path, rows: int) -> int:
    """Write a source of ``rows`` images (64 different ones in turn) and return its bytes."""
    rng = np.random.default_rng(0)
    tails = []
    for _ in range(64):
        low = rng.uniform(0, 300, (REGIONS, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 150, (REGIONS, 2))], 1).astype("<f4")
        features = np.maximum(rng.standard_normal((REGIONS, WIDTH)), 0).astype("<f4")
        tails.append(f"\t640\t480\t{REGIONS}\t".encode() + base64.b64encode(boxes) + b"\t" + base64.b64encode(features))
    with path.open("wb") as file:
        for row in range(rows):
            file.write(str(row).encode() + tails[row % 64] + b"\n")
        return file.tell()


def decode_only(path: Path, decode: Callable[[bytes], bytes]) -> None:
    """The rival."""
    with path.open("rb", buffering=1 << 20) as lines:
        for line in lines:
            fields = line.rstrip(b"\n").split(b"\t")
            count = int(fields[3])
            np.frombuffer(decode(fields[4]), "<f4").reshape(count, 4)
            np.frombuffer(decode(fields[5]), "<f4").reshape(count, -1)


def run_import(path: Path, out: Path) -> None:
    """Import the file with one process."""
    source = partial(BottomUpTsv, [path], BoxRule(), WIDTH)
    import_images(source, {"format": "bottom_up_tsv"}, Run(out), console=Console(quiet=True))


def measure(path: Path, out: Path) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall-clock) seconds of interleaved runs."""
    ways: dict[str, Callable[[], None]] = {
        "decoding only": lambda: decode_only(path, binascii.a2b_base64),
        "decoding only, pybase64": lambda: decode_only(path, partial(pybase64.b64decode, validate=True)),
        "import": lambda: run_import(path, out),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            begin, cpu = time.perf_counter(), time.process_time()
            way()
            found[name].append((time.process_time() - cpu, time.perf_counter() - begin))
    shutil.rmtree(out, ignore_errors=True)
    return found


def anonymous_mib() -> float:
    """RssAnon of this process in MiB: memory proper, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def watch(path: Path, out: Path) -> tuple[float, float]:
    """Import and return RssAnon in MiB before, and its peak."""
    import vlscale.data.mds
    import vlscale.data.store_writer  # noqa: F401

    write_tsv(path.with_suffix(".warm"), 8)
    run_import(path.with_suffix(".warm"), out / "warm")
    before = peak = anonymous_mib()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, anonymous_mib())

    thread = threading.Thread(target=sample)
    thread.start()
    run_import(path, out / "whole")
    done.set()
    thread.join()
    return before, peak


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "source.tsv"), Path(folder, "out")
        size = write_tsv(path, ROWS)
        times = measure(path, out)
        base = statistics.median(cpu for cpu, _ in times["decoding only"])
        for name, runs in times.items():
            cpu, wall = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{name:24} {size / cpu / 1e6:7.0f} MB/s per core  {base / cpu:5.0%}   {size / wall / 1e6:7.0f} MB/s")
        row = size / ROWS
        for gigabytes in (0.1, float(os.environ.get("VLSCALE_BENCH_GB", "0.5"))):
            write_tsv(path, int(gigabytes * 1e9 / row))
            code = f"from tests.bench.bench_import import *; print(*watch(Path({str(path)!r}), Path({str(out)!r})))"
            command = [sys.executable, "-c", code]
            before, peak = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split()[-2:])
            shutil.rmtree(out)
            print(f"memory: {gigabytes:4.1f} GB source: {before:6.0f} MiB before, {peak:6.0f} MiB at most")


if __name__ == "__main__":
    main()
