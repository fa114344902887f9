"""``srun vlscale doctor --dist``: the launcher's variables from those of Slurm, as launch/slurm/task.sh sets them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlscale.errors import VlscaleError

START = (
    "torchrun --nproc_per_node 8 --no-python vlscale doctor --dist, srun vlscale doctor --dist, or "
    "deepspeed --module vlscale.doctor --dist"
)
"""How the command is started on every rank."""
_FIRST_STEP_BEYOND = 0xFFFF_FFF0
"""Ids from here on are not srun's: the batch script, interactive shells, jobs' extern steps."""
_HOST = re.compile(r"([A-Za-z0-9._-]+)(?:\[(\d+)[\d,-]*\]([A-Za-z0-9._-]*))?")


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the launcher's variables for this task of a Slurm step; empty where a launcher has set them, or no Slurm.

    MASTER_ADDR and MASTER_PORT are kept if they are set, otherwise the step's first host and a port made from the job.

    Raises:
        VlscaleError: Slurm gave several tasks, and this is not one of them; or its variables cannot be read.
    """
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        return {}
    tasks, step = environment.get("SLURM_NTASKS", "1"), environment.get("SLURM_STEP_ID", "")
    if tasks == "1":
        return {}
    if not step.isdecimal() or int(step) >= _FIRST_STEP_BEYOND or "SLURM_PROCID" not in environment:
        raise VlscaleError(f"this Slurm job has {tasks} tasks, but no launcher started this one: {START}")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", tasks)
    numbers = {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
               "WORLD_SIZE": tasks, "SLURM_JOB_ID": environment.get("SLURM_JOB_ID", "")}  # fmt: skip
    for name, value in numbers.items():
        if not re.fullmatch(r"\d{1,9}", value):
            raise VlscaleError(f"Slurm's value for {name} is {value!r}, expected a number; start otherwise: {START}")
    # Below those that Linux gives out by itself, as in launch/slurm/train.sh. That takes the job's id alone; here the
    # step counts as well, as the doctor may run beside a training of the same job, whose store it must not meet.
    port = 20000 + (int(numbers.pop("SLURM_JOB_ID")) + int(step)) % 12000
    return {
        **numbers,
        "LOCAL_WORLD_SIZE": str(environment.get("SLURM_GTIDS", "").count(",") + 1),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def first_host(hosts: str) -> str:
    """``node[03-05,9],other`` -> ``node03``.

    Raises:
        VlscaleError: it is no list of hosts.
    """
    found = _HOST.match(hosts)
    if found is None:
        raise VlscaleError(f"SLURM_STEP_NODELIST is {hosts[:100]!r}, which is no list of hosts; set MASTER_ADDR")
    return f"{found[1]}{found[2] or ''}{found[3] or ''}"
