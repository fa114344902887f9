"""``vlscale doctor --dist``: all ranks join as for training, compare themselves, and measure an all-reduce."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

import vlscale
from vlscale.doctor import gpus, network, slurm, text
from vlscale.doctor.allreduce import Measured, measure, own_work
from vlscale.doctor.check_machine import files_of_rank_0
from vlscale.doctor.compare import LINES, RankReport, differences, judge_measured, merged
from vlscale.doctor.examination import judge
from vlscale.doctor.facts import Software
from vlscale.doctor.findings import Finding, counted, exit_status
from vlscale.doctor.gather import gather
from vlscale.train.engine import connect
from vlscale.train.environment import choose_accelerator
from vlscale.train.processes import Processes, launched

PROGRAM = "vlscale doctor"
TIMEOUT_S = 120.0
"""How long a rank waits for another once all are there."""


def examine_together(as_json: bool, join_timeout_s: float) -> int:
    """Join the other ranks, look, measure; rank 0 prints, and returns 1 if something failed on any host.

    Raises:
        SystemExit: with 2, if the ranks do not come together; one line has been printed.
    """
    with launched(PROGRAM), stdout_kept():
        os.environ.update(slurm.variables(os.environ))
        accelerator = choose_accelerator("auto")
        processes = connect(accelerator, TIMEOUT_S, PROGRAM, join_timeout_s)
        reports = _reports(processes)
        measured = list(measure(processes)) if processes.world_size > 1 else []
        findings = _findings(reports, measured)
        processes.barrier()
    if not processes.main:
        return 0
    if as_json:
        print_json(reports, measured, findings)
    else:
        _show(reports, measured, findings, "NCCL" if accelerator == "cuda" else "gloo")
    return exit_status(findings)


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Send what libraries print to stdout (gloo does, from C++) to stderr instead, for the length of a block."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _reports(processes: Processes) -> list[RankReport]:
    """Look at each host once, by its first rank, and let every rank measure itself while all others do."""
    rank, hosts = processes.rank, processes.hosts
    host = hosts[rank]
    facts = gather(hosts.count(host)) if hosts.index(host) == rank else None
    findings = judge(facts) if facts else []
    if facts and processes.main:
        findings += files_of_rank_0(facts.machine.limits["open files"], processes.world_size)
    versions = _versions(facts.software if facts else gpus.software())
    processes.barrier()
    own = RankReport(
        host=host,
        rank=rank,
        device=_device(processes.device),
        versions=versions,
        variables=network.variables(),
        work_s=own_work(processes.device),
        findings=tuple(findings),
        driver=(facts.graphics.driver or "none") if facts else None,
    )
    return list(processes.gather(own))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else gpus.processor()


def _versions(software: Software) -> dict[str, str]:
    told: dict[str, Any] = {
        "vlscale": vlscale.__version__, "commit": software.commit, "python": software.python, **software.packages,
        "CUDA": software.cuda, "cuDNN": software.cudnn, "NCCL": software.nccl,
    }  # fmt: skip
    return {name: str(version) for name, version in told.items() if version is not None}


def _findings(reports: list[RankReport], measured: list[Measured]) -> list[Finding]:
    found = [*merged(reports), *differences(reports)]
    if measured:
        return [*found, *judge_measured(measured, reports)]
    alone = LINES.warning("ranks", "one process: nothing was measured between processes", f"start it by {slurm.START}")
    return [*found, alone]


def print_json(reports: list[RankReport], measured: list[Measured], findings: list[Finding]) -> None:
    """Print ``ranks``, ``all_reduce`` (``bytes``, ``seconds``, bandwidths in bytes per second) and ``findings``."""
    ranks = [{key: value for key, value in asdict(report).items() if key != "findings"} for report in reports]
    table = [
        asdict(one) | {"algorithm_bandwidth": one.algorithm_bandwidth, "bus_bandwidth": one.bus_bandwidth}
        for one in measured
    ]
    print(json.dumps({"ranks": ranks, "all_reduce": table, "findings": [asdict(one) for one in findings]}, indent=2))


def _show(reports: list[RankReport], measured: list[Measured], findings: list[Finding], backend: str) -> None:
    out = text.console()
    text.show_ranks(reports, out)
    if measured:
        hosts = len({report.host for report in reports})
        text.show_measured(
            f"all-reduce, float32, {backend}, {len(reports)} ranks on {counted(hosts, 'host')}: median of the "
            f"slowest rank's times",
            measured, out,
        )  # fmt: skip
    text.show(findings, out)
