"""Facts of the operating system: C library, limits, shared memory, folders, and what things are compiled with."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from vlscale.doctor.facts import Building, Folder, Machine
from vlscale.doctor.leftovers import scan

SHM = Path("/dev/shm")
SECONDS = 20.0
"""How long a program that is asked may take."""
_OUTPUT = 20_000
_LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "processes": resource.RLIMIT_NPROC,
}
_EXTENSION = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
"""Needs what DeepSpeed's operator needs: a C++ compiler that knows OpenMP, and Python's headers."""


def ask(command: list[str], stdin: str = "") -> tuple[int, str]:
    """Run a program without a shell; its exit status (-1 if it did not start or end) and what it said, cut short."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, errors="replace", timeout=SECONDS,
            env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, f"{command[0]} did not end within {SECONDS:g} s"
    except (OSError, ValueError) as error:
        return -1, f"{command[0]}: {error}"
    return done.returncode, (done.stdout + done.stderr)[:_OUTPUT]


def machine(gpus: int, processes: int | None = None) -> Machine:
    """Look at the operating system.

    Args:
        gpus: where nobody tells otherwise, one process is assumed on each, and two where there is none.
        processes: of this run on this host; None leaves it to the launcher's variable.
    """
    told = processes or _told_processes()
    leftovers, unseen = scan(SHM, Path(tempfile.gettempdir()))
    total, free = _room(SHM)
    return Machine(
        glibc=_glibc(),
        limits={name: _limit(which) for name, which in _LIMITS.items()},
        shm_total=total,
        shm_free=free,
        memory_available=_memory_available(),
        processes=told or max(gpus, 2),
        assumed=told is None,
        user=os.getuid(),
        folders=_folders(),
        leftovers=tuple(leftovers),
        unseen=tuple(unseen),
    )


def building() -> Building:
    """Look for what things are compiled with, and try it."""
    command = compiler()
    folder = extensions_folder() / "deepspeed_shm_comm"
    operator, lock = folder / "deepspeed_shm_comm.so", folder / "lock"
    return Building(
        compiler=shlex.join(command),
        compiler_error=_compiler_error(command),
        ninja=_ninja(),
        operator=str(operator) if operator.is_file() else "",
        lock=str(lock) if lock.exists() else "",
        lock_age_s=_age(lock),
        toolkit=_toolkit(),
    )


def compiler() -> list[str]:
    """The command that PyTorch builds extensions with: ``$CXX``, else ``c++``, else ``g++``."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        named = [os.environ["CXX"]]
    return named or ["c++" if shutil.which("c++") else "g++"]


def extensions_folder() -> Path:
    """Where PyTorch compiles extensions, DeepSpeed's operators too (as ``torch.utils.cpp_extension`` decides)."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    try:
        from torch.version import cuda
    except Exception:  # PyTorch is broken, which is told elsewhere
        cuda = None
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    build = f"{python}_{'cpu' if cuda is None else 'cu' + cuda.replace('.', '')}"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "torch_extensions" / build


def _compiler_error(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on PATH"
    headers = sysconfig.get_path("include")
    status, said = ask([*command, "-fsyntax-only", "-fopenmp", f"-I{headers}", "-x", "c++", "-"], _EXTENSION)
    if status == 0:
        return ""
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines() or [f"exit status {status}"]
    return lines[0][:300]


def _ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")  # training puts it on PATH by itself
    return shutil.which("ninja") or (str(beside) if beside.is_file() else "")


def _toolkit() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = [Path(home) / "bin/nvcc"] if home else []
    candidates = [*map(str, beside), shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    program = next((name for name in candidates if name and os.access(name, os.X_OK)), None)
    if program is None:
        return ""
    found = re.search(r"release (\d+\.\d+)", ask([program, "--version"])[1])
    return found[1] if found else ""


def _glibc() -> str | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    return version if name == "glibc" else None


def _limit(which: int) -> tuple[int | None, int | None]:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return soft, hard


def _room(folder: Path) -> tuple[int | None, int | None]:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None, None
    return found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail


def _memory_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _told_processes() -> int | None:
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdecimal() and 0 < int(told) < 1 << 12 else None


def _folders() -> tuple[Folder, ...]:
    temporary = _folder("temporary files", "TMPDIR", Path(tempfile.gettempdir()))
    extensions = _folder("compiled operators", "TORCH_EXTENSIONS_DIR", extensions_folder())
    try:
        from vlscale.kernels.ipot.compiled_files import cache_folder
    except Exception:  # PyTorch is broken, and no kernels will be compiled
        return temporary, extensions
    try:
        kernels = _folder("compiled kernels", "VLSCALE_CACHE", cache_folder())
    except OSError as error:
        kernels = Folder("compiled kernels", "VLSCALE_CACHE", "", None, str(error))
    return temporary, extensions, kernels


def _folder(role: str, variable: str, path: Path) -> Folder:
    """Look at a folder, or at the nearest one above it that exists: that is where it will be made."""
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    problem = ""
    if not there.is_dir():
        problem = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} cannot be written to"
    return Folder(role, variable, str(path), _room(there)[1], problem)


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0
