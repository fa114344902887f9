"""Every host is asked, all at once and with a time-out, before anything starts on any of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from vlscale.cluster.exports import interface_problem
from vlscale.cluster.hostfile import Host
from vlscale.cluster.inputs import Needs
from vlscale.cluster.remote import HostError, Place, Session

LOOK_S = 28.0
CONNECT_S = 5.0
ANSWER_S = 5.0
"""Together at most 43 seconds: looking, opening the port, connecting with its answer."""

MAX_ADDRESSES = 16


@dataclass(frozen=True)
class Facts:
    """What an agent told, taken apart strictly; see :func:`vlscale.cluster.facts.look`."""

    machine: str
    versions: Mapping[str, str]
    source: str
    gpus: tuple[str, ...]
    interfaces: Mapping[str, tuple[str, ...]]
    paths: Mapping[str, Mapping[str, str]]

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Facts:
        """Raises :class:`HostError` for anything but the expected types."""
        try:
            return cls(
                _text(answer["machine"]),
                {_text(name): _text(version) for name, version in answer["versions"].items()},
                _text(answer["source"]),
                tuple(map(_text, answer["gpus"])),
                {_text(name): tuple(map(_text, held)) for name, held in answer["interfaces"].items()},
                {path: {_text(key): _text(value) for key, value in state.items()}
                 for path, state in answer["paths"].items()},
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError):
            raise HostError("its agent speaks another language; install the same vlscale on every host") from None

    def addresses(self) -> list[str]:
        """Addresses that other hosts might reach, IPv4 first."""
        held = [ip_address(one) for addresses in self.interfaces.values() for one in addresses]
        usable = [one for one in held if not one.is_loopback and not one.is_link_local]
        return [str(one) for one in sorted(usable, key=lambda one: one.version)][:MAX_ADDRESSES]


@dataclass
class Checked:
    """What the preflight found.

    Attributes:
        problems: one line each, naming the host.
        master: address of the first host that all others reach; empty if there is a problem.
    """

    problems: list[str] = field(default_factory=list)
    master: str = ""


async def check(
    hosts: Sequence[Host],
    place: Place,
    needs: Needs,
    master: str,
    port: int,
    sessions: dict[str, Session],
) -> Checked:
    """Ask all hosts.

    Args:
        hosts: the first is the master.
        place: project, environment, Python.
        needs: what must be there on every host.
        master: address of the first host, from the user; empty: found out.
        port: that rank 0 will listen on.
        sessions: filled with host -> its session; the caller closes them.
    """
    found = Checked()
    facts: dict[str, Facts] = {}

    async def ask(host: Host) -> str | None:
        try:
            session = sessions[host.name] = await Session.open(host.name, place)
            facts[host.name] = Facts.parse(await session.ask(LOOK_S, "look", paths=needs.paths))
        except HostError as problem:
            return f"{host.name}: {problem}"
        return None

    answers = await asyncio.gather(*map(ask, hosts))
    found.problems += [answer for answer in answers if answer]
    told = [host for host in hosts if host.name in facts]
    for host in told:
        found.problems += [f"{host.name}: {text}" for text in _own_problems(host, facts[host.name], needs.gpus, place)]
    found.problems += list(_differences(told, facts))
    if hosts[0].name in facts:
        names = [host.name for host in told]
        candidates = [master] if master else facts[names[0]].addresses() or ["127.0.0.1"]
        found.master, problems = await _meet(sessions, names, candidates, port)
        found.problems += problems
    return found


def _own_problems(host: Host, facts: Facts, needs_gpus: bool, place: Place) -> list[str]:
    problems = []
    if needs_gpus and host.slots[-1] >= len(facts.gpus):
        problems.append(
            f"{host.line} asks for {host.slots[-1] + 1} slots, but it has {len(facts.gpus)} GPUs; lower slots, or set "
            f"DS_ACCELERATOR=cpu to train without GPUs"
        )
    problems += [
        f"{path} {state['problem']} there; every host needs it at the same path"
        for path, state in facts.paths.items()
        if "problem" in state
    ]
    problems += interface_problem(place.exports, sorted(facts.interfaces))
    return problems


def _differences(hosts: Sequence[Host], facts: Mapping[str, Facts]) -> list[str]:
    """What differs from the first host."""
    if not hosts:
        return []
    problems = []
    first, one = hosts[0].name, facts[hosts[0].name]
    machines = {one.machine: first}
    for host in hosts[1:]:
        name, other = host.name, facts[host.name]
        twin = machines.setdefault(other.machine, name)
        if twin != name:
            problems.append(f"{name}: is the same machine as {twin}; keep one of the two names in the hostfile")
        differing = [key for key in one.versions if other.versions.get(key) != one.versions[key]]
        problems += [
            f"{name}: {key} {other.versions.get(key, 'missing')}, but {first} has {one.versions[key]}; install "
            f"the same on every host"
            for key in differing
        ]
        if not differing and other.source != one.source:
            problems.append(f"{name}: its files of vlscale differ from those of {first}; check out the same commit, "
                            f"with the same changes")  # fmt: skip
        problems += [
            f"{name}: {path} differs from that of {first}; copy it again"
            for path, state in other.paths.items()
            if state.get("hash", "") != one.paths.get(path, {}).get("hash", "")
            and "problem" not in state
            and "problem" not in one.paths.get(path, {})
        ]
    return problems


async def _meet(
    sessions: Mapping[str, Session], names: Sequence[str], candidates: list[str], port: int
) -> tuple[str, list[str]]:
    """Let all hosts connect to the first, where it will listen; returns the address that all reach, and problems."""
    first = names[0]
    try:
        opened = await sessions[first].ask(ANSWER_S, "listen", port=port)
    except HostError as problem:
        return "", [f"{first}: {problem}"]
    if "token" not in opened:
        reason = str(opened.get("problem"))[:100]
        return "", [f"{first}: cannot listen on port {port} ({reason}); choose another with --master_port"]

    async def connect(name: str) -> dict[str, str] | HostError:
        try:
            answer = await sessions[name].ask(
                CONNECT_S + ANSWER_S,
                "connect",
                addresses=candidates,
                port=port,
                token=opened["token"],
                wait_s=CONNECT_S,
            )
            failed = answer.get("failed")
            return {key: _text(value) for key, value in failed.items()} if isinstance(failed, dict) else {}
        except (HostError, TypeError) as problem:
            return problem if isinstance(problem, HostError) else {}

    # The first host tries an address only if the user chose it: it must be one of its own.
    answers = dict(zip(names, await asyncio.gather(*map(connect, names)), strict=True))
    try:
        await sessions[first].ask(ANSWER_S, "close")
    except HostError as problem:
        return "", [f"{first}: {problem}"]
    problems = [f"{name}: {answer}" for name, answer in answers.items() if isinstance(answer, HostError)]
    reached = {name: answer for name, answer in answers.items() if not isinstance(answer, HostError)}
    for candidate in candidates:
        if all(answer.get(candidate, "no answer") == "" for answer in reached.values()):
            return candidate, problems
    return "", problems + _unreached(reached, first, candidates, port)


def _unreached(answers: Mapping[str, Mapping[str, str]], first: str, candidates: Sequence[str], port: int) -> list[str]:
    problems = []
    for name, answer in answers.items():
        if all(answer.get(candidate, "no answer") for candidate in candidates):
            tried = ", ".join(f"{one}: {answer.get(one, 'no answer')[:100]}" for one in candidates[:4])
            problems.append(f"{name}: cannot connect to {first} on port {port} ({tried}); open the port in the "
                            f"firewall, or give --master_addr")  # fmt: skip
    if not problems:
        problems.append(f"{first}: none of its addresses is reached by all hosts; give --master_addr")
    return problems


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return "".join(letter if letter.isprintable() else "?" for letter in value)
