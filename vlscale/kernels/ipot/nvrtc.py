"""Compiling CUDA C++ at run time with NVRTC, through ctypes: PyTorch's wheels bring it, no toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vlscale.kernels.ipot.native import cache_folder, private

_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.11.2")
_FOLDERS = ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib", "nvidia/cu12/lib")
"""Where the wheels of CUDA 12 and 13 put it, inside site-packages."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        cubin: for the driver.
        log: what the compiler said of registers and spills.
    """

    cubin: bytes
    log: str

    def figure(self, name: str) -> int:
        """Return one of the log's numbers: ``registers``, ``bytes spill stores``, ``bytes smem``; 0 if absent."""
        found = re.search(rf"(\d+) {name}", self.log)
        return int(found[1]) if found else 0


@functools.cache
def library() -> ctypes.CDLL:
    """Load NVRTC.

    Raises:
        OSError: it is not installed.
    """
    spec = find_spec("nvidia")
    roots = [Path(root).parent for root in (spec.submodule_search_locations or [])] if spec else []
    found = [root / folder / name for root in roots for folder in _FOLDERS for name in _NAMES]
    for path in [*map(str, filter(Path.exists, found)), *_NAMES]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise OSError(f"NVRTC ({', '.join(_NAMES)}) is not installed: pip install nvidia-cuda-nvrtc-cu12")


def version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        OSError: it is not installed.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def compile_kernel(source: str, name: str, architecture: str, defines: Sequence[str] = ()) -> Compiled:
    """Compile device source for ``architecture``; what has been compiled before comes from the cache folder.

    Args:
        source: CUDA C++, without includes.
        name: of the source, for the compiler's messages.
        architecture: ``sm_70``, ``sm_80``, ...
        defines: ``NAME=VALUE``.

    Raises:
        OSError: there is no NVRTC, or the source does not compile; the first error is told.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *(f"-D{d}" for d in defines)]
    key = hashlib.sha256("\0".join([source, *options, str(version())]).encode()).hexdigest()[:24]
    try:
        folder: Path | None = private(cache_folder())
    except OSError:  # compile anew in each process
        folder = None
    if folder is not None and (cached := _read(folder / f"{key}.cubin", folder / f"{key}.log")):
        return cached
    made = _compile(source, name, options)
    if folder is not None:
        _write(folder / f"{key}.log", made.log.encode())
        _write(folder / f"{key}.cubin", made.cubin)
    return made


def _compile(source: str, name: str, options: list[str]) -> Compiled:
    lib, program = library(), ctypes.c_void_p()
    _check(
        lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None),
        "nvrtcCreateProgram",
    )
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = lib.nvrtcCompileProgram(program, len(options), array)
        log = _text(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).decode(errors="replace").rstrip("\0")
        if status != 0:
            first = next(
                (line for line in log.splitlines() if "error" in line), log.strip()[:200] or f"status {status}"
            )
            raise OSError(f"NVRTC cannot compile {name} for {options[0]}: {first}")
        return Compiled(_text(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program), log)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "nvrtcGet...Size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(read(program, buffer), "nvrtcGet...")
    return buffer.raw


def _check(status: int, call: str) -> None:
    if status != 0:
        raise OSError(f"{call} failed with status {status}")


def _read(cubin: Path, log: Path) -> Compiled | None:
    try:
        return Compiled(cubin.read_bytes(), log.read_text(encoding="utf-8"))
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Write under another name first: processes that start together do not meet half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(name, path)
