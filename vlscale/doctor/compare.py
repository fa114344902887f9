"""Findings on all hosts together: what differs between them, what is wrong on which, who is slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from vlscale.doctor.allreduce import Measured
from vlscale.doctor.findings import Finding, Section, some

TOGETHER, LINES = Section("differences between hosts"), Section("all-reduce")
SLOW = 1.5
"""A rank that takes so many times the median for the same work is named."""
MOST_VALUES = 4
"""Values that are told of what differs: a hundred hosts may have a hundred."""


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
        driver: version, or ``none``; None on all but the host's first rank.
    """

    host: str
    rank: int
    device: str
    versions: Mapping[str, str]
    variables: Mapping[str, str]
    work_s: float
    findings: tuple[Finding, ...] = ()
    driver: str | None = None


def differences(reports: Sequence[RankReport]) -> Iterator[Finding]:
    """Versions, devices and variables that are not the same everywhere."""
    names = list(dict.fromkeys(name for report in reports for name in report.versions))
    tables = {name: _who_has(reports, (one.versions.get(name, "missing") for one in reports)) for name in names}
    asked = [report for report in reports if report.driver is not None]
    tables["driver"] = _who_has(asked, (str(report.driver) for report in asked))
    differ = {name: told for name, told in tables.items() if len(told) > 1}
    for name, told in differ.items():
        yield TOGETHER.failed(
            name, _told(told), f"install the same on all hosts, from one file of constraints; first: {_odd(told)}"
        )
    if not differ:
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
    """The warnings and failures of all hosts; those that one cure mends are one line, with the names of the hosts."""
    lines: dict[Finding, dict[str, list[str]]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.state != "ok":
                texts = lines.setdefault(replace(finding, text=""), {})
                texts.setdefault(finding.text, []).append(report.host)
    return [
        replace(finding, text=_few([f"{some(hosts)}: {text}" for text, hosts in texts.items()]))
        for finding, texts in lines.items()
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
    """Rank 0's value, and the next few, each with its hosts."""
    return _few([f"{value} on {where}" for value, where in zip(told, _places(told), strict=True)])


def _few(parts: Sequence[str]) -> str:
    more = f"; and {len(parts) - MOST_VALUES} more" if len(parts) > MOST_VALUES else ""
    return "; ".join(parts[:MOST_VALUES]) + more


def _odd(told: Mapping[str, Sequence[RankReport]]) -> str:
    """Where the rarest value stands."""
    return min(zip(told.values(), _places(told), strict=True), key=lambda pair: len(pair[0]))[1]


def _places(told: Mapping[str, Sequence[RankReport]]) -> list[str]:
    """The hosts of each value; ranks only where those of a host differ."""
    by_value = [Counter(report.host for report in reports) for reports in told.values()]
    of_host = sum(by_value, Counter())
    places = []
    for reports, count in zip(told.values(), by_value, strict=True):
        ranks: dict[str, list[str]] = {}
        for report in reports:
            ranks.setdefault(report.host, []).append(str(report.rank))
        places.append(some([
            host if count[host] == of_host[host] else f"{host} (rank {some(numbers)})"
            for host, numbers in ranks.items()
        ]))  # fmt: skip
    return places
