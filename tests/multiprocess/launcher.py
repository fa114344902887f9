"""Starts DeepSpeed processes for tests: free ports, ninja on PATH, short time-outs, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
    (done,) = _finish([_start([*command, *map(str, arguments)], environment(**variables))], port, timeout)
    return done


def run_alone(script: str | Path, *arguments: str | Path, timeout: float = 120, **variables: str) -> Finished:
    """Run one process without a launcher."""
    (done,) = run_together(script, *arguments, processes=1, timeout=timeout, **variables)
    return done


def run_together(
    script: str | Path, *arguments: str | Path, processes: int, timeout: float = 240, **variables: str
) -> list[Finished]:
    """Run processes of one group without a launcher, which starts faster; returns what each left, by rank."""
    port = free_port()
    command = [sys.executable, str(script), *map(str, arguments)]
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _finish([_start(command, environment(**(place | rank | variables))) for rank in ranks], port, timeout)


def _start(command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def _finish(started: list[subprocess.Popen[str]], port: int, timeout: float) -> list[Finished]:
    """Wait for processes. When time is up, end the sessions that were started here, and nothing else."""
    try:
        with ThreadPoolExecutor(len(started)) as readers:
            jobs = [readers.submit(run.communicate, timeout=timeout) for run in started]
        streams = [job.result() for job in jobs]
    except subprocess.TimeoutExpired:
        for kind in (signal.SIGTERM, signal.SIGKILL):  # a launcher first gets a chance to end its children
            for run in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, kind)
            time.sleep(3)
        texts = [text for run in started for text in run.communicate()]
        raise AssertionError(f"no end after {timeout} s: " + " ".join(text[-3000:] for text in texts)) from None
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
            left.unlink(missing_ok=True)
    return [Finished(run.returncode, *texts) for run, texts in zip(started, streams, strict=True)]


def run_many(lines: list[list[str]], todo: Path, processes: int, **variables: str) -> list[list[dict[str, Any]]]:
    """Run command lines of launch/pretrain.py one after the other, in one group of processes.

    Returns:
        [rank][line], each with ``status`` and ``err``.
    """
    worker = Path(__file__).with_name("runs_worker.py")
    todo.write_text(json.dumps(lines), encoding="utf-8")
    for done in run_together(worker, todo, processes=processes, **variables):
        assert done.status == 0, done.tail
    return [json.loads(Path(f"{todo}.{rank}.out").read_text(encoding="utf-8")) for rank in range(processes)]


def all_well(results: list[list[dict[str, Any]]]) -> None:
    """Assert that every run of :func:`run_many` ended with status 0."""
    for rank, lines in enumerate(results):
        for number, line in enumerate(lines):
            assert line["status"] == 0, f"rank {rank}, line {number}: {line['err'][-3000:]}"
