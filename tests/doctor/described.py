"""Machines in words: a healthy one with GPUs, one without, and how to change a fact of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlscale.doctor.facts import (
    Building,
    Facts,
    Folder,
    Gpu,
    Graphics,
    InfinibandPort,
    Interface,
    Machine,
    Network,
    Software,
)
from vlscale.doctor.findings import GIB
from vlscale.doctor.pins import PINS, V100

V100_32 = Gpu("Tesla V100-SXM2-32GB", "sm_70", 32 * GIB, 3 << 20, "Default")
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 80 * GIB, 3 << 20, "Default")

SOFTWARE = Software(
    "3.11.7", "Linux-6.1", "0.1.0", dict(PINS[V100]), "1234abcd", None, "12.8", "9.10.2", "2.27.5",
    ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
)  # fmt: skip
NETWORK = Network(
    "node-1", ("10.0.0.1",), (Interface("eth0", True, "10.0.0.1"), Interface("lo", True, "127.0.0.1")),
    (InfinibandPort("mlx5_0", "1", "ACTIVE", "InfiniBand", "100 Gb/sec (4X EDR)"),), {"NCCL_DEBUG": "WARN"},
)  # fmt: skip
MACHINE = Machine(
    glibc="2.36",
    limits={"open files": (65536, 65536), "locked memory": (None, None), "processes": (None, None)},
    shm_total=64 * GIB,
    shm_free=60 * GIB,
    memory_available=200 * GIB,
    processes=8,
    user=1000,
    folders=(Folder("temporary files", "TMPDIR", "/tmp", 100 * GIB),),
)
DEVICE = {
    "device": "cuda:0", "name": "Tesla V100", "threads": None, "ipot": "cuda", "ipot_from": "compiled at first use",
    "ipot_not": {"triton": "it needs sm_80"}, "attention": "packed",
}  # fmt: skip

HEALTHY = Facts(
    "cuda",
    SOFTWARE,
    Graphics((V100_32,) * 8, (V100_32,) * 8, "535.104.05"),
    NETWORK,
    Building("c++", "", "/usr/bin/ninja", "/home/me/op.so", "", 0.0, "12.8"),
    MACHINE,
    {"compiler": "/usr/bin/c++", "nvrtc": "12.8", "cache": "/home/me/.cache/vlscale/kernels"},
    (DEVICE,),
)
"""A node with 8 V100s where nothing is to be said."""
WITHOUT_GPUS = replace(HEALTHY, accelerator="cpu", graphics=Graphics(), devices=(DEVICE | {"device": "cpu"},))


def changed(facts: Facts, part: str, **values: Any) -> Facts:
    """A machine with some facts changed: ``changed(HEALTHY, "machine", glibc="2.17")``."""
    return replace(facts, **{part: replace(getattr(facts, part), **values)})


def with_gpus(gpu: Gpu, count: int = 8, **driver: Any) -> Facts:
    """The healthy machine with other GPUs."""
    return changed(HEALTHY, "graphics", torch_gpus=(gpu,) * count, driver_gpus=(gpu,) * count, **driver)


def with_packages(facts: Facts, **packages: str | None) -> Facts:
    """A machine with other versions; ``mosaicml_streaming`` stands for ``mosaicml-streaming``."""
    named = {name.replace("_", "-"): version for name, version in packages.items()}
    return changed(facts, "software", packages=dict(facts.software.packages) | named)
