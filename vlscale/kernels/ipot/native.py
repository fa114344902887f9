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
import shlex
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
SYMBOL = "vlscale_ipot_forward_float"
"""One of the functions that the library must have."""

_log = logging.getLogger(__name__)


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the compiled library and where it lies, or None and why there is none; says so once in the log."""
    try:
        library, path = _built()
    except OSError as error:
        why = str(error).replace("\n", " ")[:300]
        _log.warning("IPOT runs in plain PyTorch, several times slower on a CPU: %s", why)
        return None, why
    return library, str(path)


def compiler() -> list[str]:
    """The command of the C++ compiler: what ``$CXX`` says, arguments included, else the first that is installed.

    Raises:
        OSError: there is none.
    """
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise OSError(f"CXX is {named!r}, which is no command ({error}); set it to g++, for example") from None
    for program, *arguments in [words] if words else [[name] for name in COMPILERS]:
        if path := shutil.which(program):
            return [path, *arguments]
    raise OSError(f"no C++ compiler found (looked for {words[0] if words else ', '.join(COMPILERS)}); "
                  "install g++ or set CXX")  # fmt: skip


def _built() -> tuple[ctypes.CDLL, Path]:
    """Return the library and its path, compiled now if it was not yet.

    Raises:
        OSError: there is no compiler, it fails, or there is no folder for the library.
    """
    command = compiler()
    version = _run([*command, "--version"], 60).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), shlex.join(command), version, " ".join(FLAGS), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = cache_folder() / f"ipot-{key}.so"
    try:
        return _opened(target), target
    except OSError:  # not there yet, or spoilt
        _compile(command, target)
    return _opened(target), target


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if not hasattr(library, SYMBOL):
        raise OSError(f"{path} has no {SYMBOL}")
    return library


def _compile(command: list[str], target: Path) -> None:
    with written(target) as path:
        for native in (*NATIVE, None):
            done = _run([*command, *FLAGS, *filter(None, [native]), str(SOURCE), "-o", str(path)], SECONDS)
            if done.returncode == 0:
                break
        else:
            message = next(filter(None, done.stderr.splitlines()), f"exit status {done.returncode}")
            raise OSError(f"{shlex.join(command)} cannot compile {SOURCE.name}: {message}")
        try:
            _opened(path)  # before it takes its place: what cannot be loaded would be met at every later start
        except OSError as error:
            raise OSError(
                f"what {shlex.join(command)} makes of {SOURCE.name} cannot be loaded ({error}); set CXX to another "
                "compiler, or VLSCALE_CACHE to a folder that programs may run from"
            ) from None


def _run(command: list[str], seconds: int) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:  # which is no OSError
        raise OSError(f"{shlex.join(command)[:100]} needs more than {seconds} seconds; set CXX") from None


def _processor() -> str:
    """What the compiler's choice of instructions depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
