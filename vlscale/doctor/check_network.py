"""Findings on the network: what this host's name is to others, the interfaces that are chosen, InfiniBand."""

from __future__ import annotations

from collections.abc import Iterator

from vlscale.doctor.facts import Facts, Network
from vlscale.doctor.findings import Finding, Section, some
from vlscale.doctor.network import is_loopback

NETWORK = Section("network")
SLOW_LOOKUP_S = 0.5
_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs of this host do not talk directly",
    "NCCL_SHM_DISABLE": "processes of this host do not use shared memory",
}


def network(facts: Facts) -> Iterator[Finding]:
    """NCCL, names, interfaces, InfiniBand, variables."""
    found = facts.network
    yield NETWORK.ok("NCCL", facts.software.nccl or "none; processes talk through gloo")
    yield _host(found)
    if found.own_address:
        yield _lookup(found)
    usable = [interface for interface in found.interfaces if interface.up and not is_loopback(interface.address)]
    up = [f"{interface.name} {interface.address}".strip() for interface in usable]
    if up:
        yield NETWORK.ok("interfaces", some(up, 8))
    else:
        yield NETWORK.warning(
            "interfaces", "none is up but the loopback: this host can only run alone", "bring the network up (ip link)"
        )
    yield from _chosen(found)
    yield from _infiniband(found)
    for name, meaning in _SLOW.items():
        if found.variables.get(name) == "1":
            yield NETWORK.warning(name, f"is 1: {meaning}, which is slower", f"unset {name}, unless NCCL fails without")
    shown = [f"{name}={value}" for name, value in sorted(found.variables.items())]
    yield NETWORK.ok("variables", " ".join(shown) or "none is set")


def _host(found: Network) -> Finding:
    cure = (
        "for runs on several hosts: give it its own address in DNS or /etc/hosts, or pass an address that others reach "
        "as --master_addr"
    )
    if not found.addresses:
        return NETWORK.warning("name of this host", f"{found.host} resolves to nothing", cure)
    if all(is_loopback(address) for address in found.addresses):
        text = f"{found.host} is {some(found.addresses)}, which is no address for others"
        return NETWORK.warning("name of this host", text, cure)
    return NETWORK.ok("name of this host", f"{found.host} is {some(found.addresses)}")


def _lookup(found: Network) -> Finding:
    text = f"{found.own_address} in {found.lookup_s:.2f} s"
    if found.lookup_s <= SLOW_LOOKUP_S:
        return NETWORK.ok("name of its address", text)
    return NETWORK.warning(
        "name of its address", f"{text}: rank 0 looks up every rank that connects, one after the other",
        "give all hosts PTR records in DNS, or lines in /etc/hosts of each",
    )  # fmt: skip


def _chosen(found: Network) -> Iterator[Finding]:
    """Interfaces that are named by variables: NCCL reads the beginnings of names, gloo whole ones."""
    up = [interface.name for interface in found.interfaces if interface.up]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
        value = found.variables.get(variable, "")
        if not value:
            continue
        chosen = _nccl_chooses(value, up) if variable.startswith("NCCL") else _named(value, up)
        if chosen:
            yield NETWORK.ok(variable, f"{value}: {some(chosen)}")
        else:
            yield NETWORK.failed(
                variable, f"is {value!r}, and no interface that is up answers to it",
                f"unset it, or name one of {some(up, 8) or 'none'}",
            )  # fmt: skip


def _nccl_chooses(value: str, up: list[str]) -> list[str]:
    """``eth,ib``: those that begin so; ``=eth0``: exactly; ``^docker``: all but those; ``^=docker0``."""
    without = value.startswith("^")
    rest = value.removeprefix("^")
    exact = rest.startswith("=")
    words = [word for word in rest.removeprefix("=").split(",") if word]
    hits = [name for name in up if any(name == word if exact else name.startswith(word) for word in words)]
    return [name for name in up if name not in hits] if without else hits


def _named(value: str, up: list[str]) -> list[str]:
    words = [word for word in value.split(",") if word]
    return words if all(word in up for word in words) else []


def _infiniband(found: Network) -> Iterator[Finding]:
    if not found.infiniband:
        yield NETWORK.ok("InfiniBand", "no devices; several hosts talk through TCP")
        return
    active = [port for port in found.infiniband if port.state == "ACTIVE"]
    shown = [f"{port.device}:{port.port} {port.link} {port.rate}".strip() for port in active or found.infiniband]
    if not active:
        yield NETWORK.warning(
            "InfiniBand", f"no port is active ({some(shown)}), so several hosts talk through TCP",
            "see ibstat; cables, subnet manager",
        )  # fmt: skip
    elif found.variables.get("NCCL_IB_DISABLE") == "1":
        yield NETWORK.warning("InfiniBand", f"{some(shown)} are active, but NCCL_IB_DISABLE=1", "unset NCCL_IB_DISABLE")
    else:
        yield NETWORK.ok("InfiniBand", some(shown))
    yield from _adapters(found)


def _adapters(found: Network) -> Iterator[Finding]:
    """``NCCL_IB_HCA``: ``mlx5`` (beginnings), ``=mlx5_0:1`` (exactly), ``^`` excludes."""
    value = found.variables.get("NCCL_IB_HCA", "")
    if not value or value.startswith("^"):
        return
    words = [word.partition(":")[0] for word in value.removeprefix("=").split(",") if word]
    devices = sorted({port.device for port in found.infiniband})
    missing = [
        word for word in words if not any(d == word if value.startswith("=") else d.startswith(word) for d in devices)
    ]
    if missing:
        yield NETWORK.failed(
            "NCCL_IB_HCA", f"names {some(missing)}, and this host has {some(devices, 8)}", "correct it, or unset it"
        )
