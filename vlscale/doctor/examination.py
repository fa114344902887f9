"""From facts to findings, and to the JSON object that programs read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vlscale.doctor import check_machine, check_network, check_software
from vlscale.doctor.facts import Facts
from vlscale.doctor.findings import Finding

CHECKS = (
    check_software.versions, check_software.gpus, check_network.network, check_machine.building,
    check_software.kernels, check_machine.memory, check_machine.system,
)  # fmt: skip
MOST_LEFTOVERS = 100
"""Entries of the list that programs get."""


def judge(facts: Facts) -> list[Finding]:
    """Return all findings; depends on the facts alone."""
    return [finding for check in CHECKS for finding in check(facts)]


def as_json(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """Return what ``vlscale doctor --json`` prints.

    ``host``, ``vlscale``, ``commit``, ``python``, ``platform``, ``packages`` (name -> version or null),
    ``accelerator``, ``cuda``, ``cudnn``, ``nccl``, ``driver``, ``driver_error``, ``arch_list``, ``gpus`` (``name``,
    ``arch``, ``memory_bytes``, ``used_bytes``, ``mode``), ``compiling``, ``devices``, ``network``, ``building``,
    ``machine`` and ``findings`` (``section``, ``name``, ``state``, ``text``, ``cure``). Sizes are in bytes, ages and
    times in seconds.
    """
    software, machine = facts.software, asdict(facts.machine)
    machine["leftovers"] = machine["leftovers"][:MOST_LEFTOVERS]
    network = asdict(facts.network)
    return {
        "host": network.pop("host"),
        "vlscale": software.vlscale,
        "commit": software.commit,
        "python": software.python,
        "platform": software.platform,
        "packages": dict(software.packages),
        "accelerator": facts.accelerator,
        "cuda": software.cuda,
        "cudnn": software.cudnn,
        "nccl": software.nccl,
        "driver": facts.graphics.driver,
        "driver_error": facts.graphics.driver_error,
        "arch_list": list(software.arch_list),
        "gpus": [asdict(gpu) for gpu in facts.gpus],
        "compiling": dict(facts.compiling),
        "devices": [dict(device) for device in facts.devices],
        "network": network,
        "building": asdict(facts.building),
        "machine": machine,
        "findings": [asdict(finding) for finding in findings],
    }
