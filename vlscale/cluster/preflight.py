"""Every host is asked, all at once and with a time-out, before anything starts on any of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlscale.cluster.answers import Facts, text
from vlscale.cluster.exports import interface_problem
from vlscale.cluster.hostfile import Host
from vlscale.cluster.inputs import Needs
from vlscale.cluster.remote import CrowdedError, HostError, Place, Session

LOOK_S = 25.0
CONNECT_S = 5.0
ANSWER_S = 5.0
"""Together at most 45 seconds: looking, opening the port, connecting with its answer, closing the port."""

_PAUSE_S = (1.0, 4.0)
_POSIX_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "ksh93", "mksh", "ash", "busybox")


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
            facts[host.name] = await _ask(host.name, place, needs, hosts[0].name, sessions)
        except HostError as problem:
            return f"{host.name}: {problem}"
        return None

    answers = await asyncio.gather(*map(ask, hosts))
    found.problems += [answer for answer in answers if answer]
    told = [host for host in hosts if host.name in facts]
    for host in told:
        found.problems += [f"{host.name}: {line}" for line in _own_problems(host, facts[host.name], needs, place)]
    found.problems += list(_differences(told, facts))
    if hosts[0].name in facts:
        names = [host.name for host in told]
        candidates = [master] if master else _candidates(names, facts)
        found.master, problems = await _meet(sessions, names, candidates, port)
        found.problems += problems
    return found


async def _ask(host: str, place: Place, needs: Needs, first: str, sessions: dict[str, Session]) -> Facts:
    """Open a host's session and ask what it has; once more if too many connections came at once."""
    until = time.monotonic() + LOOK_S

    async def once() -> Facts:
        session = sessions[host] = await Session.open(host, place)
        answer = await session.ask(until - time.monotonic(), "look", paths=needs.paths, master=first)
        return Facts.parse(answer, needs.paths)

    try:
        return await once()
    except CrowdedError:
        await sessions[host].close()
        await asyncio.sleep(random.uniform(*_PAUSE_S))
    return await once()


def _candidates(names: Sequence[str], facts: Mapping[str, Facts]) -> list[str]:
    """Addresses of the first host; first those that its name in the hostfile means on the other hosts."""
    meant = frozenset[str]().union(*(facts[name].master for name in names[1:]))
    found = sorted(facts[names[0]].addresses(), key=lambda address: address not in meant)
    return found or ["127.0.0.1"]


def _own_problems(host: Host, facts: Facts, needs: Needs, place: Place) -> list[str]:
    problems = []
    if needs.gpus and host.slots[-1] >= len(facts.gpus):
        reason = f" ({facts.gpu_problem})" if facts.gpu_problem else ""
        problems.append(
            f"{host.line} asks for {host.slots[-1] + 1} slots, but it has {len(facts.gpus)} GPUs{reason}; lower slots, "
            f"or set DS_ACCELERATOR=cpu to train without GPUs"
        )
    if needs.posix_shell and facts.shell not in _POSIX_SHELLS:
        problems.append(f"its login shell is {facts.shell or 'not known'}, which cannot read the commands of "
                        f"DeepSpeed's pdsh launcher; use --launcher ssh")  # fmt: skip
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
        reason = text(str(opened.get("problem")))
        return "", [f"{first}: cannot listen on port {port} ({reason}); choose another with --master_port"]

    async def connect(name: str) -> dict[str, str] | HostError:
        request = {"addresses": candidates, "port": port, "token": opened["token"], "wait_s": CONNECT_S}
        try:
            failed = (await sessions[name].ask(CONNECT_S + ANSWER_S, "connect", **request))["failed"]
            return {candidate: text(failed[candidate]) for candidate in candidates}
        except (LookupError, TypeError):
            return HostError("its agent did not say whether it reaches the first host")
        except HostError as problem:
            return problem

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
