"""Findings on the operating system: compiling, shared memory, leftovers, limits, folders, C library."""

from __future__ import annotations

import pwd
from collections.abc import Iterator

from vlscale.doctor.facts import Facts, Folder, Leftover
from vlscale.doctor.findings import GIB, MIB, Finding, Section, counted, duration, size, some
from vlscale.doctor.leftovers import removable
from vlscale.doctor.pins import LEAST_GLIBC, older

BUILDING, MEMORY, SYSTEM = Section("DeepSpeed's operators"), Section("shared memory"), Section("system")
CPU_BUFFER = 66 * MIB
"""What DeepSpeed maps per process on a CPU."""
GPU_SHARE = 32 * MIB
"""What NCCL and batches that travel between processes need per GPU, at least."""
GPU_EASY = 1 * GIB
"""What NVIDIA recommends for NCCL in a container."""
FEW_FILES, MANY_FILES = 1024, 4096
OTHER_FILES = 512
"""What rank 0 opens beside its connections to the other ranks."""
FEW_PROCESSES, MANY_PROCESSES = 256, 4096
LEAST_LOCKED = 64 * MIB
STALE_LOCK_S = 600.0
LITTLE_DISK, SOME_DISK = 64 * MIB, 1 * GIB
LITTLE_MEMORY = 2 * GIB


def building(facts: Facts) -> Iterator[Finding]:
    """Whether DeepSpeed's shared-memory operator, which it needs on a CPU at start, is there or would compile."""
    build, on_cpu = facts.building, facts.accelerator == "cpu"
    if build.compiler_error:
        yield BUILDING.bad(
            on_cpu, "compiler", f"{build.compiler} cannot compile a small extension: {build.compiler_error}",
            "install g++ with OpenMP and the headers of this Python (Debian: g++ and python3-dev), or set CXX",
        )  # fmt: skip
    else:
        yield BUILDING.ok("compiler", f"{build.compiler} compiles extensions (C++, OpenMP, Python.h)")
    if build.ninja:
        yield BUILDING.ok("ninja", build.ninja)
    else:
        yield BUILDING.bad(on_cpu, "ninja", "is not on PATH, and DeepSpeed compiles with it", "pip install ninja")
    if build.lock and build.lock_age_s > STALE_LOCK_S:
        yield BUILDING.failed(
            "lock", f"{build.lock} is {duration(build.lock_age_s)} old: a compilation was killed; every start waits",
            f"if nothing is being compiled: rm {build.lock}",
        )  # fmt: skip
    if build.operator:
        yield BUILDING.ok("CPU operator", f"compiled: {build.operator}")
    else:
        yield BUILDING.ok("CPU operator", "not compiled yet; the first start on a CPU takes half a minute longer")
    yield _toolkit(facts)


def _toolkit(facts: Facts) -> Finding:
    toolkit, cuda = facts.building.toolkit, facts.software.cuda
    if facts.accelerator == "cpu" or not toolkit:
        return BUILDING.ok("CUDA toolkit", f"{toolkit or 'none'}; vlscale needs none (PyTorch's fused AdamW, NVRTC)")
    if cuda and toolkit.partition(".")[0] != cuda.partition(".")[0]:
        return BUILDING.warning(
            "CUDA toolkit", f"{toolkit}, but torch is built with CUDA {cuda}: DeepSpeed will not compile operators",
            f"only if you want DeepSpeed's own optimisers or offloading: CUDA_HOME=/path/to/cuda-{cuda}",
        )  # fmt: skip
    return BUILDING.ok("CUDA toolkit", f"{toolkit} (torch: {cuda})")


def memory(facts: Facts) -> Iterator[Finding]:
    """Room in /dev/shm and in memory."""
    machine, on_cpu = facts.machine, facts.accelerator == "cpu"
    cure = "mount -o remount,size=50% /dev/shm; in a container --shm-size=8g or --ipc=host"
    if machine.shm_total is None or machine.shm_free is None:
        yield MEMORY.failed("/dev/shm", "is not there", f"mount -t tmpfs tmpfs /dev/shm; {cure.partition('; ')[2]}")
    else:
        needed = machine.processes * (CPU_BUFFER if on_cpu else GPU_SHARE)
        easy = needed if on_cpu else max(needed, GPU_EASY)
        what = f"on {'a CPU' if on_cpu else 'GPUs'}{' (assumed)' if machine.assumed else ''}"
        text = (
            f"{size(machine.shm_free)} free of {size(machine.shm_total)}; {machine.processes} processes {what} need "
            f"{size(needed)}"
        )
        if any(removable(item, machine.user) for item in machine.leftovers):
            cure = f"vlscale doctor --clean; {cure}"
        if machine.shm_free < easy:
            yield MEMORY.bad(machine.shm_free < needed, "/dev/shm", text, cure)
        else:
            yield MEMORY.ok("/dev/shm", text)
    if machine.memory_available is not None:
        text = (
            f"{size(machine.memory_available)} available; a loader's slots come from it and not from /dev/shm, up to "
            f"4 GiB per process"
        )
        if machine.memory_available < LITTLE_MEMORY:
            yield MEMORY.warning("memory", text, "end other programs, or ask for more memory (Slurm: --mem)")
        else:
            yield MEMORY.ok("memory", text)
    yield from _leftovers(facts)


