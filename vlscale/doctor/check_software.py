"""Findings on versions, on GPUs and what PyTorch was built for, and on kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vlscale.doctor.facts import Facts, Gpu
from vlscale.doctor.findings import GIB, Finding, Section, some
from vlscale.doctor.pins import (
    LEAST,
    LEAST_PYTHON,
    NEEDED,
    OPTIONAL,
    PACKAGES,
    V100,
    files_for,
    least_driver,
    older,
    pinned,
    release,
    serves,
)

VERSIONS, GPUS, KERNELS = Section("versions"), Section("GPUs"), Section("kernels")
BUSY_BYTES = 1 * GIB
RELOAD = (
    "reboot, or reload the driver's modules; in a container: --nv (Apptainer) or --gpus all (Docker); in Slurm: --gpus"
)
"""The cure of a driver that was renewed under running programs, or that a container lacks."""


def install(file: str = V100, what: str = "torch torchvision") -> str:
    """The command that installs by a file of constraints."""
    return f"pip install -c {file} {what}"


def versions(facts: Facts) -> Iterator[Finding]:
    """Python and the packages, against what vlscale needs and what it pins."""
    software = facts.software
    python, text = software.python, f"{software.python}, {software.platform}"
    if older(python, LEAST_PYTHON):
        yield VERSIONS.failed("python", text, f"install Python {LEAST_PYTHON} or newer, and vlscale with it")
    else:
        yield VERSIONS.ok("python", text)
    if software.torch_error:
        yield VERSIONS.failed("torch", f"cannot be imported: {software.torch_error}", install())
    files = files_for(gpu.arch for gpu in facts.gpus if gpu.arch)
    for name in PACKAGES:
        if not (name == "torch" and software.torch_error):
            yield _package(name, software.packages.get(name), files)
    yield from _conflicts(facts)


def _package(name: str, version: str | None, files: list[str]) -> Finding:
    tested = {file: pin for file, pin in pinned(name).items() if file in files}
    file = next(iter(tested), V100)
    cure = install(file, "torch torchvision" if name in ("torch", "torchvision", "triton") else f"{name}")
    if version is None:
        if name in NEEDED:
            return VERSIONS.failed(name, f"is not installed; {NEEDED[name]} needs it", cure)
        return VERSIONS.warning(name, f"is not installed; needed for {OPTIONAL[name]}", cure)
    if name in LEAST and older(version, LEAST[name]):
        return VERSIONS.failed(name, f"{version}, but vlscale needs {LEAST[name]} or newer", cure)
    if tested and release(version) not in {release(pin) for pin in tested.values()}:
        known = " or ".join(f"{pin} ({file})" for file, pin in tested.items())
        return VERSIONS.warning(name, f"{version}; vlscale pins {known}", cure)
    return VERSIONS.ok(name, version)


def _conflicts(facts: Facts) -> Iterator[Finding]:
    packages, software = facts.software.packages, facts.software
    torch, streaming = packages.get("torch") or "", packages.get("mosaicml-streaming")
    if torch and older(torch, "2.10"):
        yield VERSIONS.warning(
            "torch.load", f"torch {torch} may corrupt memory when it reads a hostile checkpoint (CVE-2026-24747)",
            f"torch 2.10 or newer: {install()}; until then read only checkpoints of your own",
        )  # fmt: skip
    for name, bound in (("transformers", "5"), ("numpy", "2.2")):
        version = packages.get(name)
        if version and streaming and release(streaming)[:2] == (0, 13) and not older(version, bound):
            yield VERSIONS.warning(
                f"streaming and {name}", f"mosaicml-streaming {streaming} asks for {name} < {bound}, here is {version}",
                install(V100, name),
            )  # fmt: skip
    if any(gpu.arch == "sm_70" for gpu in facts.gpus):
        yield from _volta(software.cudnn, software.nccl)


def _volta(cudnn: str | None, nccl: str | None) -> Iterator[Finding]:
    if cudnn and not older(cudnn, "9.11"):
        yield VERSIONS.failed(
            "cuDNN", f"{cudnn} has no kernels for sm_70 any more; 9.10 was the last", f"{install()} brings 9.10"
        )
    if nccl and not older(nccl, "2.28"):
        yield VERSIONS.warning(
            "NCCL on V100", f"{nccl}; crashes at start have been reported for 2.28.9 (NVIDIA/nccl issue 2159)",
            f"use the NCCL of the wheel, 2.27.5: {install()}",
        )  # fmt: skip


def gpus(facts: Facts) -> Iterator[Finding]:
    """The driver, the GPUs, and whether this PyTorch has kernels for them."""
    seen, cuda = facts.graphics, facts.software.cuda
    if seen.driver is not None:
        needed = least_driver(cuda) if cuda else None
        if needed and older(seen.driver, needed):
            yield GPUS.failed(
                "driver", f"{seen.driver} is too old for CUDA {cuda}, which this torch is built with",
                f"driver {needed} or newer, or a torch for an older CUDA: {install()}",
            )  # fmt: skip
        else:
            yield GPUS.ok("driver", seen.driver)
    if not (facts.gpus or seen.driver_error or seen.device_files):
        yield GPUS.ok("GPUs", "none; training runs on the CPU")
    elif not seen.torch_gpus:
        yield _unseen(facts)
    elif seen.driver_error:
        yield GPUS.warning("nvidia-smi", f"{seen.driver_error}, though PyTorch sees {len(seen.torch_gpus)}", RELOAD)
    for (name, arch, memory), count in Counter((gpu.name, gpu.arch, gpu.memory_bytes) for gpu in facts.gpus).items():
        yield _architecture(facts, f"{count} x {name}, {memory / GIB:.1f} GiB", arch)
    yield from _taken(seen.driver_gpus)


def _unseen(facts: Facts) -> Finding:
    seen, variables = facts.graphics, facts.network.variables
    serious = variables.get("DS_ACCELERATOR") != "cpu"  # otherwise they are not wanted
    if seen.driver_error and not seen.driver_gpus:
        text = f"nvidia-smi says {seen.driver_error!r}, PyTorch sees none"
        return GPUS.bad(serious, "GPUs", text, f"{RELOAD}; on a host that has none: export DS_ACCELERATOR=cpu")
    sign = f"the driver shows {len(seen.driver_gpus)}" if seen.driver_gpus else f"/dev has {some(seen.device_files)}"
    text, hidden = f"{sign}, PyTorch sees none", variables.get("CUDA_VISIBLE_DEVICES")
    if facts.software.torch_error:
        return GPUS.bad(serious, "GPUs", f"{text}: it cannot be imported", install())
    if facts.software.cuda is None:
        return GPUS.bad(serious, "GPUs", f"{text}: this torch is built without CUDA", install())
    if hidden in ("", "-1"):
        return GPUS.warning("GPUs", f"{text}: CUDA_VISIBLE_DEVICES={hidden!r} hides them", "unset CUDA_VISIBLE_DEVICES")
    return GPUS.bad(serious, "GPUs", text, f'{RELOAD}; why: python -c "import torch; torch.zeros(1).cuda()"')


def _architecture(facts: Facts, what: str, arch: str) -> Finding:
    software = facts.software
    if not arch or not software.arch_list:
        return GPUS.ok("architecture", f"{what}, {arch or 'architecture unknown'}")
    if serves(software.arch_list, arch):
        return GPUS.ok("architecture", f"{what}, {arch}: torch has kernels for it")
    fitting = " or ".join(install(file) for file in files_for([arch]))
    last = "; torch 2.10.0 is the last default wheel with sm_70" if arch == "sm_70" else ""
    return GPUS.failed(
        "architecture",
        f"{what}, is {arch}, but torch {software.packages.get('torch')} has kernels for "
        f"{' '.join(software.arch_list)} only: 'no kernel image is available' at the first step",
        f"{fitting}{last}",
    )


def _taken(seen: tuple[Gpu, ...]) -> Iterator[Finding]:
    cure = "as root: nvidia-smi -c DEFAULT"
    for mode, serious, meaning in (("Prohibited", True, "nothing may compute on"),
                                   ("Exclusive_Process", False, "one process only may use")):  # fmt: skip
        which = [str(index) for index, gpu in enumerate(seen) if gpu.mode == mode]
        if which:
            yield GPUS.bad(serious, "compute mode", f"{mode}: {meaning} each of GPU {some(which)}", cure)
    busy = [
        f"{index} ({gpu.used_bytes / GIB:.1f} GiB)"
        for index, gpu in enumerate(seen)
        if gpu.used_bytes and gpu.used_bytes > BUSY_BYTES
    ]
    if busy:
        yield GPUS.warning(
            "GPUs in use", f"memory of GPU {some(busy)} is taken by others",
            "see nvidia-smi; wait, or choose others with CUDA_VISIBLE_DEVICES or deepspeed --include",
        )  # fmt: skip


def kernels(facts: Facts) -> Iterator[Finding]:
    """The backends that were chosen on each device, and why."""
    compiled = facts.compiling
    if not compiled.get("nvrtc", "none: ").startswith("none: "):
        yield KERNELS.ok("NVRTC", compiled["nvrtc"])
    for device in facts.devices:
        where, error = device["device"], device.get("error")
        if error:
            yield KERNELS.failed(f"kernels on {where}", str(error), "mend what is said about GPUs and versions first")
            continue
        yield KERNELS.ok(f"attention on {where}", device["attention"])
        why = "; ".join(f"not {name}: {reason}" for name, reason in device["ipot_not"].items())
        text = f"{device['ipot']}: {device['ipot_from']}" + (f" ({why})" if why else "")
        if device["ipot"] == "reference":
            yield KERNELS.warning(
                f"IPOT on {where}", f"{text}; several times slower",
                "install g++ or set CXX, and let VLSCALE_CACHE name a folder of your own; on GPUs see the reasons",
            )  # fmt: skip
        else:
            yield KERNELS.ok(f"IPOT on {where}", text)
