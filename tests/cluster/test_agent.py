"""The far end, without ssh: over pipes, on this host."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlscale.cluster import run_processes
from vlscale.cluster.agent import MARK, Listener, reach
from vlscale.cluster.facts import look, source_hash

RUN = secrets.token_hex(8)  # other tests' processes are none of these tests' business
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)"
HOLDS = (
    "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2}); print('up', flush=True); "
    "exec('while not signal.sigtimedwait({signal.SIGUSR2}, 0): time.sleep(0.05)'); print('asked')"
)


@contextmanager
def agent() -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "vlscale.cluster.agent"], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def ask(process: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line.startswith(MARK), line
    return json.loads(line[len(MARK) :])


@contextmanager
def child(code: str, run_id: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    variables = {**os.environ, run_processes.VARIABLE: run_id, **more}
    process = subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_look_tells_versions_paths_and_interfaces(tmp_path: Path) -> None:
    (tmp_path / "data" / "texts").mkdir(parents=True)
    (tmp_path / "data" / "texts" / "index.json").write_text("{}", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("data", "file", "none")]
    with agent() as process:
        found = ask(process, do="look", paths=paths, master="localhost")
    assert found == json.loads(json.dumps(look(paths, "localhost")))
    assert "127.0.0.1" in found["master"]
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["paths"][paths[2]] == {"problem": "does not exist"}
    assert found["paths"][paths[1]]["hash"]
    assert "127.0.0.1" in found["interfaces"]["lo"]


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x", encoding="utf-8")
    first = source_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert source_hash(tmp_path) != first
    (tmp_path / "b.py").rename(tmp_path / "a.py")
    assert source_hash(tmp_path) == first
    (tmp_path / "a.py").write_text("y", encoding="utf-8")
    assert source_hash(tmp_path) != first


def test_a_listener_proves_who_it_is_and_gives_its_port_back() -> None:
    listener = Listener(0)
    port = listener._socket.getsockname()[1]
    assert reach(["127.0.0.1"], port, listener.token, 3) == {"127.0.0.1": ""}
    assert reach(["127.0.0.1"], port, "another", 3) == {"127.0.0.1": "another program or host answers there"}
    with pytest.raises(OSError, match="in use"):
        Listener(port)
    listener.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert reach(["127.0.0.1"], port, listener.token, 3) == {"127.0.0.1": "Connection refused"}


@pytest.mark.parametrize("how", ["told", "hung up", "lease"])
def test_a_guard_ends_the_run_and_no_other(how: str) -> None:
    with child(DEAF, RUN) as ours, child(DEAF, RUN[::-1]) as other, agent() as process:
        assert ask(process, do="guard", run_id=RUN, lease_s=3.0 if how == "lease" else 60.0) == {}
        assert process.stdin is not None
        if how == "told":
            process.stdin.write("end\n")
            process.stdin.flush()
        if how == "hung up":
            process.stdin.close()
        assert ours.wait(30) == -signal.SIGKILL
        assert process.wait(10) == 0
        assert other.poll() is None


def test_only_ranks_that_wait_for_the_signal_get_it() -> None:
    with child(HOLDS, RUN, RANK="0") as rank, child(DEAF, RUN, RANK="1") as early, child(HOLDS, RUN) as no_rank:
        assert run_processes.ask_to_stop(RUN, signal.SIGUSR2) == 1
        assert rank.communicate(timeout=10)[0] == "asked\n"
        time.sleep(0.3)
        assert early.poll() is None
        assert no_rank.poll() is None


def test_a_guard_kills_what_comes_after_the_end() -> None:
    with agent() as process:
        assert ask(process, do="guard", run_id=RUN, lease_s=60.0) == {}
        assert process.stdin is not None
        process.stdin.write("end\n")
        process.stdin.flush()
        time.sleep(1)
        late = subprocess.Popen([sys.executable, "-c", DEAF], env={**os.environ, run_processes.VARIABLE: RUN})
        try:
            assert late.wait(8) == -signal.SIGKILL
        finally:
            late.kill()
        assert process.wait(20) == 0
