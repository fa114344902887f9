"""Which environment variables travel to the other hosts: named ones, none that looks like a secret.

DeepSpeed's launcher prints what it exports, and every user of a host can read command lines.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from vlscale.cluster import run_processes
from vlscale.errors import VlscaleError

NAMED = (
    "DS_ACCELERATOR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_LIBRARY_PATH", "CUDA_HOME", "TORCH_EXTENSIONS_DIR",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_TRACE_BUFFER_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF",
    "PYTHONPATH", "PYTHONHASHSEED", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRITON_CACHE_DIR",
)  # fmt: skip
"""Exported where they are set."""

PREFIXES = ("NCCL_", "GLOO_", "VLSCALE_")
"""All variables with these are exported, too."""

KEPT = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "TMPDIR", "SSH_AUTH_SOCK", "KRB5CCNAME", "LD_LIBRARY_PATH",
        "XDG_RUNTIME_DIR", "DS_ACCELERATOR", "PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND")  # fmt: skip
"""What the launcher's own process needs besides; it exports none of them by itself."""

MAX_VALUE = 32_768
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SECRET = re.compile(
    r"token(?!s)|keys?(?![a-z])|keytab|passw|passphrase|(?<!by)pass(?![a-z])|(?<=[a-z0-9_])pwd(?![a-z])|secret|credential"
    r"|auth(?!or)|cookie|bearer",
    re.IGNORECASE,
)
_NO_SECRETS = ("NCCL_IB_PKEY", "OLDPWD")
_OWN = (run_processes.VARIABLE, run_processes.LAUNCHER_VARIABLE)
"""Of a run that this one is started by: its processes are not to be taken for those."""

# DeepSpeed puts values between double quotes, and pdsh replaces what follows a percent sign.
_UNSAFE = re.compile(r'["$`\\%\x00-\x1f\x7f]')


def looks_secret(name: str) -> bool:
    """Whether a variable's name says that its value is not for others' eyes."""
    return name not in _NO_SECRETS and bool(_SECRET.search(name))


def exported(environment: Mapping[str, str], asked: tuple[str, ...], project: Path) -> dict[str, str]:
    """Return name -> value of what is set on every host.

    ``PATH`` begins with the folder of this Python, ``PYTHONPATH`` with the project's folder.

    Args:
        environment: of this process.
        asked: further names, from ``--export``.
        project: folder that the run is started in.

    Raises:
        VlscaleError: a name of ``asked`` looks like a secret or is not set, or a value cannot travel.
    """
    for name in asked:
        if not _NAME.fullmatch(name):
            raise VlscaleError(f"--export {ascii(name)[:100]}: expected the name of an environment variable")
        if looks_secret(name):
            raise VlscaleError(
                f"--export {name}: looks like a secret, and what is exported shows in logs and in process lists; keep "
                f"it in a file on each host that only you can read"
            )
        if name not in environment:
            raise VlscaleError(f"--export {name}: it is not set here; set it, or drop --export {name}")
    names = [name for name in environment if name in NAMED or name in asked or name.startswith(PREFIXES)]
    found = {name: environment[name] for name in sorted(names) if name not in _OWN and not looks_secret(name)}
    found["PATH"] = _first(str(Path(sys.executable).parent), environment.get("PATH", os.defpath))
    found["PYTHONPATH"] = _first(str(project), environment.get("PYTHONPATH", ""))
    for name, value in found.items():
        unsafe = _UNSAFE.search(value)
        if unsafe:
            raise VlscaleError(
                f"{name}: its value holds {unsafe[0]!a}, which does not travel to other hosts; change or unset it"
            )
        if len(value) > MAX_VALUE:
            raise VlscaleError(f"{name}: its value is longer than {MAX_VALUE} characters; shorten or unset it")
    return found


def ssh_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for ssh itself, which may need any of the user's: its sessions got them, too."""
    return {name: value for name, value in environment.items() if name not in _OWN}


def deepspeed_environment(environment: Mapping[str, str], exports: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for DeepSpeed's launcher itself.

    It exports, and prints, all variables of its environment that begin with PYTHON, MLFLOW, UCX, MV2 or NCCL: what is
    not to travel must not be there.
    """
    kept = {name: environment[name] for name in environment if name in KEPT or name.startswith("LC_")}
    return {**kept, "PATH": exports["PATH"]}


def _first(folder: str, others: str) -> str:
    rest = [entry for entry in others.split(os.pathsep) if entry and entry != folder]
    return os.pathsep.join([folder, *rest])


def interface_problem(exports: Mapping[str, str], interfaces: list[str]) -> list[str]:
    """Return what is wrong with the interface names that are exported, on a host that has ``interfaces``."""
    problems = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = exports.get(variable, "")
        if not value or value.startswith("^"):
            continue
        exact = variable.startswith("GLOO") or value.startswith("=")
        wanted = [word for word in value.removeprefix("=").split(",") if word]
        if not any(name == word or (not exact and name.startswith(word)) for word in wanted for name in interfaces):
            problems.append(
                f"{variable}={value}, but it has only {', '.join(interfaces[:16]) or 'no interface'}; unset it: each "
                f"host then chooses its own"
            )
    return problems
