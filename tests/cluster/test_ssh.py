"""A run on two hosts over real ssh: it trains, is stopped, goes on and ends with the losses of an undisturbed run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.network import Network
from tests.cluster.runs import STEPS, plain_deepspeed, pretrain, rank_on, rows, vlscale_launch, wait_for, write_files
from tests.multiprocess.launcher import run_together
from vlscale.train.resilience import PREEMPTED

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a run, and the same run undisturbed, by two processes of one host."""
    root = tmp_path_factory.mktemp("ssh")
    write_files(root)
    for done in run_together(*pretrain(root, root / "undisturbed"), processes=2):
        assert done.status == 0, done.tail
    assert max(rows(root / "undisturbed")) == STEPS
    return root


@pytest.mark.parametrize("launcher", ["ssh", "deepspeed"])
def test_stopped_on_the_other_host_it_goes_on_with_the_same_losses(hosts: Network, root: Path, launcher: str) -> None:
    start = plain_deepspeed(root) if launcher == "deepspeed" else vlscale_launch(root, launcher)
    run = root / launcher
    words = [*start, *pretrain(root, run, "--resume", "auto")]
    with hosts.start("node-a", *words) as first:
        remote = rank_on(hosts, "node-b", 1)
        wait_for(lambda: len(rows(run)) >= 3 or first.poll() is not None, 120)
        os.kill(remote, signal.SIGUSR2)
        out, _ = first.communicate(timeout=60)
    assert first.returncode == PREEMPTED, out[-6000:]
    assert 3 <= max(rows(run)) < STEPS, "it was to stop in the middle"
    assert not hosts.left(10)
    done = hosts.run("node-a", *words)
    assert done.status == 0, done.tail
    assert rows(run) == rows(root / "undisturbed")
    assert not hosts.left(10)


def test_a_signal_to_the_launcher_stops_all_hosts_also_while_they_start(hosts: Network, root: Path) -> None:
    run = root / "early"
    with hosts.start("node-a", *vlscale_launch(root, "ssh"), *pretrain(root, run)) as started:
        rank_on(hosts, "node-b", 1)
        os.kill(started.pid, signal.SIGUSR2)
        out, _ = started.communicate(timeout=90)
    assert started.returncode == PREEMPTED, out[-6000:]
    assert "all ranks are asked to save and stop" in out
    assert len(rows(run)) < STEPS
    assert not hosts.left(10)


def test_only_named_variables_reach_the_other_host(hosts: Network, root: Path) -> None:
    script = root / "show.py"
    script.write_text(
        "import json, os, sys\nprint('SHOWN', json.dumps([dict(os.environ), sys.argv[2:]]))\n", encoding="utf-8"
    )
    planted = {
        "WANDB_API_KEY": "planted-1",
        "MLFLOW_TRACKING_PASSWORD": "planted-2",
        "NCCL_DEBUG": "WARN",
        "SITE": "here",
        "PYTHONSECRET": "planted-3",
        "VLSCALE_TOKEN": "planted-4",
    }
    odd = ["a b='x$y' %n `id`\\", "x'\"%h;$(id)", "", "*"]
    for launcher in ("pdsh", "ssh"):
        words = [*vlscale_launch(root, launcher, "--export", "SITE"), script, *odd]
        done = hosts.run("node-a", *words, **planted)
        assert done.status == 0, done.tail
        assert "planted" not in done.out
        shown = [line.split("SHOWN ", 1)[1] for line in done.out.splitlines() if "SHOWN" in line]
        assert len(shown) == 2
        for text in shown:
            assert '"NCCL_DEBUG": "WARN"' in text
            assert '"SITE": "here"' in text
            assert text.endswith(repr_json(odd)), text
    refused = hosts.run("node-a", *vlscale_launch(root, "ssh", "--export", "WANDB_API_KEY"), script, **planted)
    assert refused.status == 2
    assert "looks like a secret" in refused.out
    assert "planted" not in refused.out


def repr_json(words: list[str]) -> str:
    import json

    return f"{json.dumps(words)}]"
