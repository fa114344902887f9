"""The roll call, with one thread per rank over a real store."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.multiprocess.launcher import free_port
from vlscale.errors import VlscaleError
from vlscale.train import roll_call as module
from vlscale.train.roll_call import Note, _ranks, host_name, own_note, roll_call

SAME = {"python": "3.11.2", "torch": "2.10.0"}


@pytest.fixture(autouse=True)
def master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("VLSCALE_HOSTS", raising=False)
    monkeypatch.delenv("VLSCALE_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def answer(rank: int, world_size: int, note: Note, timeout_s: float) -> list[str] | VlscaleError:
    try:
        with roll_call(rank, world_size, note, timeout_s, "prog") as hosts:
            return hosts
    except VlscaleError as error:
        return error


def call(notes: dict[int, Note], world_size: int, timeout_s: float = 30) -> list[list[str] | VlscaleError]:
    """The outcome of every rank in ``notes``."""
    with ThreadPoolExecutor(len(notes)) as pool:
        jobs = [pool.submit(answer, rank, world_size, note, timeout_s) for rank, note in notes.items()]
        return [job.result() for job in jobs]


def test_all_learn_the_hosts() -> None:
    notes = {rank: Note(f"node-{'ab'[rank // 2]}", SAME) for rank in range(4)}
    assert call(notes, 4) == [["node-a", "node-a", "node-b", "node-b"]] * 4


def test_missing_ranks_are_named_with_their_host(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLSCALE_HOSTS", "node-a,node-b,node-c")
    before = time.monotonic()
    found = call({0: Note("node-a", SAME), 1: Note("node-a", SAME), 3: Note("node-b", SAME)}, 6, timeout_s=5)
    assert time.monotonic() - before < 40  # nobody waits for the time-out of a process group
    for error in found:
        assert isinstance(error, VlscaleError)
        assert error.reported
        assert str(error).startswith(
            "ranks 2, 4-5 of 6 on node-b, node-c did not answer within 5 s (hosts that did: node-a, node-b);"
        )
    assert capsys.readouterr().err.count("prog: error: ") == 1


def test_without_the_launchers_list_the_ranks_are_named() -> None:
    (error,) = call({0: Note("node-a", SAME)}, 2, timeout_s=0.5)
    assert str(error).startswith("rank 1 of 2 did not answer within 0.5 s (hosts that did: node-a);")


@pytest.mark.parametrize(
    ("versions", "told"),
    [
        (
            {"python": "3.11.2", "torch": "2.9.1"},
            "host node-b (ranks 2-3) has torch 2.9.1, host node-a (rank 0)",
        ),
        ({"python": "3.11.2"}, "host node-b (ranks 2-3) has torch missing, host node-a (rank 0) has 2.10.0"),
    ],
)
def test_other_versions_are_named_with_their_host(versions: dict[str, str], told: str) -> None:
    notes = {rank: Note("node-a", SAME) if rank < 2 else Note("node-b", versions) for rank in range(4)}
    for error in call(notes, 4):
        assert isinstance(error, VlscaleError)
        assert told in str(error)


def test_a_version_that_rank_0_lacks() -> None:
    more = Note("node-b", {**SAME, "deepspeed": "0.19.8"})
    for error in call({0: Note("node-a", SAME), 1: more}, 2):
        assert "host node-b (rank 1) has deepspeed 0.19.8, host node-a (rank 0) has missing" in str(error)


def test_many_missing_ranks_are_one_short_line() -> None:
    (error,) = call({0: Note("node-a", SAME)}, 1024, timeout_s=0.5)
    assert str(error).startswith("ranks 1-1023 of 1024 did not answer")
    assert _ranks(range(0, 400, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 192 more"


@pytest.mark.parametrize("listens", [False, True], ids=["closed", "silent"])
def test_a_master_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.2)
    with socket.socket() as silent:
        if listens:  # connects, and is never answered: another service, or a stopped process
            silent.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))
            silent.listen()
        before = time.monotonic()
        (error,) = call({1: Note("node-b", SAME)}, 2, timeout_s=1)
    assert time.monotonic() - before < 20
    assert isinstance(error, VlscaleError)
    assert not error.reported
    assert f"rank 1 on node-b: no roll call at 127.0.0.1:{os.environ['MASTER_PORT']} within 1.4 s" in str(error)
    assert "firewall" in str(error)


def test_a_master_that_rank_0_does_not_reach_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # for documentation: nobody has it
    (error,) = call({0: Note("node-a", SAME)}, 2, timeout_s=1)
    assert "rank 0 on node-a does not reach itself at 192.0.2.1:" in str(error)


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a..b", "x" * 64])
def test_a_master_without_an_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    (error,) = call({1: Note("node-b", SAME)}, 2, timeout_s=1)
    assert f"rank 1 on node-b: MASTER_ADDR {address} has no address here" in str(error)


def test_two_runs_on_one_port_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run's rank 1 comes to the first run's store."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(answer, 0, 2, Note("first", SAME), 3)
        time.sleep(1)
        monkeypatch.setenv("VLSCALE_RUN_ID", "second")
        second = pool.submit(answer, 1, 2, Note("second", SAME), 1)
        assert isinstance(second.result(), VlscaleError)
        assert "rank 1 of 2 did not answer" in str(first.result())


def test_a_rank_that_answers_twice() -> None:
    with ThreadPoolExecutor(3) as pool:
        ranks = [0, 1, 1]
        found = [job.result() for job in [pool.submit(answer, rank, 3, Note("a", SAME), 2) for rank in ranks]]
    assert any("another process has answered as rank 1" in str(error) for error in found)


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        (error,) = call({0: Note("node-a", SAME)}, 2, timeout_s=1)
    assert "choose another master port" in str(error)


@pytest.mark.parametrize("port", ["", "http", "0", "65536", "9" * 5000])
def test_no_address(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    (error,) = call({1: Note("node-b", SAME)}, 2)
    assert "MASTER_ADDR is '127.0.0.1' and MASTER_PORT" in str(error)


def test_a_restart_of_torchrun_does_not_read_the_former_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    from torch.distributed import TCPStore

    port = int(os.environ["MASTER_PORT"])
    agent = TCPStore("127.0.0.1", port, None, True, timedelta(seconds=5), wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    both = {0: Note("a", SAME), 1: Note("b", SAME)}
    assert isinstance(call({0: Note("a", SAME)}, 2, timeout_s=0.5)[0], VlscaleError)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(both, 2) == [["a", "b"], ["a", "b"]]
    del agent


def test_a_note_tells_host_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert host_name() == socket.gethostname()
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    note = own_note()
    assert note.host == "n7"
    assert {"python", "vlscale", "torch", "deepspeed"} <= set(note.versions)
