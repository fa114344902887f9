"""Compiling and loading ``ipot_cpu.cpp``: with the machine's own C++ compiler, once, into a cache folder.

The library has a C interface and is called through ctypes, so neither PyTorch's headers nor ninja are needed, and a new
PyTorch does not make it stale. It is compiled for the processor at hand; another processor gets another file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

from vlscale.kernels.ipot.compiled_files import cache_folder, written

SOURCE = Path(__file__).with_name("ipot_cpu.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")
"""For the processor at hand; compilers know one of them, or none."""
SECONDS = 300

_log = logging.getLogger(__name__)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled library and where it lies, or None and why there is none; says so once in the log."""
    try:
        path = _build()
        library = ctypes.CDLL(str(path))
    except OSError as error:
        why = str(error).replace("\n", " ")[:300]
        _log.warning("IPOT runs in plain PyTorch, several times slower on a CPU: %s", why)
        return None, why
    return library, str(path)


def _build() -> Path:
    """Return the library's path, compiled now if it was not yet.

    Raises:
        OSError: there is no compiler, it fails, or there is no folder for the library.
    """
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler found (looked for {named or ', '.join(COMPILERS)}); install g++ or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), compiler, version, " ".join(FLAGS), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = cache_folder() / f"ipot-{key}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    with written(target) as path:
        try:
            for native in (*NATIVE, None):
                command = [compiler, *FLAGS, *filter(None, [native]), str(SOURCE), "-o", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
                if done.returncode == 0:
                    return
        except subprocess.TimeoutExpired:
            raise OSError(f"{compiler} needs more than {SECONDS} seconds for {SOURCE.name}") from None
        message = next(filter(None, done.stderr.splitlines()), f"exit status {done.returncode}")
        raise OSError(f"{compiler} cannot compile {SOURCE.name}: {message}")


def _processor() -> str:
    """What the compiler's choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
