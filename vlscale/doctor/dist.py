"""``vlscale doctor --dist``: all ranks join as for training, compare themselves, and measure an all-reduce."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import vlscale
from vlscale.doctor import slurm, text
from vlscale.doctor.allreduce import Measured, measure, own_work
from vlscale.doctor.compare import LINES, RankReport, differences, judge_measured, merged
from vlscale.doctor.examination import judge
from vlscale.doctor.facts import Facts
from vlscale.doctor.findings import Finding, exit_status
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
    hosts = processes.hosts
    first = hosts.index(hosts[processes.rank]) == processes.rank
    facts = gather()
    processes.barrier()
    work = own_work(processes.device)
    own = RankReport(
        host=hosts[processes.rank],
        rank=processes.rank,
        device=_device(facts, processes),
        versions=_versions(facts),
        variables=facts.network.variables,
        work_s=work,
        findings=tuple(judge(facts)) if first else (),
    )
    return list(processes.gather(own))


def _device(facts: Facts, processes: Processes) -> str:
    if processes.device.type == "cuda":
        return facts.graphics.torch_gpus[processes.device.index or 0].name
    return str(facts.devices[0].get("name", "cpu")) if facts.devices else "cpu"


def _versions(facts: Facts) -> dict[str, str]:
    software = facts.software
    told: dict[str, Any] = {
        "vlscale": vlscale.__version__, "commit": software.commit, "python": software.python, **software.packages,
        "CUDA": software.cuda, "cuDNN": software.cudnn, "NCCL": software.nccl, "driver": facts.graphics.driver,
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
            f"all-reduce, float32, {backend}, {len(reports)} ranks on {hosts} host{'s'[: hosts > 1]}: median of the "
            f"slowest rank's times",
            measured, out,
        )  # fmt: skip
    text.show(findings, out)
