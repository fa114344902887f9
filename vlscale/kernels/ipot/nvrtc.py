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
        """Return one of the log's numbers: ``registers``, ``bytes spill stores``, ``bytes smem``.

        Raises:
            ValueError: the log does not tell it (a kernel without shared memory has no ``bytes smem``).
        """
        found = re.search(rf"(\d+) {name}", self.log)
        if found is None:
            raise ValueError(f"the compiler's log tells no {name!r}: {self.log.strip()[:500]}")
        return int(found[1])


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


def supported() -> list[str]:
    """The architectures that NVRTC compiles for, ``sm_70`` etc.

    Raises:
        OSError: it is not installed.
    """
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    numbers = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(numbers), "nvrtcGetSupportedArchs")
    return [f"sm_{number}" for number in numbers]


def runnable(architecture: str) -> list[str]:
    """The architectures whose code runs on a GPU of ``architecture``, nearest first: of its major, no higher minor."""
    number = int(architecture.removeprefix("sm_"))
    return [f"sm_{lower}" for lower in range(number, number // 10 * 10 - 1, -1)]


@functools.cache
def target(architecture: str) -> str:
    """What NVRTC compiles for where a GPU is of ``architecture``, which may be newer than NVRTC.

    Raises:
        OSError: NVRTC is not installed, or compiles nothing that runs there.
    """
    known = supported()
    found = next((each for each in runnable(architecture) if each in known), None)
    if found is None:
        raise OSError(f"NVRTC {'.'.join(map(str, version()))} compiles for {', '.join(known)}, not for {architecture}")
    return found


def compile_kernel(source: str, name: str, architecture: str, defines: Sequence[str] = ()) -> Compiled:
    """Compile device source for ``architecture``; what came compiled, or has been compiled before, is read instead.

    Args:
        source: CUDA C++, without includes.
        name: of the source, for the compiler's messages.
        architecture: of the GPU, ``sm_70``, ``sm_80``, ...; what is returned may be for a lower one that runs there.
        defines: ``NAME=VALUE``.

    Raises:
        OSError: there is no NVRTC, it does not know the architecture, or the source does not compile; the first error
            is told.
    """
    for lower in runnable(architecture):
        if shipped := _read(PREBUILT, _prebuilt_key(source, lower, defines)):
            return shipped
    options = _options(target(architecture), defines)
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
    made = _compile(source, name, _options(architecture, defines))
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, _prebuilt_key(source, architecture, defines), made)
    return made


def is_prebuilt(source: str, architecture: str, defines: Sequence[str]) -> bool:
    """Whether just this kernel came compiled for ``architecture`` or one whose code runs there."""
    return any(_read(PREBUILT, _prebuilt_key(source, lower, defines)) for lower in runnable(architecture))


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


def _prebuilt_key(source: str, architecture: str, defines: Sequence[str]) -> str:
    return f"{architecture}-{_key(source, _options(architecture, defines))}"


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