def _leftovers(facts: Facts) -> Iterator[Finding]:
    machine = facts.machine
    stale = [item for item in machine.leftovers if not item.in_use]
    mine = [item for item in stale if removable(item, machine.user)]
    others = [item for item in stale if item.owner != machine.user]
    if mine:
        clean = "vlscale doctor --clean"
        if machine.unseen:
            clean += f", after these have ended, which hide what they use: {some(machine.unseen)}"
        yield MEMORY.warning("leftovers", f"{_sum(mine)}: no process has them open", clean)
    if others:
        names = some(sorted({_user(item.owner) for item in others}))
        yield MEMORY.warning(
            "leftovers of others", f"{_sum(others)}, of {names}: no process that can be seen has them open",
            f"let {names} run vlscale doctor --clean here",
        )  # fmt: skip
    if not mine and not others:
        used = len(machine.leftovers) - len(stale)
        yield MEMORY.ok("leftovers", f"none; {counted(used, 'file')} in use" if used else "none")


def _sum(items: list[Leftover]) -> str:
    kinds = " and ".join(sorted({item.kind for item in items}))
    oldest = max(item.age_s for item in items)
    room = size(sum(item.bytes for item in items))
    paths = some([item.path for item in items], 2)
    return f"{counted(len(items), 'file')} of {kinds}, {room}, up to {duration(oldest)} old ({paths})"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def system(facts: Facts) -> Iterator[Finding]:
    """C library, limits and folders."""
    glibc = facts.machine.glibc
    if glibc is None or older(glibc, LEAST_GLIBC):
        yield SYSTEM.failed(
            "glibc", f"{glibc or 'another C library'}, but current wheels of PyTorch need {LEAST_GLIBC}",
            "run inside a container: launch/slurm/ has a definition for Apptainer",
        )  # fmt: skip
    else:
        yield SYSTEM.ok("glibc", glibc)
    limits = facts.machine.limits
    if "open files" in limits:
        yield _limit("open files", limits["open files"], FEW_FILES, MANY_FILES, "-n", "nofile")
    if "processes" in limits:
        yield _limit("processes", limits["processes"], FEW_PROCESSES, MANY_PROCESSES, "-u", "nproc")
    if "locked memory" in limits:
        yield _locked(facts, limits["locked memory"][0])
    for folder in facts.machine.folders:
        yield _folder(folder)


def _limit(name: str, limit: tuple[int | None, int | None], few: int, many: int, option: str, key: str) -> Finding:
    soft, hard = limit
    if soft is None or soft >= many:
        return SYSTEM.ok(name, "unlimited" if soft is None else f"at most {soft:,}")
    text = f"at most {soft:,}; runs with many shards and workers want {many:,}"
    return SYSTEM.bad(soft < few, name, text, _raising(soft, hard, many, option, key))


def files_of_rank_0(limit: tuple[int | None, int | None], ranks: int) -> Iterator[Finding]:
    """Whether rank 0 may open a connection to every other rank, beside its shards and libraries."""
    (soft, hard), needed = limit, ranks + OTHER_FILES
    if soft is not None and soft < needed:
        yield SYSTEM.failed(
            "open files of rank 0", f"at most {soft:,}, and with {ranks:,} ranks connected it needs {needed:,}",
            _raising(soft, hard, needed, "-n", "nofile"),
        )  # fmt: skip


def _raising(soft: int, hard: int | None, wanted: int, option: str, key: str) -> str:
    cure = f"{key} in /etc/security/limits.conf (as root), then log in again"
    if hard is None or hard > soft:
        reachable = max(65536, wanted) if hard is None else min(hard, max(65536, wanted))
        cure = f"ulimit {option} {reachable}" + (f"; if that is not enough, {cure}" if reachable < wanted else "")
    return cure


def _locked(facts: Facts, soft: int | None) -> Finding:
    text = "unlimited" if soft is None else f"at most {size(soft)}"
    if soft is None or not any(port.state == "ACTIVE" for port in facts.network.infiniband):
        return SYSTEM.ok("locked memory", text)
    return SYSTEM.bad(
        soft < LEAST_LOCKED, "locked memory", f"{text}, and NCCL locks its buffers for InfiniBand",
        "memlock unlimited in /etc/security/limits.conf (as root); Slurm: LimitMEMLOCK=infinity for slurmd; in a "
        "container --ulimit memlock=-1",
    )  # fmt: skip


def _folder(folder: Folder) -> Finding:
    cure = f"set {folder.variable} to a folder of your own with room"
    if folder.problem:
        return SYSTEM.failed(folder.role, f"{folder.path}: {folder.problem}".removeprefix(": "), cure)
    if folder.free_bytes is not None and folder.free_bytes < SOME_DISK:
        text = f"{folder.path}: only {size(folder.free_bytes)} free"
        return SYSTEM.bad(folder.free_bytes < LITTLE_DISK, folder.role, text, cure)
    return SYSTEM.ok(folder.role, f"{folder.path}, {size(folder.free_bytes or 0)} free")
