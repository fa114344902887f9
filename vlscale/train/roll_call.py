"""The roll call: who is there, from which host, with which versions, before anything can hang.

Process groups only say that a time-out passed, after half an hour. Here each rank leaves a note in a store at
``MASTER_ADDR:MASTER_PORT``; rank 0 reads them and tells all ranks one verdict. Nothing but JSON is exchanged.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata

from torch.distributed import PrefixStore, Store, TCPStore

import vlscale
from vlscale.errors import VlscaleError, report_error

COMPARED = ("torch", "deepspeed", "mosaicml-streaming", "numpy")
"""Packages that must have one version in all processes."""

_PAUSE_S = 0.05
_RETRY_S = 0.25
_GRACE_S = 10.0
"""How long the others wait for the verdict beyond the time-out, and rank 0 for them to have read it."""


@dataclass(frozen=True)
class Note:
    """What a rank says of itself: its host, and name -> version of what must agree."""

    host: str
    versions: dict[str, str]


def host_name() -> str:
    """Name of this host: Slurm's where it gives one, as several of its nodes may be one machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_note() -> Note:
    """Return the note of this process."""
    versions = {"python": platform.python_version(), "vlscale": vlscale.__version__}
    for name in COMPARED:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Note(host_name(), versions)


@contextmanager
def roll_call(rank: int, world_size: int, note: Note, timeout_s: float, program: str) -> Iterator[list[str]]:
    """Wait until all ranks are there; the same outcome on all of them.

    Join the process group inside the block: rank 0 serves the store until it ends.

    Args:
        rank: this process; world_size: their number.
        note: of this process.
        timeout_s: how long a rank may wait for another, and for rank 0's port.
        program: name that errors are printed under.

    Yields:
        The host of each rank.

    Raises:
        VlscaleError: the master cannot be reached, ranks are missing, or versions differ; hosts are named.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    server = _open_store(rank, world_size, timeout_s)
    store = PrefixStore(f"vlscale/{attempt}", server)
    store.set(f"note/{rank}", json.dumps(asdict(note)))
    store.add("arrived", 1)
    if rank == 0:
        notes = _collect(store, world_size, timeout_s)
        problem, hosts = _problem(notes, world_size, timeout_s), [note.host for note in notes.values()]
        store.set("verdict", json.dumps([problem, hosts]))
        _await(lambda: store.add("read", 0) >= len(notes) - 1, _GRACE_S)  # the store is gone when this process is
    else:
        problem, hosts = _read_verdict(store, timeout_s)
    if problem:
        error = VlscaleError(problem)
        if rank == 0:
            report_error(program, error)
        error.reported = True
        raise error
    yield hosts


def _open_store(rank: int, world_size: int, timeout_s: float) -> Store:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    where = f"{address}:{port}"
    if not address or not port.isdecimal():
        raise VlscaleError(
            f"rank {rank} of {world_size} on {host_name()}: MASTER_ADDR and MASTER_PORT are {where!r}; start through "
            f"deepspeed, torchrun or launch/slurm, or set them"
        )
    # torchrun keeps a store at this address itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            _reach(address, int(port), timeout_s)
        reached, limit = "127.0.0.1" if serves else address, timedelta(seconds=timeout_s)
        return TCPStore(reached, int(port), world_size, serves, limit, wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = "is the port taken by another run? choose another master port" if serves else (
            "is rank 0 started, is this its address as seen from here, and does the firewall let the port through?"
        )  # fmt: skip
        raise VlscaleError(
            f"rank {rank} on {host_name()}: no roll call at {where} within {timeout_s:g} s ({reason[:200]}): {cure}"
        ) from None


def _reach(address: str, port: int, seconds: float) -> None:
    """Wait until a port answers. TCPStore by itself may pause for half a minute, and try again after its time-out."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())):
                return
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(_RETRY_S)


def _collect(store: Store, world_size: int, timeout_s: float) -> dict[int, Note]:
    """Rank 0: the notes that arrive in time, by rank."""
    _await(lambda: store.add("arrived", 0) >= world_size, timeout_s)
    here = [rank for rank in range(world_size) if store.check([f"note/{rank}"])]
    return {rank: Note(**json.loads(store.get(f"note/{rank}"))) for rank in here}


def _read_verdict(store: Store, timeout_s: float) -> tuple[str | None, list[str]]:
    """Other ranks: what rank 0 found wrong, and the hosts."""
    try:
        store.wait(["verdict"], timedelta(seconds=timeout_s + _GRACE_S))
        problem, hosts = json.loads(store.get("verdict"))
        store.add("read", 1)
    except RuntimeError as error:
        raise VlscaleError(
            f"rank 0 at {os.environ['MASTER_ADDR']} went away during the roll call "
            f"({str(error).splitlines()[0][:200]}); see its log"
        ) from None
    return problem, hosts


def _await(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE_S)
    return True


def _problem(notes: Mapping[int, Note], world_size: int, timeout_s: float) -> str | None:
    """What is wrong with the notes that came; None if nothing is."""
    missing = [rank for rank in range(world_size) if rank not in notes]
    if missing:
        here = sorted({note.host for note in notes.values()})
        return (
            f"{_ranks(missing)} of {world_size}{_expected_hosts(missing, world_size)} did not answer within "
            f"{timeout_s:g} s (hosts that did: {', '.join(here)}); see whether they started there, or give slow hosts "
            f"more time with --join_timeout"
        )
    first = notes[0]
    for name, version in first.versions.items():
        others = [rank for rank, note in notes.items() if note.versions.get(name) != version]
        if others:
            other = notes[others[0]]
            same = [rank for rank in others if notes[rank].host == other.host]
            found = other.versions.get(name, "missing")
            return (
                f"host {other.host} ({_ranks(same)}) has {name} {found}, host {first.host} (rank 0) has {version}; "
                f"install the same environment on all hosts"
            )
    return None


def _expected_hosts(missing: Sequence[int], world_size: int) -> str:
    """`` on node-c, node-d``: where the missing ranks were to run, as far as the launcher told (``VLSCALE_HOSTS``)."""
    hosts = [host for host in os.environ.get("VLSCALE_HOSTS", "").split(",") if host]
    if not hosts or world_size % len(hosts):
        return ""
    each = world_size // len(hosts)
    return " on " + ", ".join(dict.fromkeys(hosts[rank // each] for rank in missing))


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 4-7`` or ``ranks 1, 3, 5-7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
