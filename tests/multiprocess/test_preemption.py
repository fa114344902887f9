"""Asked to stop by a signal, two processes save and leave with status 75, and go on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.multiprocess.launcher import BIN, ROOT, Finished, environment, free_port, launch
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe
from vlscale.train.resilience import PREEMPTED, STOP

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 60
FIRST_STEP_S = 30.0
"""Most seconds from the command to the first step, on two cores with a warm cache: what the project promises."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("preemption")
    write_data(root)
    schedule = {"warmup_steps": 2, "total_steps": STEPS}
    content = recipe(root, schedule=schedule, evaluation={"every": 0, "examples": 16})
    content["data"]["workers"] = 1
    recipe_path = write_recipe(root / "small.yaml", content)
    return ["--recipe", str(recipe_path), "--ds_config", str(write_ds_config(root / "small_zero1.json", 1))]


@pytest.fixture(scope="module")
def undisturbed(paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    done = launch("launch/pretrain.py", *paths, "--run_dir", run)
    assert done.status == 0, done.tail
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """The training steps of a run, as far as they are written."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return [row for row in found if "lr" in row]


def losses(run: Path) -> dict[int, dict[str, float]]:
    changing = ("time", "speed/", "memory/", "batch/")
    return {row["step"]: {k: v for k, v in row.items() if not k.startswith(changing)} for row in rows(run)}


def ranks_of(port: int) -> list[int]:
    """Process ids of the training processes behind a master port."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = any(word.endswith(b"launch/pretrain.py") for word in command[1:4])
        if is_rank and f"MASTER_PORT={port}".encode() in variables and b"RANK=1" in variables:
            found.append(int(folder.name))
    return found


def holds_stop(process: int) -> bool:
    """Whether a process has come as far as to block the signal: the first line of the entry script."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    blocked = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(blocked, 16) >> (STOP - 1) & 1)


def launch_and_stop(arguments: list[str], run: Path, at_step: int) -> Finished:
    """Start two processes and send the signal to rank 1 alone; before the first step if ``at_step`` is 0."""
    port = free_port()
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), "launch/pretrain.py"]
    pipe = subprocess.PIPE
    started = subprocess.Popen(
        [*command, *arguments, "--run_dir", str(run), "--resume", "auto"], cwd=ROOT, stdout=pipe, stderr=pipe,
        # numpy then starts threads while it is imported, which must not be found by the signal
        env=environment(OPENBLAS_NUM_THREADS="4"), text=True, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end and started.poll() is None:
            held = [rank for rank in ranks_of(port) if holds_stop(rank)]
            if held and (at_step == 0 or (rows(run) and rows(run)[-1]["step"] >= at_step)):
                os.kill(held[0], STOP)
                break
            time.sleep(0.02)
        out, err = started.communicate(timeout=300)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    return Finished(started.returncode, out, err)


@pytest.mark.usefixtures("undisturbed")  # after it everything is compiled
def test_the_first_step_comes_soon(paths: list[str], tmp_path: Path) -> None:
    """The better of two starts: the other is the machine's."""
    taken = []
    for attempt in range(2):
        begun, run = time.time(), tmp_path / str(attempt)
        done = launch("launch/pretrain.py", *paths, "--set", "schedule.total_steps=3", "--run_dir", run)
        assert done.status == 0, done.tail
        taken.append(rows(run)[0]["time"] - begun)
        if taken[-1] < FIRST_STEP_S:
            return
    raise AssertionError(f"seconds from the command to the first step: {taken}")


@pytest.mark.long
def test_a_run_stopped_twice_ends_as_one_that_is_not(paths: list[str], undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    early = launch_and_stop(paths, run, 0)
    assert early.status == PREEMPTED, early.tail
    assert "asked to stop: saved after 0 of 60 steps; go on with --resume auto" in early.out
    assert (run / "checkpoints" / "step-0").is_dir()
    midway = launch_and_stop(paths, run, 10)
    assert midway.status == PREEMPTED, midway.tail
    step = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert 10 <= step < STEPS
    assert f"asked to stop: saved after {step} of {STEPS} steps" in midway.out
    assert "Traceback" not in midway.err, midway.tail
    done = launch("launch/pretrain.py", *paths, "--run_dir", run, "--resume", "auto")
    assert done.status == 0, done.tail
    assert losses(run) == losses(undisturbed)
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
