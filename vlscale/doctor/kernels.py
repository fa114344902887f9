"""Facts of the kernels: which backends run on the CPU and on every GPU, where they come from, and why others not."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from vlscale.doctor.gpus import processor, version_of


def compiling() -> dict[str, str]:
    """Return ``compiler`` (C++), ``nvrtc`` (version) and ``cache`` (folder of what is compiled), or why not."""
    from vlscale.kernels.ipot import compiled_files, native, nvrtc

    return {
        "compiler": _or_why(lambda: shlex.join(native.compiler())),
        "nvrtc": _or_why(lambda: ".".join(map(str, nvrtc.version()))),
        "cache": _or_why(lambda: str(compiled_files.cache_folder())),
    }


def devices(gpus: int) -> tuple[dict[str, Any], ...]:
    """Return a record for the CPU and for each of ``gpus`` GPUs.

    It holds ``device``, ``name``, ``threads`` (None for a GPU), ``ipot`` (the backend that ``auto`` picks),
    ``ipot_from`` (where its kernels come from), ``ipot_not`` (backend -> why it does not run) and ``attention``.
    """
    import torch

    return tuple(_device(device) for device in [torch.device("cpu"), *(torch.device("cuda", i) for i in range(gpus))])


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
        return f"compiled at first use by Triton {version_of('triton')}, into a cache folder of its own"
    if backend == "cuda":
        if cuda_sources.is_prebuilt(architecture):
            return f"prebuilt for {architecture}, {nvrtc.PREBUILT}"
        return f"compiled at first use by NVRTC for {architecture}"
    return "operators of PyTorch"


def _device(device: Any) -> dict[str, Any]:
    import torch

    from vlscale.kernels.ipot import backends

    problems = {name: backends.problem(name, device) for name in backends.BACKENDS}
    chosen, architecture = backends.resolve_backend("auto", device), ""
    if device.type == "cpu":
        name, attention = processor(), "padded, packed from 32 keys on (PyTorch)"
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


def _or_why(look: Callable[[], str]) -> str:
    try:
        return look()
    except OSError as error:
        return f"none: {error}"
