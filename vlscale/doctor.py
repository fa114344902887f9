"""``vlscale doctor``: what this machine has, and which kernels would run on it and why others not."""

from __future__ import annotations

import argparse
import json
import platform
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
    """Return versions, and for the CPU and every GPU its name and what would run there.

    ``devices`` holds ``device``, ``name``, ``ipot`` (the backend that ``auto`` picks), ``ipot_not`` (backend -> why it
    does not run) and ``attention``.
    """
    import torch

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [_device(device) for device in devices],
    }


def _device(device: Any) -> dict[str, Any]:
    import torch

    from vlscale.kernels.ipot import backends

    problems = {name: backends.problem(name, device) for name in backends.BACKENDS}
    if device.type == "cpu":
        name, attention = platform.processor() or platform.machine(), "padded, packed from 32 keys on (PyTorch)"
    else:
        capability = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, sm_{capability[0]}{capability[1]}"
        kernel = "FlashAttention" if capability >= (8, 0) else "memory-efficient"
        attention = f"packed ({kernel} inside PyTorch for half precision)"
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "ipot": backends.resolve_backend("auto", device),
        "ipot_not": {name: why for name, why in problems.items() if why},
        "attention": attention,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(found: dict[str, Any]) -> str:
    lines = [f"python {found['python']}, {found['platform']}, CUDA {found['cuda'] or 'none'}"]
    lines += [f"{name} {release or 'not installed'}" for name, release in found["packages"].items()]
    for device in found["devices"]:
        threads = f", {device['threads']} threads" if device["threads"] else ""
        lines += ["", f"{device['device']}: {device['name']}{threads}", f"  attention  {device['attention']}"]
        lines += [f"  IPOT       {device['ipot']}"]
        lines += [f"             not {name}: {why}" for name, why in device["ipot_not"].items()]
    if len(found["devices"]) == 1:
        lines += ["", "no GPU is visible to PyTorch"]
    return "\n".join(lines)
