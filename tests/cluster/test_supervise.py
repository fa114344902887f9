"""A run that is watched, on this host: real agents, and a program named ssh that runs what it is given here."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vlscale.cluster import supervise as module
from vlscale.cluster.output import Output
from vlscale.cluster.remote import Place, Session
from vlscale.cluster.run_processes import LAUNCHER_VARIABLE, VARIABLE, find
from vlscale.cluster.signals import asked
from vlscale.cluster.supervise import Command, Streams, supervise

ROOT = Path(__file__).resolve().parents[2]
RUN = secrets.token_hex(8)  # other tests' processes are none of these tests' business
SIZE = 400_000
TALK = (
    "import os, sys, time\n"
    "os.set_blocking(1, False)  # as ssh does with what it is given\n"
    "time.sleep(1)\n"
    "os.set_blocking(1, True)\n"
    f"os.write(1, b'x' * {SIZE})\n"
    "sys.exit(int(sys.argv[1]))\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh runs its last word here; leases are short."""
    (tmp_path / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n', encoding="utf-8")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(module, "LEASE_S", 5.0)
    monkeypatch.setattr(module, "BEAT_S", 0.5)
    monkeypatch.setattr(module, "GRACE_S", 2.0)


def watched(scripts: Sequence[Sequence[str]], descriptor: int, signals: Callable[[], None] = lambda: None) -> int:
    """Run Python scripts, each as the part of a host; both streams go to a descriptor."""

    async def run() -> int:
        place = Place(ROOT, {})
        sessions = {f"host-{number}": await Session.open(f"host-{number}", place) for number in range(len(scripts))}
        variables = {**os.environ, VARIABLE: RUN, LAUNCHER_VARIABLE: RUN}
        commands = [Command(host, [sys.executable, "-c", *words], variables)
                    for host, words in zip(sessions, scripts, strict=True)]  # fmt: skip
        streams = Streams(Output(descriptor), Output(descriptor))
        try:
            with asked() as signalled:
                signals()
                return await supervise(sessions, commands, RUN, streams, signalled)
        finally:
            await asyncio.gather(*(session.close() for session in sessions.values()))
            await streams.errors.drain()

    return asyncio.run(run())


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("pause_s", [0.0, 8.0])
def test_a_reader_that_pauses_longer_than_the_lease_gets_all(pause_s: float, blocking: bool) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, blocking)
    got: list[bytes] = []

    def read() -> None:
        time.sleep(pause_s)
        while piece := os.read(reading, 1 << 16):
            got.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        status = watched([[TALK, "0"]], writing)
    finally:
        os.close(writing)
        reader.join()
        os.close(reading)
    assert status == 0, b"".join(got)[-2000:]
    assert b"".join(got) == b"x" * SIZE


def test_a_reader_that_goes_ends_the_run_which_has_failed() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        status = watched([[TALK + "time.sleep(60)", "0"], ["import time; time.sleep(60)"]], writing)
    finally:
        os.close(writing)
    assert status == 1
    assert not find(RUN)


@pytest.mark.parametrize(("ends", "status"), [("00", 0), ("03", 3), ("32", 2), ("0-", 128 + signal.SIGKILL), ("77", 7)])
def test_the_status_is_0_only_if_every_part_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: str, status: int
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 20.0)  # every part ends by itself, however slowly it starts
    begin = "import os, time; time.sleep(1); "  # a part that fails at once keeps the others from being started
    scripts = [begin + ("os.kill(os.getpid(), 9)" if end == "-" else f"raise SystemExit({end})") for end in ends]
    with (tmp_path / "log").open("wb") as log:
        assert watched([[script] for script in scripts], log.fileno()) == status
    said = (tmp_path / "log").read_text(encoding="utf-8")
    assert ("vlscale launch: host-" in said) == (status != 0)


def test_a_signal_ends_a_run_that_hangs(tmp_path: Path) -> None:
    def interrupt() -> None:
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    with (tmp_path / "log").open("wb") as log:
        assert watched([["import time; time.sleep(60)"]], log.fileno(), interrupt) == 130
    assert not find(RUN)
