"""A project folder as a user of a cluster has it, and what tests ask of its jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.cluster.slurm_site import Site
from tests.multiprocess.launcher import free_port
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
"""So many that a signal after a few of them comes in the middle, on a fast machine too."""
SECRET = "planted-5e1f0c"
"""Value of WANDB_API_KEY in the environment that every job is submitted from."""

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--time=20")
FILES = ("--ds_config", "small.json", "--recipe", "small.yaml")
Found = TypeVar("Found")


def until(true: Callable[[], Found], timeout: float, what: str) -> Found:
    """Wait for something true and return it."""
    end = time.monotonic() + timeout
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: not after {timeout} s"
        time.sleep(0.1)
    return found


def scalars(run: Path) -> dict[int, dict[str, float]]:
    """step -> losses, norms and rates of training steps: all that does not depend on speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    passing = ("time", "speed/", "memory/", "batch/")
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith(passing)} for row in rows if "lr" in row}


@dataclass(frozen=True)
class Project:
    """A project folder on a site: the scripts copied, site.env filled in, small data and a recipe.

    Attributes:
        folder: where jobs are submitted from.
        site: the Slurm that runs them.
        port: where rank 0 is reached.
    """

    folder: Path
    site: Site
    port: int

    @classmethod
    def make(cls, folder: Path, site: Site, *settings: str) -> Project:
        """Make one; ``settings`` are further lines of site.env."""
        folder.mkdir()
        for name in ("vlscale", "ds_configs", "data_tools"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "launch/slurm", folder / "launch/slurm", ignore=shutil.ignore_patterns("site.env"))
        for name in ("pretrain.py", "recipes"):
            (folder / "launch" / name).symlink_to(ROOT / "launch" / name)
        port = free_port()
        lines = (f"VLSCALE_VENV={sys.prefix}", "export DS_ACCELERATOR=cpu", "MASTER_ADDR=127.0.0.1", *settings)
        text = "\n".join((*lines, f"MASTER_PORT={port}", ""))
        (folder / "launch/slurm/site.env").write_text(text, encoding="utf-8")
        write_data(folder)
        schedule = {"warmup_steps": 2, "total_steps": STEPS}
        write_recipe(folder / "small.yaml", recipe(folder, schedule=schedule, checkpoint={"every": 20, "keep": 3}))
        write_ds_config(folder / "small.json", 1)
        return cls(folder, site, port)

    def sweep(self) -> None:
        """Remove what DeepSpeed leaves in shared memory."""
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{self.port}_*"):
            left.unlink(missing_ok=True)

    def clear(self) -> None:
        """Cancel all jobs of the site, and wait until none is left."""
        self.site.run("scancel", "--user=root")
        until(lambda: not self.site.run("squeue", "--noheader").stdout.strip(), 60, "an empty queue")

    def submit(
        self, script: str, options: Sequence[str], *arguments: str | Path, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Submit one of the scripts, as the READMEs say; standard output is the job's number."""
        command = ("launch/slurm/submit.sh", "--parsable", *options, f"launch/slurm/{script}", *arguments)
        return self.site.run(*command, cwd=self.folder, check=check, WANDB_API_KEY=SECRET)

    def train(self, run: str, *more: str, options: Sequence[str] = TWO_NODES) -> str:
        """Submit many_nodes.sbatch for the small recipe, and return the job's number."""
        done = self.submit("many_nodes.sbatch", options, *FILES, "--run_dir", run, *more)
        return done.stdout.strip()

    def said(self, job: str) -> str:
        """What a job printed."""
        path = self.folder / f"slurm-{job}.out"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def rank_log(self, run: str, job: str, rank: int) -> str:
        """What a rank of a job printed, in all its starts."""
        return (self.folder / run / "logs" / job / f"rank-{rank:03}.log").read_text(encoding="utf-8")

    def steps(self, run: str) -> int:
        """Lines of a run's metrics so far."""
        path = self.folder / run / "metrics.jsonl"
        return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0

    def ranks(self) -> dict[int, int]:
        """Process id -> rank of the training processes on the site, reader processes included."""
        found = {}
        for pid in self.site.processes("launch/pretrain.py"):
            rank = re.search(rb"\0RANK=(\d+)\0", environment(pid))
            if rank:
                found[pid] = int(rank[1])
        return found

    def leaks(self) -> list[Path]:
        """Files of this project that hold the secret."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        return [path for path in files if SECRET.encode() in path.read_bytes()]


def environment(pid: int) -> bytes:
    """Environment of a process, each variable between zero bytes; empty when it has ended."""
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
