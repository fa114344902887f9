from __future__ import annotations

from pathlib import Path

import pytest

from vlscale.cluster.hostfile import Host
from vlscale.cluster.launchers import Run, hostfile_text, pdsh_command
from vlscale.cluster.remote import Place


def test_deepspeed_reads_the_same_hosts_and_slots(tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    hosts = (Host("node-b", (1, 3), "hosts:2"), Host("10.0.0.7", (0,), "hosts:1"), Host("a_1.site", (0, 1), "hosts:9"))
    job = Run(hosts, "10.0.0.1", 29500, "launch/pretrain.py", ("--recipe", "a b.yaml"))
    path = tmp_path / "hostfile"
    path.write_text(hostfile_text(job), encoding="utf-8")
    words = pdsh_command(job, Place(tmp_path, {}), path)
    read = runner.parse_args(words[3:])
    assert read.hostfile == str(path)
    assert (read.master_addr, read.master_port) == ("10.0.0.1", 29500)
    assert (read.user_script, read.user_args) == ("launch/pretrain.py", ["--recipe", "a b.yaml"])
    chosen = runner.parse_inclusion_exclusion(runner.fetch_hostfile(read.hostfile), read.include, read.exclude)
    assert list(chosen.items()) == [(host.name, list(host.slots)) for host in hosts]
