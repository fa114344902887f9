"""Which network interface gloo talks to the other processes through: the one with the route to ``MASTER_ADDR``.

Gloo otherwise takes the address that the host's own name resolves to, which on many systems is a loopback address that
no other host can reach. Interfaces have different names on different hosts, so each process has to choose for itself.
NCCL looks at the interfaces themselves, prefers the fast ones, and is left alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address

GLOO = "GLOO_SOCKET_IFNAME"

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses kept for documentation: the route to them is the default route. Nothing is sent."""


def choose_interface() -> str | None:
    """Set ``GLOO_SOCKET_IFNAME`` to the interface with the route to ``MASTER_ADDR``; what the user has set stays.

    Call it after the launcher's variables are there and before the process group is made.

    Returns:
        The name of the interface that gloo will use, or None where it is left to gloo: no ``MASTER_ADDR``, or no
        interface of this host has a route there.
    """
    if os.environ.get(GLOO):
        return os.environ[GLOO]
    master = os.environ.get("MASTER_ADDR")
    source = source_address(master) if master else None
    name = interface_of(source, _addresses()) if source else None
    if name is not None:
        os.environ[GLOO] = name
    return name


def source_address(master: str) -> str | None:
    """Return this host's address on the way to ``master`` (a name or an address), or None if there is no way.

    Where ``master`` is this host's own name and resolves to a loopback address, it is the address on the default route.
    """
    found = _routed(master)
    if found is None or not ip_address(found).is_loopback or _means_loopback(master):
        return found
    return next(filter(None, map(_routed, _ELSEWHERE)), None)


def interface_of(address: str, addresses: Mapping[str, list[str]]) -> str | None:
    """Return the interface that holds ``address``; ``addresses`` is interface -> its addresses."""
    wanted = ip_address(address)
    for name, held in addresses.items():
        if any(ip_address(one) == wanted for one in held):
            return name
    return None


def _routed(target: str) -> str | None:
    """The address that the kernel would send from; connecting a datagram socket sends nothing."""
    try:
        known = socket.getaddrinfo(target.strip("[]"), 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for family, *_, where in known:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0]).split("%")[0]
    return None


def _means_loopback(master: str) -> bool:
    try:
        return ip_address(master).is_loopback
    except ValueError:
        return master == "localhost" or master.startswith("localhost.")


def _addresses() -> dict[str, list[str]]:
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address.split("%")[0] for one in held if one.family in families]
        for name, held in psutil.net_if_addrs().items()
    }
