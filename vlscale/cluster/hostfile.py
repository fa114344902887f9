"""The hostfile: ``host slots=N`` per line, in the syntax of DeepSpeed's launcher, read strictly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlscale.errors import VlscaleError, nearest

MAX_BYTES = 1 << 20
MAX_HOSTS = 1024
MAX_SLOTS = 1024

_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")
_SLOTS = re.compile(r"slots=([0-9]{1,9})")
_SYNTAX = "expected `host slots=N`"


@dataclass(frozen=True)
class Host:
    """A host and the slots (GPUs) of it that are used, each by one process.

    Attributes:
        name: as ssh knows it.
        slots: numbers of GPUs, increasing, from 0.
        line: where it stands, ``FILE:LINE``.
    """

    name: str
    slots: tuple[int, ...]
    line: str


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read a hostfile; the first host will be the master.

    Raises:
        VlscaleError: it cannot be read, a line has another syntax, a host stands twice, or there is none.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise VlscaleError(f"hostfile {path}: cannot be read ({error.strerror}); give one with --hostfile") from None
    if len(raw) > MAX_BYTES:
        raise VlscaleError(f"hostfile {path}: larger than {MAX_BYTES} bytes; {_SYNTAX} per line")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(raw.decode("utf-8", errors="replace").split("\n"), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        host = _host(words, where)
        if host.name in hosts:
            raise VlscaleError(
                f"{where}: host {host.name} stands twice, first in {hosts[host.name].line}; give it one line with all "
                f"its slots"
            )
        hosts[host.name] = host
        if len(hosts) > MAX_HOSTS:
            raise VlscaleError(f"{where}: more than {MAX_HOSTS} hosts")
    if not hosts:
        raise VlscaleError(f"hostfile {path}: no host; {_SYNTAX} per line")
    return tuple(hosts.values())


def _host(words: list[str], where: str) -> Host:
    name, *rest = words
    if not _NAME.fullmatch(name):
        cure = (
            "put the user into ~/.ssh/config" if "@" in name else "letters, digits, '.', '-' and '_', as ssh knows it"
        )
        raise VlscaleError(f"{where}: {_shown(name)} is no host name ({cure}); {_SYNTAX}")
    if len(rest) != 1:
        found = f"found {_shown(rest[1])} after it" if rest else "found no slots"
        raise VlscaleError(f"{where}: host {name}: {found}; {_SYNTAX}")
    match = _SLOTS.fullmatch(rest[0])
    if not match:
        raise VlscaleError(f"{where}: host {name}: found {_shown(rest[0])}; {_SYNTAX}, with N from 1 to {MAX_SLOTS}")
    slots = int(match[1])
    if not 1 <= slots <= MAX_SLOTS:
        raise VlscaleError(
            f"{where}: host {name}: slots={slots}; expected 1 to {MAX_SLOTS}; remove a host without GPUs"
        )
    return Host(name, tuple(range(slots)), where)


def select(hosts: tuple[Host, ...], include: str, exclude: str) -> tuple[Host, ...]:
    """Return the hosts and slots that ``--include`` or ``--exclude`` leave, in the order of the hostfile.

    Args:
        hosts: all.
        include: ``NAME[:SLOT[,SLOT ...]][@NAME...]``, what to use; empty for all.
        exclude: the same syntax, what not to use.

    Raises:
        VlscaleError: both are given, the syntax is another, a host or slot is not in the hostfile, or nothing is left.
    """
    if include and exclude:
        raise VlscaleError("--include and --exclude exclude each other; give one")
    if not include and not exclude:
        return hosts
    option = "--include" if include else "--exclude"
    named = _filter(include or exclude, hosts, option)
    left = []
    for host in hosts:
        chosen = named.get(host.name, frozenset())
        slots = tuple(slot for slot in host.slots if (slot in chosen) == bool(include))
        if slots:
            left.append(Host(host.name, slots, host.line))
    if not left:
        raise VlscaleError(f"{option} {_shown(include or exclude)}: no slot is left")
    return tuple(left)


def _filter(text: str, hosts: tuple[Host, ...], option: str) -> dict[str, frozenset[int]]:
    """Host -> slots that a filter names."""
    known = {host.name: host for host in hosts}
    found: dict[str, frozenset[int]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.partition(":")
        if name not in known:
            raise VlscaleError(f"{option}: host {_shown(name)} is not in the hostfile{nearest(name, known)}")
        slots = set(known[name].slots)
        if colon:
            words = numbers.split(",")
            if not all(word.isascii() and word.isdecimal() and len(word) < 9 for word in words):
                raise VlscaleError(f"{option}: {_shown(part)}: expected NAME:SLOT,SLOT with slots from 0")
            slots = {int(word) for word in words}
            missing = sorted(slots - set(known[name].slots))
            if missing:
                raise VlscaleError(f"{option}: host {name} has no slot {missing[0]}; {known[name].line} gives it "
                                   f"{len(known[name].slots)}, from 0")  # fmt: skip
        found[name] = found.get(name, frozenset()) | slots
    return found


def _shown(text: str) -> str:
    """Text from a file as it may be printed: escaped and short."""
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")
