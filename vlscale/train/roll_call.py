"""The roll call: who is there, from which host, with which versions, before anything can hang.

Process groups only say that a time-out passed, after half an hour. Here each rank leaves a note in a store at
``MASTER_ADDR:MASTER_PORT``; rank 0 reads them and tells all ranks one verdict. Nothing but JSON is exchanged.

A store may wait longer than it is told to, or for ever (a port that accepts and is silent). So all of it runs in a
thread that is left behind when time is up.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata

from torch.distributed import PrefixStore, Store, TCPStore

import vlscale
from vlscale.errors import VlscaleError, report_error

COMPARED = ("torch", "deepspeed", "mosaicml-streaming", "numpy")
"""Packages that must have one version in all processes."""

_PAUSE_S = 0.05
_GRACE_S = 5.0
"""How long rank 0 waits for the others to have read a verdict."""
_SHOWN = 8


@dataclass(frozen=True)
class Note:
    """What a rank says of itself: its host, and name -> version of what must agree."""

    host: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Place:
    """Where the store is.

    Attributes:
        rank: this process; world_size: their number.
        host: of this process.
        address, port: of the store, ``MASTER_ADDR`` and ``MASTER_PORT``.
        serves: this process holds the store.
    """

    rank: int
    world_size: int
    host: str
    address: str
    port: int
    serves: bool

    @property
    def where(self) -> str:
        """Address and port."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


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
        timeout_s: how long rank 0 waits for the others; they wait a little longer.
        program: name that errors are printed under.

    Yields:
        The host of each rank.

    Raises:
        VlscaleError: the master cannot be reached, ranks are missing, or versions differ; hosts are named.
    """
    place = _place(rank, world_size, note.host)
    found: list[tuple[Store, str | None, list[str]] | Exception] = []

    def meet() -> None:
        try:
            store = _open_store(place)
            found.append((store, *(_lead if rank == 0 else _follow)(store, place, note, timeout_s)))
        except (VlscaleError, RuntimeError, OSError, ValueError) as error:
            found.append(error)

    _check_address(place)
    patience = timeout_s + 2 * _GRACE_S
    thread = threading.Thread(target=meet, daemon=True, name="roll-call")
    with _quick_lookups() if place.serves else nullcontext():
        thread.start()
        thread.join(patience)
    outcome = found[0] if found else None
    if isinstance(outcome, VlscaleError):
        raise outcome
    if outcome is None or isinstance(outcome, Exception):
        raise VlscaleError(_unreached(place, outcome, patience))
    _, problem, hosts = outcome
    if problem:
        error = VlscaleError(problem)
        if rank == 0:
            report_error(program, error)
        error.reported = True
        raise error
    yield hosts


def _place(rank: int, world_size: int, host: str) -> Place:
    address, port = os.environ.get("MASTER_ADDR", "").strip("[]"), os.environ.get("MASTER_PORT", "")
    if not address or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise VlscaleError(
            f"rank {rank} of {world_size} on {host}: MASTER_ADDR is {address[:100]!r} and MASTER_PORT {port[:9]!r}, "
            f"expected a host and 1 to 65535; start through vlscale launch, deepspeed, torchrun or launch/slurm"
        )
    # torchrun keeps a store at this address itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Place(rank, world_size, host, address, int(port), serves)


def _check_address(place: Place) -> None:
    try:
        socket.getaddrinfo(place.address, place.port)
    except (OSError, UnicodeError) as error:
        raise VlscaleError(
            f"rank {place.rank} on {place.host}: MASTER_ADDR {place.address} has no address here ({error}); name "
            f"rank 0's host as all hosts know it"
        ) from None


def _open_store(place: Place) -> Store:
    """The store, under a prefix that only this run has: another's ranks may come to a port that both use."""
    if place.serves:
        _allow_files(2 * place.world_size + 4096)
    # Rank 0 goes to its own store directly: whether it can be reached by its address is another question, asked later.
    reached = "127.0.0.1" if place.serves else place.address
    longer = timedelta(hours=1)  # the thread's time-out is the one that counts
    store = TCPStore(
        reached, place.port, place.world_size, place.serves, longer, wait_for_workers=False, multi_tenant=True
    )
    # torchrun's store outlives a restart.
    variables = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "VLSCALE_RUN_ID")
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    run = repr((place.world_size, [os.environ.get(name) for name in variables], words))
    return PrefixStore(hashlib.blake2b(run.encode(), digest_size=8).hexdigest(), store)


