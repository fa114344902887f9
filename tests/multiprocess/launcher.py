"""Starts DeepSpeed processes for tests: free ports, ninja on PATH, short time-outs, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """What a launch left: exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def tail(self) -> str:
        """The end of both streams, for assertion messages."""
        return f"status {self.status}\n{self.out[-3000:]}\n{self.err[-5000:]}"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """Variables for a CPU run out of this checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = {"PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return kept | ours | extra


def launch(
    script: str | Path, *arguments: str | Path, processes: int = 2, timeout: float = 150, **variables: str
) -> Finished:
    """Run ``deepspeed --num_gpus PROCESSES script arguments`` from the root of the repository."""
    port = free_port()
    command = [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", str(port), str(script)]
    return _run([*command, *map(str, arguments)], port, timeout, environment(**variables))


def run_alone(script: str | Path, *arguments: str | Path, timeout: float = 120, **variables: str) -> Finished:
    """Run one process without a launcher."""
    port = free_port()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), *map(str, arguments)]
    return _run(command, port, timeout, environment(**(ranks | variables)))


def _run(command: list[str], port: int, timeout: float, variables: dict[str, str]) -> Finished:
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # The session that was started here, and nothing else; the launcher first gets a chance to end its children.
        os.killpg(started.pid, signal.SIGTERM)
        try:
            out, err = started.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            out, err = started.communicate()
        raise AssertionError(f"no end after {timeout} s\n{out[-3000:]}\n{err[-5000:]}") from None
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
            left.unlink(missing_ok=True)
    return Finished(started.returncode, out, err)


def run_many(lines: list[list[str]], todo: Path, processes: int, **variables: str) -> list[list[dict[str, Any]]]:
    """Run command lines of launch/pretrain.py one after the other, in one group of processes.

    Returns:
        [rank][line], each with ``status`` and ``err``.
    """
    worker = Path(__file__).with_name("runs_worker.py")
    todo.write_text(json.dumps(lines), encoding="utf-8")
    done = (
        run_alone(worker, todo, **variables)
        if processes == 1
        else launch(worker, todo, processes=processes, **variables)
    )
    assert done.status == 0, done.tail
    return [json.loads(Path(f"{todo}.{rank}.out").read_text(encoding="utf-8")) for rank in range(processes)]


def all_well(results: list[list[dict[str, Any]]]) -> None:
    """Assert that every run of :func:`run_many` ended with status 0."""
    for rank, lines in enumerate(results):
        for number, line in enumerate(lines):
            assert line["status"] == 0, f"rank {rank}, line {number}: {line['err'][-3000:]}"
