"""What agents answer, taken apart strictly: an answer comes from another machine, and may be anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice
from typing import Any

from vlscale.cluster.remote import HostError

MAX_TEXT = 200
MAX_ENTRIES = 1024
MAX_ADDRESSES = 16


@dataclass(frozen=True)
class Facts:
    """What a host has; see :func:`vlscale.cluster.facts.look`."""

    machine: str
    versions: Mapping[str, str]
    source: str
    gpus: tuple[str, ...]
    gpu_problem: str
    interfaces: Mapping[str, tuple[IPv4Address | IPv6Address, ...]]
    master: frozenset[str]
    shell: str
    paths: Mapping[str, Mapping[str, str]]

    @classmethod
    def parse(cls, answer: Mapping[str, Any], paths: Iterable[str]) -> Facts:
        """Take an answer apart.

        Args:
            answer: from the agent.
            paths: those that it was asked for; others are not looked at.

        Raises:
            HostError: something is missing, or of another type.
        """
        try:
            return cls(
                machine=text(answer["machine"]),
                versions={text(name): text(version) for name, version in _pairs(answer["versions"])},
                source=text(answer["source"]),
                gpus=_texts(answer["gpus"]),
                gpu_problem=text(answer["gpu_problem"]),
                interfaces={text(name): _addresses(held) for name, held in _pairs(answer["interfaces"])},
                master=frozenset(map(str, _addresses(answer["master"]))),
                shell=text(answer["shell"]),
                paths={path: _state(answer["paths"][path]) for path in paths},
            )
        except (LookupError, TypeError, AttributeError, ValueError):
            raise HostError("its agent speaks another language; install the same vlscale on every host") from None

    def addresses(self) -> list[str]:
        """Addresses that other hosts might reach, IPv4 first."""
        held = [one for addresses in self.interfaces.values() for one in addresses]
        usable = [one for one in held if not one.is_loopback and not one.is_link_local]
        return [str(one) for one in sorted(usable, key=lambda one: one.version)][:MAX_ADDRESSES]


def text(value: object) -> str:
    """Return text as it may be printed: one short line without control characters.

    Raises:
        TypeError: it is no text.
    """
    if not isinstance(value, str):
        raise TypeError
    return "".join(letter if letter.isprintable() else "?" for letter in value[:MAX_TEXT])


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    return list(islice(value.items(), MAX_ENTRIES))


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError
    return tuple(map(text, value[:MAX_ENTRIES]))


def _addresses(value: object) -> tuple[IPv4Address | IPv6Address, ...]:
    return tuple(map(ip_address, _texts(value)))


def _state(value: Any) -> dict[str, str]:
    """Why a path cannot be used, or a hash of what it holds."""
    return {"problem": text(value["problem"])} if "problem" in value else {"hash": text(value["hash"])}
