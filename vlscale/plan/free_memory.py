"""How much memory this process may still take: a GPU's, or a machine's within the limits of its job or container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from vlscale.errors import VlscaleError

_VERSIONS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Controller in /proc/self/cgroup ('' is version 2) -> where it is mounted; its limit, its use, and cache in that."""


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Return bytes that this process may still take.

    On CUDA what PyTorch has reserved counts as free, since a trial may use it. On a CPU it is what the kernel calls
    available, or what is left under the tightest limit of the control groups (a Slurm job, a container).

    Args:
        device: of which.
        root: where ``proc`` and ``sys`` lie.

    Raises:
        VlscaleError: a CPU's free memory cannot be asked for.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        named = dict(line.split(":", 1) for line in lines if ":" in line)
        available = int(named["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        raise VlscaleError("/proc/meminfo cannot be read here; give the memory with --memory-gib") from None
    return max(0, min([available, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes left under each limit of the process's control groups and of the groups above them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = next((name for name in controllers.split(",") if name in _VERSIONS), None)
        if version is None:
            continue
        place, limit_name, used_name, cache_name = _VERSIONS[version]
        # In a container the path may be the host's and not exist here: its own group is then what is mounted.
        mount = root / place
        for folder in (mount, *_below(mount, path)):
            limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
            if limit.isdecimal() and used.isdecimal():
                yield int(limit) - int(used) + _named(folder / "memory.stat", cache_name)


def _below(folder: Path, path: str) -> Iterator[Path]:
    for part in path.split("/"):
        if part == "..":
            return
        if part:
            folder = folder / part
            yield folder


def _named(path: Path, name: str) -> int:
    """A number of ``memory.stat``: what files occupy there is given back where a process needs it."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""
