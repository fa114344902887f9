"""Importing: bytes per second beside bare loops that only decode the same source, and memory.

A rival reads the source's records, decodes their arrays, and does nothing with them: a bottom-up-attention TSV once
with the standard library's base64, as the public loaders do, and once with pybase64, which is twenty times as fast (the
import uses it where it is installed) and leaves little but reading; UNITER's databases with lmdb, numpy, msgpack and
lz4, as its own code does. The import checks the records, writes shards and hashes them; ``lossless`` also compresses
the features. CPU seconds of one process are compared, which is what "per core" means; wall-clock seconds are printed
beside them. The claim of 80 % is about decoding as the public loaders do it, the first rival of each source.

``VLSCALE_BENCH_GB`` sets the size of the source whose import is watched for memory (default 0.5; the claim was measured
with 5).
"""

from __future__ import annotations

import binascii
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pybase64

from data_tools import import_images, import_texts
from tests.bench.import_sources import (
    decode_msgpack,
    decode_npz,
    decode_texts,
    decode_tsv,
    write_images,
    write_texts,
    write_tsv,
    write_vocabulary,
)

ROWS, DATABASE_ROWS, TEXT_ROWS, RUNS = 500, 400, 60_000, 5
CODECS = ("none", "lossless")


def run_import(form: str, path: Path, out: Path, *options: str) -> None:
    """Import a source with one process, by the command line's function."""
    tool = import_texts if form.endswith("texts") else import_images
    with contextlib.redirect_stderr(io.StringIO()):
        tool.run([form, str(path), "--out", str(out), *options])


def measure(ways: Mapping[str, Callable[[], None]], made: Sequence[Path]) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall-clock) seconds of interleaved runs; ``made`` is removed before each."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
            begin, cpu = time.perf_counter(), time.process_time()
            way()
            found[name].append((time.process_time() - cpu, time.perf_counter() - begin))
    return found


def compare(
    title: str, size: int, rivals: Mapping[str, Callable[[], None]], imports: Mapping[str, Callable[[], None]],
    made: Sequence[Path],
) -> None:  # fmt: skip
    """Print megabytes of the source per second of each way, and the imports' share of each rival's."""
    times = measure({**rivals, **imports}, made)
    middle = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in times.items()}
    print(f"\n{title} ({size / 1e6:.0f} MB)")
    for name, (cpu, wall) in middle.items():
        beside = "".join(f"   {middle[rival][0] / cpu:5.0%} of {rival}" for rival in rivals if name in imports)
        print(f"  {name:28} {size / cpu / 1e6:7.0f} MB/s per core {size / wall / 1e6:7.0f} MB/s{beside}")


def compare_tsv(folder: Path) -> None:
    """Bottom-up-attention's TSV beside both ways to decode base64."""
    path, out = folder / "source.tsv", folder / "out"
    size = write_tsv(path, ROWS)
    rivals = {
        "stdlib base64": lambda: decode_tsv(path, binascii.a2b_base64),
        "pybase64": lambda: decode_tsv(path, partial(pybase64.b64decode, validate=True)),
    }
    imports = {
        f"import --codec {codec}": partial(run_import, "bottom_up_tsv", path, out, "--codec", codec) for codec in CODECS
    }
    compare("bottom-up-attention TSV", size, rivals, imports, [out])
    path.unlink()


def compare_databases(folder: Path) -> None:
    """UNITER's image databases, compressed (npz) and not (msgpack), and its text database (msgpack in lz4)."""
    out = folder / "out"
    for compressed, decode in ((True, decode_npz), (False, decode_msgpack)):
        path = folder / ("all_compressed" if compressed else "all")
        size = write_images(path, DATABASE_ROWS, compressed)
        name = "npz" if compressed else "msgpack"
        imports = {
            f"import --codec {codec}": partial(run_import, "uniter_images", path, out, "--codec", codec)
            for codec in CODECS
        }
        compare(f"UNITER image LMDB, {name}", size, {f"lmdb + {name}": partial(decode, _copy(path))}, imports, [out])
        shutil.rmtree(path)
    texts, vocabulary = folder / "texts", folder / "vocab.txt"
    size = write_texts(texts, TEXT_ROWS, DATABASE_ROWS)
    write_vocabulary(vocabulary)
    compare(
        "UNITER text LMDB, msgpack in lz4 (small records: costs are per record)",
        size,
        {"lmdb + lz4 + msgpack": partial(decode_texts, _copy(texts))},
        {"import": partial(run_import, "uniter_texts", texts, out, "--tokenizer", str(vocabulary))},
        [out / "texts"],
    )


def _copy(folder: Path) -> Path:
    """A copy of a database: lmdb opens one once in a process, and the import keeps its own open."""
    return Path(shutil.copytree(folder, folder.with_name(f"{folder.name}-bare")))


def anonymous_mib() -> float:
    """RssAnon of this process in MiB: memory proper, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024


def watch(path: Path, out: Path) -> tuple[float, float]:
    """Import and return RssAnon in MiB before, and its peak."""
    import vlscale.data.mds
    import vlscale.data.store_writer  # noqa: F401

    write_tsv(path.with_suffix(".warm"), 8)
    run_import("bottom_up_tsv", path.with_suffix(".warm"), out / "warm")
    before = peak = anonymous_mib()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, anonymous_mib())

    thread = threading.Thread(target=sample)
    thread.start()
    run_import("bottom_up_tsv", path, out / "whole")
    done.set()
    thread.join()
    return before, peak


def watch_memory(folder: Path) -> None:
    """Print the memory of importing a small and a large source, each in a process of its own."""
    path, out = folder / "source.tsv", folder / "watched"
    row = write_tsv(path, 64) / 64
    for gigabytes in (0.1, float(os.environ.get("VLSCALE_BENCH_GB", "0.5"))):
        write_tsv(path, int(gigabytes * 1e9 / row))
        code = f"from tests.bench.bench_import import *; print(*watch(Path({str(path)!r}), Path({str(out)!r})))"
        command = [sys.executable, "-c", code]
        before, peak = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split()[-2:])
        shutil.rmtree(out)
        print(f"memory: {gigabytes:4.1f} GB source: {before:6.0f} MiB before, {peak:6.0f} MiB at most")


def main() -> None:
    """Print the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare_tsv(folder)
        compare_databases(folder)
        print()
        watch_memory(folder)


if __name__ == "__main__":
    main()
