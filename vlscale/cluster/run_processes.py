"""The processes of one run on this host: all that carry its id in their environment, whoever started them.

Children inherit the environment, so readers and compilers belong to it, too, and so do processes whose launcher has
been killed.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

VARIABLE = "VLSCALE_RUN_ID"
LAUNCHER_VARIABLE = "VLSCALE_LAUNCHER_ID"
"""The same for the processes that start a run: DeepSpeed's launcher, pdsh, ssh."""

LATE_S = 10.0
"""How long after the end of a run its processes may still appear on a host."""

_PROC = Path("/proc")
_PATIENCE_S = 8.0
_PAUSE_S = 0.1
_MASK = re.compile(r"^SigBlk:\s*([0-9a-f]+)$", re.MULTILINE)


def find(run_id: str, variable: str = VARIABLE) -> list[int]:
    """Return the ids of the processes of a run, of this user, without the caller."""
    mark = f"{variable}={run_id}".encode()
    return [pid for pid in _pids() if pid != os.getpid() and mark in _environment(pid)]


def ask_to_stop(run_id: str, number: int) -> int:
    """Send a signal to those ranks of a run that wait for it, which they tell by blocking it; returns how many.

    To the others, such as launchers and ranks that only just start, it might be deadly.
    """
    asked = 0
    for pid in find(run_id):
        if any(entry.startswith(b"RANK=") for entry in _environment(pid)) and _blocks(pid, number):
            asked += _send(pid, number)
    return asked


def end(run_id: str) -> list[int]:
    """End the processes of a run: SIGTERM, and SIGKILL for those that are still there after some seconds.

    Returns:
        The processes that cannot be ended.
    """
    for number, patience in ((signal.SIGTERM, _PATIENCE_S), (signal.SIGKILL, _PATIENCE_S)):
        until = time.monotonic() + patience
        signalled: set[int] = set()
        while left := find(run_id):
            for pid in left:
                if pid not in signalled:
                    _send(pid, number)
            signalled.update(left)
            if time.monotonic() > until:
                break
            time.sleep(_PAUSE_S)
        else:
            return []
    return find(run_id)


def end_latecomers(run_id: str, seconds: float = LATE_S) -> None:
    """Kill what still comes: a shell on this host may be about to start a part of the run though ssh has gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for pid in find(run_id):
            _send(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def kill_launchers(run_id: str) -> None:
    """Kill what has started a run, at once: asked by SIGTERM, DeepSpeed's launcher would end other runs as well.

    pdsh starts each ssh in a session of its own, so that no process group holds them all.
    """
    for _ in range(10):  # again: one may just have started another
        found = find(run_id, LAUNCHER_VARIABLE)
        if not found:
            return
        for pid in found:
            _send(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def _pids() -> list[int]:
    own = os.getuid()
    found = []
    for entry in _PROC.iterdir():
        try:
            if entry.name.isdecimal() and entry.stat().st_uid == own:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _environment(pid: int) -> list[bytes]:
    """What a process was started with; empty for one that has ended (a zombie, too)."""
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _blocks(pid: int, number: int) -> bool:
    try:
        match = _MASK.search((_PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return False
    return bool(match and int(match[1], 16) >> (number - 1) & 1)


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except OSError:
        return False
    return True
