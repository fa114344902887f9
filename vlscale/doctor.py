"""``vlscale doctor``: what this machine has, and which kernels would run on it and why others not."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "triton", "deepspeed", "mosaicml-streaming", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Look and tell; 0, whatever is found."""
    found = examine()
    print(json.dumps(found, indent=2) if arguments.json else _text(found))
    return 0


def examine() -> dict[str, Any]:
    """Return versions, what kernels are compiled with, and for the CPU and every GPU its name and what would run there.

    ``compiling`` holds ``compiler`` (C++), ``nvrtc`` (its version) and ``cache`` (the folder of what is compiled), or
    why there is none. ``devices`` holds ``device``, ``name``, ``ipot`` (the backend that ``auto`` picks), ``ipot_from``
    (where its kernels come from), ``ipot_not`` (backend -> why it does not run) and ``attention``.
    """
    import torch

    from vlscale.kernels.ipot import compiled_files, native, nvrtc

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "compiling": {
            "compiler": _or_why(lambda: shlex.join(native.compiler())),
            "nvrtc": _or_why(lambda: ".".join(map(str, nvrtc.version()))),
            "cache": _or_why(lambda: str(compiled_files.cache_folder())),
        },
        "devices": [_device(device) for device in devices],
    }


def _device(device: Any) -> dict[str, Any]:
    import torch

    from vlscale.kernels.ipot import backends

    problems = {name: backends.problem(name, device) for name in backends.BACKENDS}
    chosen, architecture = backends.resolve_backend("auto", device), ""
    if device.type == "cpu":
        name, attention = platform.processor() or platform.machine(), "padded, packed from 32 keys on (PyTorch)"
    else:
        capability = torch.cuda.get_device_capability(device)
        architecture = f"sm_{capability[0]}{capability[1]}"
        name = f"{torch.cuda.get_device_name(device)}, {architecture}"
        attention = "packed (inside PyTorch: FlashAttention for half precision, memory-efficient for float32)"
        if capability < (8, 0):
            attention = "packed (memory-efficient inside PyTorch for float16 and float32), padded for bfloat16"
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "ipot": chosen,
        "ipot_from": kernels_of(chosen, architecture),
        "ipot_not": {name: why for name, why in problems.items() if why},
        "attention": attention,
    }


def kernels_of(backend: str, architecture: str) -> str:
    """Where the kernels of an IPOT backend come from: installed ready made, or compiled at first use, and by what.

    Args:
        backend: one that runs here.
        architecture: of the GPU that it runs on, ``sm_70`` etc.; empty for a CPU.
    """
    from vlscale.kernels.ipot import cuda_sources, native, nvrtc

    if backend == "cpu":
        return f"compiled at first use, {native.load()[1]}"
    if backend == "triton":
        return f"compiled at first use by Triton {_version('triton')}, into a cache folder of its own"
    if backend == "cuda":
        if cuda_sources.is_prebuilt(architecture):
            return f"prebuilt for {architecture}, {nvrtc.PREBUILT}"
        return f"compiled at first use by NVRTC for {architecture}"
    return "operators of PyTorch"


def _or_why(look: Callable[[], str]) -> str:
    try:
        return look()
    except OSError as error:
        return f"none: {error}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(found: dict[str, Any]) -> str:
    lines = [f"python {found['python']}, {found['platform']}, CUDA {found['cuda'] or 'none'}"]
    lines += [f"{name} {release or 'not installed'}" for name, release in found["packages"].items()]
    names = (("C++ compiler", "compiler"), ("NVRTC", "nvrtc"), ("compiled kernels in", "cache"))
    lines += ["", *(f"{name} {found['compiling'][key]}" for name, key in names)]
    for device in found["devices"]:
        threads = f", {device['threads']} threads" if device["threads"] else ""
        lines += ["", f"{device['device']}: {device['name']}{threads}", f"  attention  {device['attention']}"]
        lines += [f"  IPOT       {device['ipot']}: {device['ipot_from']}"]
        lines += [f"             not {name}: {why}" for name, why in device["ipot_not"].items()]
    if len(found["devices"]) == 1:
        lines += ["", "no GPU is visible to PyTorch"]
    return "\n".join(lines)
