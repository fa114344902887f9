"""torchrun starts the training script as well: on one host, and on two that meet at an endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.network import BIN, Network
from tests.cluster.runs import STEPS, pretrain, rows, write_files
from tests.multiprocess.launcher import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torchrun")
    write_files(root)
    return root


def test_two_hosts_train_as_two_processes_of_one_host(hosts: Network, root: Path) -> None:
    alone = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = hosts.run("node-a", *alone, *pretrain(root, root / "one"))
    assert done.status == 0, done.tail
    assert max(rows(root / "one")) == STEPS
    # By the name that the first host gives itself: torchrun takes an address for another host's where that name means
    # a loopback address, as on Debian, and then nobody serves the endpoint.
    meet = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    words = [str(BIN / "torchrun"), *meet, "--rdzv_endpoint", f"node-a:{free_port()}"]
    script = pretrain(root, root / "two")
    with hosts.start("node-b", *words, *script) as other:
        done = hosts.run("node-a", *words, *script)
        out, _ = other.communicate(timeout=30)
    assert done.status == 0, done.tail
    assert other.returncode == 0, out[-6000:]
    assert rows(root / "two") == rows(root / "one")
    assert not hosts.left(10)