def _lead(store: Store, place: Place, note: Note, timeout_s: float) -> tuple[str | None, list[str]]:
    """Rank 0: collect the notes, and tell all what is wrong with them, and the hosts."""
    end = time.monotonic() + timeout_s
    _sign(store, place, note)
    problem = _own_address(place, end) if place.serves else None
    if problem is None:
        _await(lambda: store.add("arrived", 0) >= place.world_size, end)
    here = [rank for rank in range(place.world_size) if store.check([f"note/{rank}"])]
    notes = {rank: Note(**json.loads(store.get(f"note/{rank}"))) for rank in here}
    problem = problem or _problem(notes, place.world_size, timeout_s)
    hosts = [each.host for each in notes.values()]
    store.set("verdict", json.dumps([problem, hosts]))
    # The store is gone when this process is.
    readers = [f"read/{rank}" for rank in here if rank]
    _await(lambda: not readers or store.check(readers), time.monotonic() + _GRACE_S)
    return problem, hosts


def _follow(store: Store, place: Place, note: Note, timeout_s: float) -> tuple[str | None, list[str]]:
    """Other ranks: leave a note, and read the verdict."""
    _sign(store, place, note)
    store.wait(["verdict"], timedelta(seconds=timeout_s + _GRACE_S))
    problem, hosts = json.loads(store.get("verdict"))
    store.set(f"read/{place.rank}", "")
    return problem, hosts


def _sign(store: Store, place: Place, note: Note) -> None:
    if store.add(f"signed/{place.rank}", 1) > 1:
        raise VlscaleError(
            f"rank {place.rank} on {place.host}: another process has answered as rank {place.rank} at {place.where}; "
            f"two runs share this port: choose another master port"
        )
    store.set(f"note/{place.rank}", json.dumps(asdict(note)))
    store.add("arrived", 1)


def _own_address(place: Place, end: float) -> str | None:
    """Why rank 0 does not reach itself under the address that it gave the others; None if it does."""
    try:
        with socket.create_connection((place.address, place.port), timeout=max(1.0, end - time.monotonic())):
            return None
    except OSError as error:
        return (
            f"rank 0 on {place.host} does not reach itself at {place.where} ({error}); MASTER_ADDR has to be an "
            f"address of rank 0's host"
        )


def _unreached(place: Place, error: Exception | None, seconds: float) -> str:
    who = f"rank {place.rank} on {place.host}"
    if place.serves and error is not None:
        return (
            f"{who}: no roll call at {place.where} ({_first_line(error)}); is the port taken by another run? choose "
            f"another master port"
        )
    reason = _first_line(error) if error is not None else "no answer"
    return (
        f"{who}: no roll call at {place.where} within {seconds:g} s ({reason}); is rank 0 started with the same "
        f"command line, is this its address as seen from here, and does the firewall let the port through?"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _await(done: Callable[[], bool], end: float) -> None:
    while not done() and time.monotonic() < end:
        time.sleep(_PAUSE_S)


def _problem(notes: Mapping[int, Note], world_size: int, timeout_s: float) -> str | None:
    """What is wrong with the notes that came; None if nothing is."""
    missing = [rank for rank in range(world_size) if rank not in notes]
    if missing:
        here = sorted({note.host for note in notes.values()})
        return (
            f"{_ranks(missing)} of {world_size}{_expected_hosts(missing, world_size)} did not answer within "
            f"{timeout_s:g} s (hosts that did: {_some(here)}); see whether they started there, with the same command "
            f"line, or give slow hosts more time with --join_timeout"
        )
    first = notes[0]
    for name in sorted({name for note in notes.values() for name in note.versions}):
        version = first.versions.get(name, "missing")
        others = [rank for rank, note in notes.items() if note.versions.get(name, "missing") != version]
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
    return " on " + _some(list(dict.fromkeys(hosts[rank // each] for rank in missing)))


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 4-7`` or ``ranks 1, 3, 5-7``."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {_some(shown)}"


def _some(words: Sequence[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


@contextmanager
def _quick_lookups() -> Iterator[None]:
    """Give up soon on names: the store looks up every rank that connects, one by one, and needs none of the names."""
    before = os.environ.get("RES_OPTIONS")
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("RES_OPTIONS", None)


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files: rank 0 has a connection to every other, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
