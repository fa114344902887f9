"""Compiling CUDA C++ at run time with NVRTC, through ctypes: PyTorch's wheels bring it, no toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vlscale.kernels.ipot.compiled_files import cache_folder, written

_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so.11.2")
_FOLDERS = ("nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib", "nvidia/cu12/lib")
"""Where the wheels of CUDA 12 and 13 put it, inside site-packages."""
PREBUILT = Path(__file__).with_name("prebuilt")
"""Kernels that were compiled when vlscale was installed (``prebuild.py``)."""
SUFFIXES = (".cubin", ".log")


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
    """Compile device source for ``architecture``; what came compiled, or has been compiled before, is read instead.

    Args:
        source: CUDA C++, without includes.
        name: of the source, for the compiler's messages.
        architecture: ``sm_70``, ``sm_80``, ...
        defines: ``NAME=VALUE``.

    Raises:
        OSError: there is no NVRTC, or the source does not compile; the first error is told.
    """
    options = _options(architecture, defines)
    if shipped := _read(PREBUILT, f"{architecture}-{_key(source, options)}"):
        return shipped
    try:
        folder, key = cache_folder(), _key(source, [*options, str(version())])
    except OSError:  # compile anew in each process
        return _compile(source, name, options)
    found = _read(folder, key)
    if found is None:
        found = _compile(source, name, options)
        _write(folder, key, found)
    return found


def prebuild(source: str, name: str, architecture: str, defines: Sequence[str], folder: Path) -> Compiled:
    """Compile into ``folder``, where :func:`compile_kernel` finds it if it is :data:`PREBUILT`.

    Raises:
        OSError: see :func:`compile_kernel`.
    """
    options = _options(architecture, defines)
    made = _compile(source, name, options)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, f"{architecture}-{_key(source, options)}", made)
    return made


def is_prebuilt(architecture: str) -> bool:
    """Whether kernels for ``architecture`` came compiled, so that NVRTC is not needed."""
    return any(PREBUILT.glob(f"{architecture}-*{SUFFIXES[0]}"))


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


def _options(architecture: str, defines: Sequence[str]) -> list[str]:
    return [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *(f"-D{d}" for d in defines)]


def _key(source: str, parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join([source, *parts]).encode()).hexdigest()[:24]


def _read(folder: Path, key: str) -> Compiled | None:
    try:
        cubin, log = (folder / f"{key}{suffix}" for suffix in SUFFIXES)
        return Compiled(cubin.read_bytes(), log.read_text(encoding="utf-8"))
    except OSError:
        return None


def _write(folder: Path, key: str, made: Compiled) -> None:
    for suffix, content in zip(SUFFIXES, (made.cubin, made.log.encode()), strict=True):
        with written(folder / f"{key}{suffix}") as path:
            path.write_bytes(content)
