"""Memory of one training step of uniter-large (340 M parameters) at 2 processes, ZeRO-2, activation checkpointing, CPU.

Sums the proportional set sizes (PSS: shared pages count once) of all processes of the run, ten times a second, and
reports the peak; /dev/shm is part of it. The run is the ordinary one: it reads stores, takes one step, and writes a
checkpoint and the weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.helpers import make_dataset
from tests.multiprocess.launcher import BIN, ROOT, environment, free_port

PERIOD_S = 0.1
LIMIT_GIB = 16.0


def family(root: int) -> list[int]:
    """Process ``root`` and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += parents.get(found[-1], [])
    return found


def proportional_bytes(pid: int) -> int:
    """PSS of a process; 0 if it has gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def write_run(root: Path, bf16: bool) -> list[str]:
    """Write data of the published widths, a recipe and a DeepSpeed JSON; return arguments for launch/pretrain.py."""
    sizes = {"feature_dim": 2048, "num_classes": 1601, "vocab_size": 28996, "min_tokens": 8, "max_tokens": 24}
    make_dataset(root / "data", images=24, shard_bytes=1 << 24, min_regions=20, max_regions=40, **sizes)
    recipe = {
        "name": "large_step",
        "model": {"preset": "uniter-large"},
        "data": {"datasets": [{"name": "made", "root": str(root / "data"), "mix": {"mlm": 1}}], "workers": 0},
        "batch": {"global_batch_tokens": 2400, "micro_batch_tokens": 680},
        "activation_checkpointing": "full",
        "optimizer": {"lr": 5.0e-5},
        "schedule": {"warmup_steps": 0, "total_steps": 1},
        "logging": {"every": 1, "tensorboard": False},
    }
    config = {
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 25_000_000, "allgather_bucket_size": 25_000_000},
    }
    (root / "large.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (root / "large_cpu.json").write_text(json.dumps(config), encoding="utf-8")
    paths = {"--recipe": root / "large.yaml", "--ds_config": root / "large_cpu.json", "--run_dir": root / "run"}
    return [str(word) for pair in paths.items() for word in pair]


def measure(bf16: bool) -> tuple[float, float, str]:
    """Return the peak in GiB, the duration in seconds, and the run's own output."""
    with tempfile.TemporaryDirectory(prefix="large_step_") as folder:
        arguments, port = write_run(Path(folder), bf16), free_port()
        command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), "launch/pretrain.py"]
        began, peak = time.monotonic(), 0
        try:
            with (Path(folder) / "out").open("w+", encoding="utf-8") as out:
                run = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(), stdout=out, stderr=out)
                while run.poll() is None:
                    peak = max(peak, sum(map(proportional_bytes, family(run.pid))))
                    time.sleep(PERIOD_S)
                out.seek(0)
                text = out.read()
        finally:
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
                left.unlink(missing_ok=True)
        if run.returncode:
            sys.exit(f"the run failed with status {run.returncode}:\n{text[-4000:]}")
    return peak / 2**30, time.monotonic() - began, text


def main() -> None:
    """Print the peaks of fp32 and bf16; fail where one is above the limit."""
    peaks = {}
    for bf16 in (False, True):
        name = "bf16" if bf16 else "fp32"
        peaks[name], seconds, text = measure(bf16)
        if not bf16:
            print(next(line for line in text.splitlines() if line.startswith("model:")))
        print(
            f"{name}: peak {peaks[name]:.2f} GiB over all processes (limit {LIMIT_GIB:g}), {seconds:.0f} s", flush=True
        )
    if max(peaks.values()) >= LIMIT_GIB:
        sys.exit(1)


if __name__ == "__main__":
    main()
