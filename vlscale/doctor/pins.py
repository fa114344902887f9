"""The versions that vlscale pins, and which GPU a wheel of PyTorch serves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

V100 = "launch/env/v100.txt"
HOPPER = "launch/env/hopper.txt"

PINS: dict[str, dict[str, str]] = {
    V100: {
        "torch": "2.10.0", "torchvision": "0.25.0", "triton": "3.6.0", "deepspeed": "0.19.8",
        "mosaicml-streaming": "0.13.0", "transformers": "4.57.6", "numpy": "2.1.3",
    },
    HOPPER: {
        "torch": "2.11.0", "torchvision": "0.26.0", "triton": "3.6.0", "deepspeed": "0.19.8",
        "mosaicml-streaming": "0.13.0", "transformers": "4.57.6", "numpy": "2.1.3",
    },
}  # fmt: skip
"""File of constraints -> package -> version; a test compares them with the files."""

LEAST = {"torch": "2.7", "numpy": "2.1", "deepspeed": "0.19.8", "mosaicml-streaming": "0.13.0"}
"""What setup.py asks for."""
LEAST_PYTHON = "3.10"
LEAST_GLIBC = "2.28"
"""Of PyTorch's wheels (manylinux_2_28)."""
LEAST_DRIVER = {"12": "525.60.13", "13": "580"}
"""Major version of CUDA -> oldest driver that runs it."""

PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "mosaicml-streaming", "transformers", "numpy")
NEEDED = {"torch": "everything", "numpy": "everything", "deepspeed": "training"}
"""Package -> what does not work at all without it."""
OPTIONAL = {
    "torchvision": "the demo's corpus and region extraction",
    "triton": "IPOT's Triton backend",
    "mosaicml-streaming": "writing datasets and reading remote ones",
    "transformers": "vlscale.hf alone",
}
"""Package -> what does not work without it."""


def release(version: str) -> tuple[int, ...]:
    """``2.10.0+cu128`` -> (2, 10, 0); empty if it does not begin with a number."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def older(version: str, least: str) -> bool:
    """Whether a version comes before another."""
    return release(version) < release(least)


def pinned(package: str) -> dict[str, str]:
    """File of constraints -> the version that it pins."""
    return {file: versions[package] for file, versions in PINS.items() if package in versions}


def files_for(architectures: Iterable[str]) -> list[str]:
    """The files of constraints whose PyTorch serves all these GPUs; that of CUDA 13 is for sm_80 and newer."""
    oldest = min((number_of(name) for name in architectures), default=70)
    return [file for file in PINS if oldest >= 80 or file == V100]


def number_of(architecture: str) -> int:
    """``sm_70``, ``compute_90a`` -> 70, 90; 0 if there is no number."""
    found = re.search(r"_(\d+)", architecture)
    return int(found[1]) if found else 0


def serves(arch_list: Iterable[str], architecture: str) -> bool:
    """Whether a wheel's kernels run on a GPU.

    Machine code (``sm_80``) runs on its own major version from its minor version on; PTX (``compute_90``) is compiled
    by the driver for whatever is newer. A letter (``sm_90a``) binds it to that one.
    """
    gpu = number_of(architecture)
    for built in arch_list:
        number = number_of(built)
        if built.endswith(("a", "f")):
            if number == gpu:
                return True
        elif built.startswith("compute_"):
            if number <= gpu:
                return True
        elif number // 10 == gpu // 10 and number <= gpu:
            return True
    return False


def least_driver(cuda: str) -> str | None:
    """The oldest driver for a version of CUDA; None if it is not known."""
    return LEAST_DRIVER.get(cuda.partition(".")[0])


def read_constraints(text: str) -> Mapping[str, str]:
    """Package -> version, of a constraints file; markers are left out."""
    pairs = (line.partition(";")[0].strip().split("==") for line in text.splitlines() if "==" in line.partition(";")[0])
    return {name: version for name, version in pairs}
