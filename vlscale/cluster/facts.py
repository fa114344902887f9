"""What a host says of itself before a run starts on it: quick, without PyTorch.

``vlscale doctor`` looks closer, at one host.
"""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import socket
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import vlscale

PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "triton", "safetensors", "pydantic")
"""Must have one version on all hosts."""

MAX_FILE = 16 << 20
MAX_SOURCES = 2000
RESOLVE_S = 3.0
_QUERY_S = 15.0
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


def look(paths: Iterable[str], master: str) -> dict[str, Any]:
    """Return this host's facts, as JSON can hold them.

    Args:
        paths: files and folders that the run needs.
        master: name of the first host.

    Returns:
        ``host``; ``machine`` (an identity: equal for two names of one machine); ``versions`` (name -> version, of
        Python, vlscale and :data:`PACKAGES`); ``source`` (hash of vlscale's own files); ``gpus`` (names) and
        ``gpu_problem`` (why there are none); ``interfaces`` (name -> addresses, those that are up); ``master``
        (addresses that its name means here); ``shell`` (name of the login shell); ``paths`` (path -> why it cannot be
        used, or a hash of what a file, or the indices of a data folder, hold).
    """
    interfaces = dict(_interfaces())
    gpus, gpu_problem = gpu_names()
    return {
        "host": socket.gethostname(),
        "machine": _machine(interfaces),
        "versions": dict(_versions()),
        "source": source_hash(Path(vlscale.__file__).resolve().parent),
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "interfaces": interfaces,
        "master": addresses_of(master),
        "shell": _login_shell(),
        "paths": {path: _examine(Path(path)) for path in paths},
    }


def gpu_names() -> tuple[list[str], str]:
    """Names of the NVIDIA GPUs that this host's driver shows, and why there are none; empty without a reason."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, errors="replace", timeout=_QUERY_S)
    except FileNotFoundError:
        return [], "no nvidia-smi on PATH"
    except OSError as error:
        return [], f"nvidia-smi cannot be started: {error.strerror}"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {_QUERY_S:.0f} s; look at its driver"
    said = [line.strip()[:100] for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        return [], f"nvidia-smi ended with status {done.returncode}: {said[-1] if said else 'it said nothing'}"
    return said[:64], ""


def addresses_of(name: str, timeout_s: float = RESOLVE_S) -> list[str]:
    """Addresses that a host's name means here; none if nobody knows it, or no name server answers in time."""
    found: list[str] = []

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            found.extend(dict.fromkeys(str(answer[4][0]).split("%")[0] for answer in answers))

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[:16]


def _login_shell() -> str:
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_shell).name
    except KeyError:
        return Path(os.environ.get("SHELL", "")).name


def source_hash(package: Path) -> str:
    """Hash of a package's Python files, names and contents: two hosts with the same run the same program."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py"))[:MAX_SOURCES]:
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + _sha256(path).encode())
    return digest.hexdigest()[:16]


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "vlscale", vlscale.__version__
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "missing"


def _interfaces() -> Iterator[tuple[str, list[str]]]:
    import psutil

    states = psutil.net_if_stats()
    for name, held in psutil.net_if_addrs().items():
        if name in states and states[name].isup:
            families = (socket.AF_INET, socket.AF_INET6)
            yield name, [one.address.split("%")[0] for one in held if one.family in families]


def _machine(interfaces: dict[str, list[str]]) -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    words = [boot, socket.gethostname(), *sorted(address for held in interfaces.values() for address in held)]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _examine(path: Path) -> dict[str, str]:
    try:
        if path.is_dir():
            indices = sorted([*path.glob("index.json"), *path.glob("*/index.json")])
            next(path.iterdir(), None)  # it can be listed
            return {"hash": ",".join(_sha256(index)[:16] for index in indices[:64])}
        if path.is_file():
            with path.open("rb") as file:
                file.read(1)
            return {"hash": _sha256(path)[:16] if path.stat().st_size <= MAX_FILE else str(path.stat().st_size)}
    except OSError as error:
        return {"problem": f"cannot be read ({error.strerror})"}
    return {"problem": "does not exist"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(MAX_FILE)).hexdigest()
