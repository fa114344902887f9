"""What is wrong with a host is told within 60 seconds, by name, and nothing has been started on any host."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.network import ROOT, Finished, Network
from tests.cluster.runs import pretrain, vlscale_launch, write_files
from tests.multiprocess.launcher import free_port

pytestmark = pytest.mark.cluster

BOUND_S = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refused")
    write_files(root)
    return root


def launch(hosts: Network, root: Path, *options: str, lines: str | None = None, **variables: str | None) -> Finished:
    """Run ``vlscale launch`` with a hostfile of its own; assert what holds of every refusal."""
    shutil.copy(root / "hostfile", root / "kept")
    if lines is not None:
        (root / "hostfile").write_text(lines, encoding="utf-8")
    try:
        words = [*vlscale_launch(root, "ssh", *options), *pretrain(root, root / "never")]
        done = hosts.run("node-a", *words, timeout=BOUND_S, **variables)
    finally:
        shutil.move(root / "kept", root / "hostfile")
    assert done.status == 2, done.tail
    assert "Traceback" not in done.out
    assert done.seconds < BOUND_S
    assert not hosts.left(5)
    assert not (root / "never").exists()
    return done


def test_two_names_of_one_host(hosts: Network, root: Path) -> None:
    with (hosts.folder / "known_hosts").open("a", encoding="utf-8") as file:
        file.write(f"[10.77.0.2]:2222 {(hosts.folder / 'host.pub').read_text(encoding='utf-8')}")
    done = launch(hosts, root, lines="node-a slots=1\nnode-b slots=1\n10.77.0.2 slots=1\n")
    assert "error: 10.77.0.2: is the same machine as node-b" in done.out


def test_more_slots_than_gpus_on_every_host(hosts: Network, root: Path) -> None:
    done = launch(hosts, root, lines="node-a slots=72\nnode-b slots=80\n", DS_ACCELERATOR=None)
    for name, line, slots in (("node-a", 1, 72), ("node-b", 2, 80)):
        assert f"error: {name}: {root}/hostfile:{line} asks for {slots} slots, but it has " in done.out


def test_another_version_on_one_host(hosts: Network, root: Path) -> None:
    other = root / "other_version.py"
    other.write_text('"""Another vlscale."""\n\n__version__ = "0.0.99"\n', encoding="utf-8")
    with hosts.nodes["node-b"].covered(ROOT / "vlscale" / "__init__.py", other):
        done = launch(hosts, root)
    assert "error: node-b: vlscale 0.0.99, but node-a has " in done.out


def test_changed_files_on_one_host(hosts: Network, root: Path) -> None:
    changed = root / "changed.py"
    changed.write_text((ROOT / "vlscale/ragged.py").read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    with hosts.nodes["node-b"].covered(ROOT / "vlscale" / "ragged.py", changed):
        done = launch(hosts, root)
    assert "error: node-b: its files of vlscale differ from those of node-a" in done.out


def test_one_host_without_the_data_and_another_recipe(hosts: Network, root: Path) -> None:
    recipe = root / "other_recipe.yaml"
    recipe.write_text((root / "small.yaml").read_text(encoding="utf-8") + "# another\n", encoding="utf-8")
    there = hosts.nodes["node-b"]
    with ExitStack() as stack:
        stack.enter_context(there.covered(root / "train"))
        stack.enter_context(there.covered(root / "small.yaml", recipe))
        done = launch(hosts, root)
    assert f"error: node-b: {root}/train differs from that of node-a" in done.out
    assert f"error: node-b: {root}/small.yaml differs from that of node-a" in done.out
    with there.covered(root):
        done = launch(hosts, root)
    assert f"error: node-b: {root}/train does not exist there" in done.out


def test_no_project_on_one_host(hosts: Network, root: Path) -> None:
    with hosts.nodes["node-b"].covered(ROOT):
        done = launch(hosts, root)
    assert f"error: node-b: has no Python at {ROOT}" in done.out or f"error: node-b: has no folder {ROOT}" in done.out


def test_a_host_key_that_is_not_known(hosts: Network, root: Path) -> None:
    known = hosts.folder / "known_hosts"
    kept = known.read_text(encoding="utf-8")
    known.write_text(kept.replace("[node-b]:2222", "[node-x]:2222").replace("[10.77.0.2]:2222", "[x]:22"), "utf-8")
    try:
        done = launch(hosts, root)
    finally:
        known.write_text(kept, encoding="utf-8")
    assert "error: node-b: its host key is not known" in done.out


def test_a_master_that_the_other_host_cannot_reach(hosts: Network, root: Path) -> None:
    master = hosts.nodes["node-a"]
    master.call("ip", "addr", "add", "10.99.0.1/32", "dev", "lo")
    done = launch(hosts, root, "--master_addr", "10.99.0.1")
    assert "error: node-b: cannot connect to node-a on port" in done.out
    done = launch(hosts, root, "--master_addr", "localhost")
    assert "error: node-b: cannot connect to node-a on port" in done.out, "its own localhost is not the master"
    port = str(free_port())
    server = f"import socket, time; kept = socket.create_server(('', {port})); print('up', flush=True); time.sleep(60)"
    with hosts.start("node-a", "python", "-c", server) as taken:
        assert taken.stdout is not None
        assert taken.stdout.readline() == "up\n"
        done = launch(hosts, root, "--master_port", port)
    assert f"error: node-a: cannot listen on port {port} (Address already in use" in done.out


def test_an_interface_that_one_host_lacks(hosts: Network, root: Path) -> None:
    cable = hosts.nodes["node-a"].cable
    done = launch(hosts, root, GLOO_SOCKET_IFNAME=cable)
    assert f"error: node-b: GLOO_SOCKET_IFNAME={cable}, but it has only" in done.out


def test_all_problems_are_told_at_once(hosts: Network, root: Path) -> None:
    lines = "node-a slots=72\nnode-b slots=72\nnode-typo slots=1\nnode-silent slots=1\n"
    done = launch(hosts, root, lines=lines, DS_ACCELERATOR=None)
    told = [line for line in done.out.splitlines() if ": error: " in line]
    assert len(told) == 4, done.out
    assert "nothing was started (4 problems)" in done.out
    assert "error: node-silent: unreachable" in done.out
    assert "error: node-typo: its name cannot be resolved" in done.out
    assert all(f"error: {name}: " in done.out for name in ("node-a", "node-b"))
