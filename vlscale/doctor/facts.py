"""The facts that findings are made from: plain records, so that any machine can be described, also a broken one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A GPU, as PyTorch or as the driver sees it.

    Attributes:
        arch: ``sm_70`` etc.; empty if the driver is too old to tell.
        memory_bytes: in all.
        used_bytes: taken by whomever; None if unknown.
        mode: compute mode: ``Default``, ``Exclusive_Process``, ``Prohibited``; empty if unknown.
    """

    name: str
    arch: str
    memory_bytes: int
    used_bytes: int | None = None
    mode: str = ""


@dataclass(frozen=True)
class Software:
    """Versions, and what PyTorch was built for.

    Attributes:
        packages: name -> version; None if it is not installed.
        torch_error: why PyTorch cannot be imported; None if it can.
        cuda: version that PyTorch was built with; None for a build without GPUs.
        cudnn, nccl: versions; None where there is none.
        arch_list: GPU architectures that this PyTorch holds kernels for.
        commit: of the source tree; None outside one.
    """

    python: str
    platform: str
    vlscale: str
    packages: Mapping[str, str | None]
    commit: str | None = None
    torch_error: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    nccl: str | None = None
    arch_list: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graphics:
    """GPUs.

    Attributes:
        torch_gpus: those that PyTorch sees.
        driver_gpus: those that nvidia-smi shows.
        driver: version; None without a driver, or with one that does not answer.
        driver_error: what nvidia-smi complained of; empty if it answered, or is not there.
        device_files: such as ``/dev/nvidia0``: the kernel knows GPUs.
    """

    torch_gpus: tuple[Gpu, ...] = ()
    driver_gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    driver_error: str = ""
    device_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interface:
    """A network interface; ``address`` is its IPv4 address, empty if it has none."""

    name: str
    up: bool
    address: str = ""


@dataclass(frozen=True)
class InfinibandPort:
    """A port under /sys/class/infiniband; ``state`` such as ``ACTIVE``, ``link`` ``InfiniBand`` or ``Ethernet``."""

    device: str
    port: str
    state: str
    link: str
    rate: str = ""


@dataclass(frozen=True)
class Network:
    """Interfaces, InfiniBand, the host's name, and the variables that steer NCCL and gloo.

    Attributes:
        host: name of this host.
        addresses: what the host's name resolves to.
        variables: only those named in :mod:`vlscale.doctor.network`.
        own_address: one that other hosts would see; empty if there is none but loopback.
        lookup_s: how long the name of that address takes to be found, or to be found missing.
    """

    host: str
    addresses: tuple[str, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    infiniband: tuple[InfinibandPort, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    own_address: str = ""
    lookup_s: float = 0.0


@dataclass(frozen=True)
class Folder:
    """A folder that runs write to.

    Attributes:
        role: what for.
        variable: of the environment, which names another.
        free_bytes: None if it cannot be told.
        problem: why it cannot be written to; empty if it can.
    """

    role: str
    variable: str
    path: str
    free_bytes: int | None
    problem: str = ""


@dataclass(frozen=True)
class Building:
    """What DeepSpeed and the kernels are compiled with.

    Attributes:
        compiler: command of the C++ compiler that PyTorch's extensions are built with.
        compiler_error: what it said about a small extension; empty if it compiled it.
        ninja: its path, empty if there is none.
        operator: DeepSpeed's compiled shared-memory operator; empty if it has yet to be compiled.
        lock: a lock of that folder, and ``lock_age_s`` its age; empty if there is none.
        toolkit: version of the CUDA toolkit; empty if there is none.
    """

    compiler: str = ""
    compiler_error: str = ""
    ninja: str = ""
    operator: str = ""
    lock: str = ""
    lock_age_s: float = 0.0
    toolkit: str = ""


@dataclass(frozen=True)
class Leftover:
    """A file in shared memory, or a lock beside it, of a known kind.

    Attributes:
        kind: ``streaming``, ``DeepSpeed``, ``NCCL`` or ``PyTorch``.
        group: files of one group are used, or are stale, together.
        inode: tells whether it is still the same file.
        owner: user id.
        in_use: whether some process has it, or another of its group, open.
    """

    path: str
    kind: str
    group: str
    inode: int
    owner: int
    bytes: int
    age_s: float
    in_use: bool


@dataclass(frozen=True)
class Machine:
    """The operating system's side.

    Attributes:
        glibc: version; None with another C library.
        limits: ``open files``, ``locked memory``, ``processes`` -> (soft, hard), None for unlimited.
        shm_total, shm_free: bytes of /dev/shm; None if there is none.
        memory_available: bytes.
        processes: training processes expected on this host; assumed: no launcher told their number.
        user: id of the user who asks.
        unseen: processes of this user that cannot be looked into, so that what they use is unknown.
    """

    glibc: str | None
    limits: Mapping[str, tuple[int | None, int | None]]
    shm_total: int | None = None
    shm_free: int | None = None
    memory_available: int | None = None
    processes: int = 1
    assumed: bool = False
    user: int = 0
    folders: tuple[Folder, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """All that is known about this host.

    Attributes:
        accelerator: ``cpu`` or ``cuda``: what training would use.
        compiling, devices: see :mod:`vlscale.doctor.kernels`.
    """

    accelerator: str
    software: Software
    graphics: Graphics
    network: Network
    building: Building
    machine: Machine
    compiling: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Mapping[str, Any], ...] = ()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs as PyTorch sees them, else as the driver does."""
        return self.graphics.torch_gpus or self.graphics.driver_gpus
