"""Whatever dies during a run on two hosts, all its processes are gone from both within 60 seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.network import NODES, ROOT, Network
from tests.cluster.runs import pretrain, rank_on, rows, vlscale_launch, wait_for, write_files

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BOUND_S = 60
BASHRC = Path("~/.bashrc").expanduser()
HANGING = str(ROOT / "tests/cluster/hanging_rank.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deaths")
    write_files(root)
    return root


def assert_gone(hosts: Network, launched: subprocess.Popen[str], since: float) -> str:
    """The launcher has ended, not with 0, and nothing is left on either host in time; returns what was printed."""
    try:
        out, _ = launched.communicate(timeout=BOUND_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the launcher is still there, with {hosts.left()}") from None
    left = hosts.left(BOUND_S - (time.monotonic() - since))
    assert not left, f"left after {BOUND_S} s: {left}\n{out[-6000:]}"
    assert launched.returncode != 0, out[-6000:]
    return out


def both_hang(hosts: Network) -> dict[str, int]:
    """Wait until the deaf ranks are there; host -> process id."""
    found = {name: rank_on(hosts, name, rank) for rank, name in enumerate(NODES)}
    wait_for(lambda: all("hanging_rank" in Path(f"/proc/{pid}/cmdline").read_text() for pid in found.values()), 30)
    time.sleep(1)  # until they are deaf
    return found


def test_a_rank_that_dies_in_training(hosts: Network, root: Path) -> None:
    run = root / "dies"
    words = [*vlscale_launch(root, "ssh"), *pretrain(root, run, "--set", "schedule.total_steps=100000")]
    with hosts.start("node-a", *words) as launched:
        remote = rank_on(hosts, "node-b", 1)
        wait_for(lambda: rows(run) or launched.poll() is not None, 150)
        os.kill(remote, signal.SIGKILL)
        out = assert_gone(hosts, launched, time.monotonic())
    assert "vlscale launch: node-" in out, out[-6000:]


@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_a_rank_that_dies_while_the_other_is_deaf(hosts: Network, root: Path, launcher: str) -> None:
    with hosts.start("node-a", *vlscale_launch(root, launcher), HANGING) as launched:
        os.kill(both_hang(hosts)["node-b"], signal.SIGKILL)
        out = assert_gone(hosts, launched, time.monotonic())
    assert "vlscale launch: node-b: its processes ended with status" in out, out[-6000:]


def test_ssh_that_breaks_off(hosts: Network, root: Path) -> None:
    with hosts.start("node-a", *vlscale_launch(root, "pdsh"), HANGING) as launched:
        both_hang(hosts)
        remote = hosts.nodes["node-b"]
        sessions = [pid for pid in remote.processes() if "sshd" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert sessions
        for pid in sessions:
            os.kill(pid, signal.SIGKILL)
        out = assert_gone(hosts, launched, time.monotonic())
    assert "vlscale launch: node-b: " in out, out[-6000:]


def test_a_cable_that_is_taken_out(hosts: Network, root: Path) -> None:
    with hosts.start("node-a", *vlscale_launch(root, "pdsh"), HANGING) as launched:
        both_hang(hosts)
        with hosts.nodes["node-b"].unplugged():
            out = assert_gone(hosts, launched, time.monotonic())
    assert "vlscale launch: node-b: lost" in out, out[-6000:]


def test_a_cable_that_is_taken_out_while_the_run_starts(hosts: Network, root: Path) -> None:
    with hosts.start("node-a", *vlscale_launch(root, "ssh"), *pretrain(root, root / "cut")) as launched:
        rank_on(hosts, "node-b", 1)
        with hosts.nodes["node-b"].unplugged():
            assert_gone(hosts, launched, time.monotonic())


def test_the_launcher_itself_is_killed(hosts: Network, root: Path) -> None:
    with hosts.start("node-a", *vlscale_launch(root, "pdsh"), HANGING) as launched:
        both_hang(hosts)
        os.kill(launched.pid, signal.SIGKILL)
        assert_gone(hosts, launched, time.monotonic())


def test_the_launcher_is_asked_to_end(hosts: Network, root: Path) -> None:
    with hosts.start("node-a", *vlscale_launch(root, "pdsh"), HANGING) as launched:
        both_hang(hosts)
        os.kill(launched.pid, signal.SIGTERM)
        assert_gone(hosts, launched, time.monotonic())
        assert launched.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("wait_s", [0, 2, 5])
def test_the_launcher_is_interrupted_while_the_run_starts(hosts: Network, root: Path, wait_s: float) -> None:
    silent = root / "silent.py"
    silent.write_text("import time\n\ntime.sleep(600)\n", encoding="utf-8")
    with hosts.start("node-a", *vlscale_launch(root, "pdsh"), silent) as launched:
        assert launched.stdout is not None
        assert "2 hosts checked" in launched.stdout.readline()
        time.sleep(wait_s)
        os.kill(launched.pid, signal.SIGINT)
        assert_gone(hosts, launched, time.monotonic())
        assert launched.returncode == 128 + signal.SIGINT
    time.sleep(5)
    assert not hosts.left(), "what DeepSpeed's launcher was about to start"


@pytest.mark.skipif(not BASHRC.exists(), reason="no ~/.bashrc to put another over")
def test_a_slow_login_shell_and_a_launcher_that_is_killed_at_once(hosts: Network, root: Path) -> None:
    slow = root / "slow.sh"
    slow.write_text("sleep 4\n", encoding="utf-8")
    with hosts.nodes["node-b"].covered(BASHRC, slow):
        with hosts.start("node-a", *vlscale_launch(root, "ssh"), HANGING) as launched:
            assert launched.stdout is not None
            assert "2 hosts checked" in launched.stdout.readline()
            time.sleep(0.5)
            os.kill(launched.pid, signal.SIGKILL)
            assert_gone(hosts, launched, time.monotonic())
        time.sleep(8)
        assert not hosts.left()
