"""Findings on all hosts together: what differs between them, what is wrong on which, who is slow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from vlscale.doctor.allreduce import Measured
from vlscale.doctor.findings import Finding, Section, some

TOGETHER, LINES = Section("differences between hosts"), Section("all-reduce")
SLOW = 1.5
"""A rank that takes so many times the median for the same work is named."""


@dataclass(frozen=True)
class RankReport:
    """What a rank tells of itself.

    Attributes:
        host, rank: where it runs.
        device: name of the GPU or the processor.
        versions: name -> version of all that has to agree.
        variables: those that steer NCCL and gloo.
        work_s: see :func:`vlscale.doctor.allreduce.own_work`.
        findings: on its host; empty on all but the host's first rank.
    """

    host: str
    rank: int
    device: str
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    work_s: float
    findings: tuple[Finding, ...] = ()


def differences(reports: Sequence[RankReport]) -> Iterator[Finding]:
    """Versions, devices and variables that are not the same everywhere."""
    names = list(dict.fromkeys(name for report in reports for name in report.versions))
    same = 0
    for name in names:
        told = _who_has(reports, (report.versions.get(name, "missing") for report in reports))
        if len(told) == 1:
            same += 1
        else:
            yield TOGETHER.failed(
                name, _told(told), f"install the same on all hosts, from one file of constraints; first: {_odd(told)}"
            )
    if same == len(names):
        yield TOGETHER.ok("versions", f"the same on all {len(reports)} ranks")
    told = _who_has(reports, (report.device for report in reports))
    if len(told) > 1:
        yield TOGETHER.warning("devices", _told(told), "the slowest sets the pace: choose hosts of one kind")
    for name in sorted({name for report in reports for name in report.variables if name.startswith("NCCL_")}):
        told = _who_has(reports, (report.variables.get(name, "not set") for report in reports))
        if len(told) > 1:
            yield TOGETHER.warning(
                name, _told(told), "set it alike on all hosts (deepspeed: .deepspeed_env), unless networks differ"
            )


def merged(reports: Iterable[RankReport]) -> list[Finding]:
    """The warnings and failures of all hosts; one that several hosts share is told once, with their names."""
    hosts: dict[Finding, list[str]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.state != "ok":
                hosts.setdefault(finding, []).append(report.host)
    return [
        Finding(finding.section, finding.name, finding.state, f"{some(names)}: {finding.text}", finding.cure)
        for finding, names in hosts.items()
    ]


def judge_measured(measured: Sequence[Measured], reports: Sequence[RankReport]) -> Iterator[Finding]:
    """Whether sums were right, and whether a rank is slow by itself."""
    wrong = sorted({rank for one in measured for rank in one.wrong})
    if wrong:
        sizes = some([f"{one.bytes:,}" for one in measured if one.wrong])
        where = some([f"{rank} on {reports[rank].host}" for rank in wrong])
        yield LINES.failed(
            "sums", f"wrong for {sizes} bytes on rank {where}",
            "do not train on these hosts: look for errors of memory, GPU or links (nvidia-smi -q -d ECC, dmesg)",
        )  # fmt: skip
    else:
        yield LINES.ok("sums", "right for all sizes on all ranks")
    usual = median(report.work_s for report in reports)
    slow = [report for report in reports if report.work_s > SLOW * usual]
    if slow:
        shown = some([f"{one.rank} on {one.host} ({one.work_s / usual:.1f} times the median)" for one in slow])
        yield LINES.warning(
            "slow ranks", f"{shown} for the same matrix product: the others wait for it at every step",
            "look there for other programs, heat or a lower clock (top, nvidia-smi -q -d PERFORMANCE)",
        )  # fmt: skip


def _who_has(reports: Sequence[RankReport], values: Iterable[str]) -> dict[str, list[RankReport]]:
    told: dict[str, list[RankReport]] = {}
    for report, value in zip(reports, values, strict=True):
        told.setdefault(value, []).append(report)
    return told


def _told(told: Mapping[str, Sequence[RankReport]]) -> str:
    return "; ".join(f"{value} on {_hosts(reports)}" for value, reports in told.items())


def _hosts(reports: Sequence[RankReport]) -> str:
    ranks: dict[str, list[str]] = {}
    for report in reports:
        ranks.setdefault(report.host, []).append(str(report.rank))
    return some([f"{host} (rank {some(numbers)})" for host, numbers in ranks.items()])


def _odd(told: Mapping[str, Sequence[RankReport]]) -> str:
    """Where the rarest value stands."""
    return _hosts(min(told.values(), key=len))
