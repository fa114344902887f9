"""Facts of the GPUs and of PyTorch: what the driver shows, what PyTorch sees of it, and what PyTorch was built for."""

from __future__ import annotations

import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import vlscale
from vlscale.doctor.facts import Gpu, Graphics, Software
from vlscale.doctor.findings import MIB
from vlscale.doctor.pins import PACKAGES
from vlscale.doctor.system import ask

_FIELDS = ("name", "memory.total", "memory.used", "compute_mode", "driver_version", "compute_cap")
_MOST = 64


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
    driver, seen = _driver_gpus()
    try:
        return Graphics(_torch_gpus(), seen, driver)
    except Exception:  # PyTorch is broken, or its CUDA: told as "sees none"
        return Graphics((), seen, driver)


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


def _driver_gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    if shutil.which("nvidia-smi") is None:
        return None, ()
    for fields in (_FIELDS, _FIELDS[:-1]):  # old drivers do not know compute_cap
        status, said = ask(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
        if status == 0:
            return parse_smi(said)
    return None, ()


def parse_smi(said: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """Read what nvidia-smi prints: the driver's version, and the GPUs. Lines that are none are left out."""
    driver, found = None, []
    for line in said.splitlines()[:_MOST]:
        words = [word.strip() for word in line.split(",")]
        if len(words) not in (len(_FIELDS), len(_FIELDS) - 1) or not words[1].isdecimal():
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
