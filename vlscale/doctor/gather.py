"""Gathering all facts of this host. Nothing here judges, and nothing fails: what cannot be told is left empty."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace

from vlscale.doctor import gpus, system
from vlscale.doctor.facts import Facts
from vlscale.doctor.network import network


def gather(processes: int | None = None) -> Facts:
    """Look at this host; takes seconds, most of them for importing PyTorch.

    Args:
        processes: of a run on this host, where their number is known.
    """
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for what the doctor says
        software, graphics = gpus.software(), gpus.graphics()
        wished = os.environ.get("DS_ACCELERATOR")
        known = graphics.torch_gpus or graphics.driver_gpus
        accelerator = "cuda" if known and wished != "cpu" else "cpu"
        facts = Facts(
            accelerator=accelerator,
            software=software,
            graphics=graphics,
            network=network(),
            building=system.building(),
            machine=system.machine(len(known) if accelerator == "cuda" else 0, processes),
        )
        return facts if software.torch_error else _with_kernels(facts)


def _with_kernels(facts: Facts) -> Facts:
    from vlscale.doctor import kernels

    try:
        devices = kernels.devices(len(facts.graphics.torch_gpus))
    except Exception as error:  # a GPU that PyTorch has no kernels for raises what it likes
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return replace(facts, devices=({"device": "cuda", "name": "", "error": why},))
    return replace(facts, compiling=kernels.compiling(), devices=devices)
