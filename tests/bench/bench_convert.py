"""uniter-large (340 M parameters), ZeRO-2 of 4 ranks in bf16 with optimiser state, to safetensors: time and memory.

The rival is the least that any converter must do: copying as many bytes as the master weights have, from the files they
lie in to one file. Runs are interleaved, in turns, medians of ten. Files are read from the page cache; both write to
memory where there is a file system in it, or the disk's moods would be what is measured. Hashing is timed apart. The
peak is that of a whole process that does nothing else. Needs 7 GB for temporary files, 2 GB of them in memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.convert.zero_writer import Zero
from tests.multiprocess.launcher import ROOT
from vlscale.convert import conversion
from vlscale.convert.conversion import Wish
from vlscale.hashing import file_digest
from vlscale.models.registry import load_preset
from vlscale.models.uniter import UniterConfig, UniterForPretraining

RANKS, ROUNDS = 4, 10
MOST_TIMES, MOST_GIB = 2.0, 4.0
_PIECE = 1 << 24
_PREFIX = "model."


def write_checkpoint(folder: Path) -> int:
    """Write random weights in the layout of a run of ours; returns the bytes of the master weights."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UniterForPretraining(config()).named_parameters()}
    weights = {f"{_PREFIX}{name}": torch.empty(shape).uniform_(-0.1, 0.1) for name, shape in shapes.items()}
    groups = [{name: each for name, each in weights.items() if (each.dim() > 1) == wide} for wide in (True, False)]
    zero = Zero(groups, 2, RANKS, torch.bfloat16)
    zero.write_manifest(zero.write(folder), hashes=False, model=config().model_dump(mode="json"))
    return sum(tensor.numel() * 4 for tensor in weights.values())


def config() -> UniterConfig:
    """uniter-large with all published heads."""
    return UniterConfig(**{key: value for key, value in load_preset("uniter-large").items() if key != "model"})


def convert(source: Path, out: Path) -> None:
    """``vlscale convert --no-hash``: a vlscale folder, tensor by tensor."""
    conversion.convert(Wish(source, out, to="vlscale", hashed=False))


def copy(source: Path, out: Path, nbytes: int) -> None:
    """Copy ``nbytes``, an equal share from each rank's file."""
    out.mkdir()
    buffer = memoryview(bytearray(_PIECE))
    with (out / "copy").open("wb", buffering=0) as target:
        for path in source.glob("*optim_states.pt"):
            left = nbytes // RANKS
            with path.open("rb", buffering=0) as file:
                while left:
                    count = file.readinto(buffer[: min(left, _PIECE)])
                    target.write(buffer[:count])
                    left -= count


def fast_folder() -> Path | None:
    """A file system in memory with room for a copy of the weights; None where there is none."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free > 4 << 30 else None


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes, with nothing of before left for the disk to write."""
    os.sync()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def peak_gib(source: Path, out: Path) -> float:
    """Peak of a process of its own that converts, all imports included."""
    command = [sys.executable, "-m", "tests.bench.bench_convert", str(source), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    return float(done.stdout) / 2**30


def main() -> list[dict[str, Any]]:
    """Print the table and return its row; exit with 1 where a requirement is not met."""
    with (
        tempfile.TemporaryDirectory(prefix="bench_convert_") as name,
        tempfile.TemporaryDirectory(prefix="bench_convert_", dir=fast_folder()) as fast,
    ):
        source, out = Path(name) / "step-3", Path(fast) / "out"
        nbytes = write_checkpoint(source)
        files = sorted(source.glob("*.pt"))
        total = sum(path.stat().st_size for path in files)
        print(f"checkpoint of {total / 1e9:.2f} GB in {len(files)} files, master weights {nbytes / 1e9:.2f} GB")
        hashing = timed(lambda: [file_digest(path, hashlib.sha256) for path in files])  # and brings all into the cache
        seconds: dict[str, list[float]] = {"convert": [], "copy": []}
        actions = {"convert": lambda: convert(source, out), "copy": lambda: copy(source, out, nbytes)}
        for turn in range(ROUNDS):
            # Whoever writes second finds the memory that the first has just given back.
            for label in sorted(actions, reverse=turn % 2 == 1):
                seconds[label].append(timed(actions[label]))
                shutil.rmtree(out)
        peak = peak_gib(source, out)
    for label, values in seconds.items():
        print(f"{label:8} {statistics.median(values):6.2f} s  ({', '.join(f'{value:.2f}' for value in values)})")
    times = statistics.median(seconds["convert"]) / statistics.median(seconds["copy"])
    print(f"convert / copy {times:.2f} (limit {MOST_TIMES:g}); peak {peak:.2f} GiB (limit {MOST_GIB:g})")
    print(f"sha256 of all files, apart: {hashing:.1f} s")
    if times > MOST_TIMES or peak > MOST_GIB:
        sys.exit(1)
    return [{"seconds": seconds, "times": times, "peak_gib": peak, "hashing_s": hashing, "bytes": nbytes}]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
        print(int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024)
    else:
        main()
