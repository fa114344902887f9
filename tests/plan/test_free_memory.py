"""Free memory on a CPU: the machine's, or what a job's or container's limits leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlscale.errors import VlscaleError
from vlscale.plan.free_memory import free_bytes

CPU, MIB = torch.device("cpu"), 2**20
V1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "cache": "total_inactive_file"}
V2 = {"limit": "memory.max", "used": "memory.current", "cache": "inactive_file"}


def machine(root: Path, group: str) -> None:
    """A machine with 1,000 MiB available; the process is in ``group``, a line of /proc/self/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:   {1000 * 1024} kB\n")
    (root / "proc/self/cgroup").write_text(f"12:pids:/other\n{group}\n")


def limit(folder: Path, names: dict[str, str], most: object, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["limit"]).write_text(f"{most}\n")
    (folder / names["used"]).write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names['cache']} {cache * MIB}\n")


def test_version_2_the_job_above_the_step_is_the_tightest(tmp_path: Path) -> None:
    machine(tmp_path, "0::/slurm/job_7/step_0")
    job = tmp_path / "sys/fs/cgroup/slurm/job_7"
    limit(job, V2, 400 * MIB, used=150, cache=50)
    limit(job / "step_0", V2, "max", used=150)
    assert free_bytes(CPU, tmp_path) == 300 * MIB


def test_version_1_without_a_limit_is_the_machine(tmp_path: Path) -> None:
    machine(tmp_path, "4:cpu,memory:/slurm/job_7")
    job = tmp_path / "sys/fs/cgroup/memory/slurm/job_7"
    limit(job, V1, 9223372036854771712, used=100)
    assert free_bytes(CPU, tmp_path) == 1000 * MIB
    limit(job, V1, 600 * MIB, used=100, cache=20)
    assert free_bytes(CPU, tmp_path) == 520 * MIB
    limit(job, V1, 600 * MIB, used=700)
    assert free_bytes(CPU, tmp_path) == 0


@pytest.mark.parametrize("group", ["0::/docker/0123", "0::/../../outside", "0::/"])
def test_a_container_sees_its_own_limit_at_the_mount(tmp_path: Path, group: str) -> None:
    machine(tmp_path, group)
    limit(tmp_path / "sys/fs/cgroup", V2, 256 * MIB, used=56)
    assert free_bytes(CPU, tmp_path) == 200 * MIB


def test_what_cannot_be_read_is_left_out_or_told(tmp_path: Path) -> None:
    machine(tmp_path, "garbage")
    assert free_bytes(CPU, tmp_path) == 1000 * MIB
    (tmp_path / "proc/meminfo").write_text("nothing\n")
    with pytest.raises(VlscaleError, match="--memory-gib"):
        free_bytes(CPU, tmp_path)


def test_this_machine_has_some() -> None:
    assert 0 < free_bytes(CPU) < 1 << 50
