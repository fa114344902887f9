"""What killed runs leave in shared memory: whose it is, whether a process still has it open, and its removal.

* ``000000_locals`` and the like, with lock files in the folder for temporary files: mosaicml-streaming.
* ``deepspeed_allreduce_buffer_<user>_<address>_<port>_<rank>``: DeepSpeed on a CPU, 66 MiB each.
* ``nccl-XXXXXX``: NCCL between the GPUs of a host.
* ``torch_<process>_...``: tensors sent between processes by name.

Processes in another container that shares /dev/shm cannot be seen from here.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vlscale.doctor.facts import Leftover

LEAST_AGE_S = 60.0
"""Younger ones are left alone: a run may be about to open them."""
MOST = 20_000
"""Entries of a folder that are looked at."""

_MEMORY = (
    ("streaming", re.compile(
        r"(\d{6})_(?:locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
    )),
    ("DeepSpeed", re.compile(r"deepspeed_allreduce_buffer_(\d+_.+_\d+)_\d+")),
    ("NCCL", re.compile(r"nccl-([A-Za-z0-9]{6})")),
    ("PyTorch", re.compile(r"torch_(\d+)_\d+_\d+")),
)  # fmt: skip
_LOCKS = (("streaming", re.compile(r"(\d{6})_(?:barrier|cache)_filelock")),)
_MAPPING = re.compile(rb"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+)", re.MULTILINE)
_TRAINERS = ("python", "pt_", "vlscale", "deepspeed", "torchrun")
"""How processes that use such files are called; agents and daemons that forbid looking into them do not count."""


def scan(shm: Path, temporary: Path, proc: Path = Path("/proc")) -> tuple[list[Leftover], list[str]]:
    """Look for files of the kinds above.

    Returns:
        The files, and the processes of this user that cannot be looked into (``name (id)``).
    """
    found = [*_candidates(shm, _MEMORY), *_candidates(temporary, _LOCKS)]
    if not found:
        return [], []
    opened, unseen = _open_files(proc)
    used = {item.group for key, item in found if key in opened or _names_living_process(item, proc)}
    return [replace(item, in_use=item.group in used) for _, item in found], unseen


def removable(item: Leftover, user: int) -> bool:
    """Whether ``--clean`` may remove it: this user's own, unused, and not just made."""
    return item.owner == user and not item.in_use and item.age_s >= LEAST_AGE_S


def clean(shm: Path, temporary: Path, proc: Path = Path("/proc")) -> tuple[list[Leftover], list[str]]:
    """Remove what :func:`removable` allows.

    Nothing is removed while a process of this user cannot be looked into.

    Returns:
        What was removed, and the processes that stood in the way.
    """
    items, unseen = scan(shm, temporary, proc)
    if unseen:
        return [], unseen
    removed = []
    for item in items:
        if removable(item, os.getuid()) and _remove(item):
            removed.append(item)
    return removed, []


def _remove(item: Leftover) -> bool:
    try:
        if os.lstat(item.path).st_ino != item.inode:  # another file took its name meanwhile
            return False
        os.unlink(item.path)
    except OSError:
        return False
    return True


def _candidates(
    folder: Path, kinds: Sequence[tuple[str, re.Pattern[str]]]
) -> Iterable[tuple[tuple[int, int], Leftover]]:
    try:
        names = sorted(os.listdir(folder))[:MOST]
    except OSError:
        return
    for name in names:
        for kind, pattern in kinds:
            found = pattern.fullmatch(name)
            if found is None:
                continue
            try:
                there = os.lstat(folder / name)
            except OSError:
                continue
            if stat.S_ISREG(there.st_mode):  # a link that somebody planted is nothing of ours
                age = max(0.0, time.time() - there.st_mtime)
                path = str(folder / name)
                made = Leftover(
                    path, kind, f"{kind} {found[1]}", there.st_ino, there.st_uid, there.st_blocks * 512, age, False
                )
                yield (there.st_dev, there.st_ino), made


def _names_living_process(item: Leftover, proc: Path) -> bool:
    return item.kind == "PyTorch" and (proc / item.group.rpartition(" ")[2]).exists()


def _open_files(proc: Path) -> tuple[set[tuple[int, int]], list[str]]:
    """(device, inode) of all that processes map or hold open, and this user's processes that do not tell."""
    opened: set[tuple[int, int]] = set()
    unseen = []
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            for major, minor, inode in _MAPPING.findall(_mappings(folder)):
                opened.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
            for descriptor in os.listdir(folder / "fd"):
                _add_descriptor(opened, folder / "fd" / descriptor)
        except PermissionError:
            unseen += _own_trainer(folder)
        except OSError:  # it has ended
            continue
    return opened, unseen


def _mappings(process: Path) -> bytes:
    return (process / "maps").read_bytes()


def _add_descriptor(opened: set[tuple[int, int]], path: Path) -> None:
    try:
        there = os.stat(path)
    except FileNotFoundError:  # closed meanwhile
        return
    opened.add((there.st_dev, there.st_ino))


def _own_trainer(folder: Path) -> list[str]:
    """``["name (id)"]`` if a process is this user's and may be one of a run."""
    try:
        text = (folder / "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    name = re.search(r"^Name:\t(.*)$", text, re.MULTILINE)
    user = re.search(r"^Uid:\t(\d+)", text, re.MULTILINE)
    if name is None or user is None or int(user[1]) != os.getuid() or not name[1].startswith(_TRAINERS):
        return []
    return [f"{name[1]} ({folder.name})"]
