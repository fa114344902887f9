"""Facts of the GPUs and of PyTorch: what the driver shows, what PyTorch sees of it, and what PyTorch was built for."""

from __future__ import annotations

import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vlscale
from vlscale.doctor.facts import Gpu, Graphics, Software
from vlscale.doctor.findings import MIB
from vlscale.doctor.pins import PACKAGES
from vlscale.doctor.system import ask

_FIELDS = ("name", "memory.total", "memory.used", "compute_mode", "driver_version", "compute_cap")
_MOST = 64
_DEVICES = Path("/dev")


def software() -> Software:
    """Look at the versions; PyTorch may be missing or broken."""
    packages = {name: version_of(name) for name in PACKAGES}
    common = (platform.python_version(), platform.platform(), vlscale.__version__, packages, _commit())
    try:
        import torch
    except Exception as error:  # a broken installation raises anything
        return Software(*common, torch_error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    flags = torch._C._cuda_getArchFlags() if torch.version.cuda else None  # get_arch_list() is empty without a GPU
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else None
    return Software(
        *common,
        cuda=torch.version.cuda,
        cudnn=f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else None,
        nccl=".".join(map(str, nccl[:3])) if nccl else None,
        arch_list=tuple((flags or "").split()),
    )


def graphics() -> Graphics:
    """Look for GPUs, by way of the driver and of PyTorch."""
    driver, seen, error = _driver_gpus()
    by_torch: tuple[Gpu, ...] = ()
    with suppress(Exception):  # PyTorch is broken, or its CUDA: told as "sees none"
        by_torch = _torch_gpus()
    files = sorted(str(path) for path in _DEVICES.glob("nvidia[0-9]*"))
    return Graphics(by_torch, seen, driver, error, tuple(files[:_MOST]))


def processor() -> str:
    """Name of the kind of CPU."""
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(min(torch.cuda.device_count(), _MOST)):
        known = torch.cuda.get_device_properties(index)
        found.append(Gpu(known.name, f"sm_{known.major}{known.minor}", known.total_memory))
    return tuple(found)


def _driver_gpus() -> tuple[str | None, tuple[Gpu, ...], str]:
    """The driver's version, its GPUs, and what nvidia-smi complained of."""
    if shutil.which("nvidia-smi") is None:
        return None, (), ""
    status, said = _ask_smi(_FIELDS)
    if status > 0 and f'"{_FIELDS[-1]}"' in said:  # old drivers do not know it, and name it
        status, said = _ask_smi(_FIELDS[:-1])
    driver, found = parse_smi(said)
    if status == 0 and found:
        return driver, found, ""
    complaints = (line.strip() for line in said.splitlines() if line.strip() and _words(line) is None)
    return driver, found, next(complaints, f"exit status {status}" if status else "")[:200]


def _ask_smi(fields: tuple[str, ...]) -> tuple[int, str]:
    return ask(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])


def _words(line: str) -> list[str] | None:
    """The fields of a GPU's line; None if it is another line."""
    words = [word.strip() for word in line.split(",")]
    return words if len(words) in (len(_FIELDS), len(_FIELDS) - 1) else None


def parse_smi(said: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """Read what nvidia-smi prints: the driver's version, and the GPUs. Lines that are none are left out."""
    driver, found = None, []
    for line in said.splitlines()[:_MOST]:
        words = _words(line)
        if words is None or not words[1].isdecimal():
            continue
        name, total, used, mode, driver, *capability = words
        arch = f"sm_{capability[0].replace('.', '')}" if capability else ""
        found.append(Gpu(name, arch, int(total) * MIB, int(used) * MIB if used.isdecimal() else None, mode))
    return driver, tuple(found)


def _commit() -> str | None:
    try:
        from vlscale.train.run_folder import commit
    except Exception:  # PyTorch is broken
        return None
    return commit()
