"""A small run on the two hosts: its files, its command lines, what it logs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.network import ADDRESSES, BIN, NODES, Network
from tests.multiprocess.launcher import free_port
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe

STEPS = 50


def write_files(root: Path) -> None:
    """Data, recipe, JSON and hostfile of a run of :data:`STEPS` steps on two hosts."""
    write_data(root)
    schedule = {"warmup_steps": 2, "total_steps": STEPS}
    write_recipe(root / "small.yaml", recipe(root, schedule=schedule))
    write_ds_config(root / "small.json", 2)
    (root / "hostfile").write_text("".join(f"{name} slots=1  # test\n" for name in NODES), encoding="utf-8")


def pretrain(root: Path, run: Path, *more: str) -> list[str]:
    """The training script with its arguments."""
    words = ["--recipe", root / "small.yaml", "--ds_config", root / "small.json", "--run_dir", run, *more]
    return ["launch/pretrain.py", *map(str, words)]


def vlscale_launch(root: Path, launcher: str, *more: str) -> list[str]:
    """``vlscale launch``, up to the script."""
    hostfile = str(root / "hostfile")
    port = str(free_port())
    return [
        str(BIN / "vlscale"),
        "launch",
        "--launcher",
        launcher,
        "--hostfile",
        hostfile,
        "--master_port",
        port,
        *more,
    ]


def plain_deepspeed(root: Path) -> list[str]:
    """``deepspeed --hostfile``, up to the script; what it exports is named in a file."""
    path = f"{BIN}:/usr/local/bin:/usr/bin:/bin"
    lines = [f"PATH={path}", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    (root / "exports").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    words = ["--hostfile", root / "hostfile", "--master_addr", ADDRESSES["node-a"], "--master_port", free_port()]
    return ["env", f"DS_ENV_FILE={root / 'exports'}", str(BIN / "deepspeed"), *map(str, words)]


def rows(run: Path) -> dict[int, dict[str, float]]:
    """step -> losses and norms of the steps logged so far."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    changing = ("time", "speed/", "memory/", "batch/")
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {
        row["step"]: {key: value for key, value in row.items() if not key.startswith(changing)}
        for row in found
        if "lr" in row
    }


def wait_for(what: Callable[[], object], seconds: float, told: Callable[[], str] = str) -> None:
    """Wait until something is true."""
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            raise AssertionError(f"not within {seconds} s: {told()}")
        time.sleep(0.05)


def rank_on(network: Network, node: str, rank: int) -> int:
    """Process id of a rank on a host; waits until it is there."""
    wait_for(lambda: rank in network.nodes[node].ranks(), 60)
    return network.nodes[node].ranks()[rank]
