"""Facts of the network: interfaces, InfiniBand, the host's name, and the variables that steer NCCL and gloo."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from vlscale.doctor.facts import InfinibandPort, Interface, Network

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT",
    "NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_CROSS_NIC", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_IB_DISABLE",
    "NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_IB_TC", "NCCL_IB_TIMEOUT", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS",
    "NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_NET_PLUGIN", "NCCL_NSOCKS_PERTHREAD", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL",
    "NCCL_PROTO", "NCCL_SHM_DISABLE", "NCCL_SOCKET_FAMILY", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_NTHREADS",
    "NCCL_TOPO_FILE", "OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT",
    "TP_SOCKET_IFNAME",
)  # fmt: skip
"""Only these are ever shown: others may hold secrets."""
LONGEST = 200
"""Characters of a value that are shown."""
_NET = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")
_MOST = 64
_IS_UP = 1
_GET_ADDRESS = 0x8915
_RESOLVING_S = 3.0


def network() -> Network:
    """Look at the network of this host."""
    # As vlscale.train.roll_call.host_name, which cannot be imported where PyTorch is broken.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    addresses, found = addresses_of(host), interfaces()
    own = outside((*addresses, *(interface.address for interface in found if interface.up)))
    return Network(host, addresses, found, infiniband(), variables(), own, lookup_seconds(own) if own else 0.0)


def variables() -> dict[str, str]:
    """The named variables that are set."""
    return {name: os.environ[name][:LONGEST] for name in VARIABLES if name in os.environ}


def addresses_of(name: str) -> tuple[str, ...]:
    """What a name resolves to; nothing if that takes longer than 3 s."""
    found: list[str] = []

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))

    _resolved(resolve)
    return tuple(dict.fromkeys(found))


def outside(addresses: Iterable[str]) -> str:
    """The first address that other hosts may see; empty if there is none."""
    return next((one for one in addresses if one and not is_loopback(one)), "")


def is_loopback(address: str) -> bool:
    """Whether an address leads back to its own host; False for what is none."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def lookup_seconds(address: str) -> float:
    """How long the resolver looks for the name of an address, whether it finds one or not; 3 s at most."""

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            socket.getnameinfo((address, 0), socket.NI_NUMERICSERV)

    return _resolved(resolve)


def _resolved(resolve: Callable[[], None]) -> float:
    """Ask the resolver, which has no time-out of its own; returns the seconds it took."""
    start = time.perf_counter()
    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(_RESOLVING_S)
    return time.perf_counter() - start


def interfaces(folder: Path = _NET) -> tuple[Interface, ...]:
    """All network interfaces."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if (entry / "flags").exists())[:_MOST]
    except OSError:
        return ()
    return tuple(Interface(name, _is_up(folder / name), _address(name)) for name in names)


def infiniband(folder: Path = _INFINIBAND) -> tuple[InfinibandPort, ...]:
    """All ports of InfiniBand and RoCE devices."""
    try:
        ports = sorted(folder.glob("*/ports/*"))[:_MOST]
    except OSError:
        return ()
    return tuple(
        InfinibandPort(
            device=port.parent.parent.name,
            port=port.name,
            state=_line(port / "state").rpartition(":")[2].strip(),
            link=_line(port / "link_layer"),
            rate=_line(port / "rate"),
        )
        for port in ports
    )


def _is_up(interface: Path) -> bool:
    flags = _line(interface / "flags")
    return bool(int(flags, 16) & _IS_UP) if flags else False


def _address(name: str) -> str:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()[:LONGEST]
    except OSError:
        return ""
