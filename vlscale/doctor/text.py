"""What a person reads: coloured on a terminal, plain lines in a pipe, never broken in the middle there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from vlscale.doctor.findings import Finding, counted, some

if TYPE_CHECKING:
    from rich.console import Console

    from vlscale.doctor.allreduce import Measured
    from vlscale.doctor.compare import RankReport

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_ENDLESS = 1 << 20
"""Columns of a file or a pipe: lines there are for grep."""


def console() -> Console:
    """A console on stdout."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _ENDLESS
    return Console(width=width, highlight=False, markup=False, emoji=False, soft_wrap=width is not None)


def show(findings: Sequence[Finding], out: Console) -> None:
    """Print findings by section, cures under their lines, and a summary."""
    width = max((len(finding.name) for finding in findings), default=0)
    for section, group in groupby(findings, key=lambda finding: finding.section):
        _line(out, section, "bold")
        for finding in group:
            show_finding(finding, width, out)
    count = Counter(finding.state for finding in findings)
    _line(out, f"{count['ok']} ok, {counted(count['warning'], 'warning')}, {count['failed']} failed")


def show_finding(finding: Finding, width: int, out: Console) -> None:
    """Print one finding, and its cure on the next line."""
    from rich.text import Text

    state = Text(f"  {finding.state:<8}", style=_COLOURS[finding.state])
    out.print(state + Text(f"{finding.name:<{width}}  {_printable(finding.text)}"))
    if finding.cure:
        out.print(Text(f"{'':10}{'':{width}}  cure: {_printable(finding.cure)}"))


def show_ranks(reports: Sequence[RankReport], out: Console) -> None:
    """Print a line per host: ranks, device, versions, and the time of the ranks' own work."""
    _line(out, "hosts", "bold")
    by_host: dict[str, list[RankReport]] = {}
    for report in reports:
        by_host.setdefault(report.host, []).append(report)
    rows = [("host", "ranks", "device", "torch", "NCCL", "own work, ms")]
    for host, group in by_host.items():
        times = [1e3 * report.work_s for report in group]
        rows.append((
            host, some([str(report.rank) for report in group], 8), some(sorted({report.device for report in group}), 2),
            group[0].versions.get("torch", "-"), group[0].versions.get("NCCL", "-"),
            f"{min(times):.1f}" + (f" to {max(times):.1f}" if len(times) > 1 else ""),
        ))  # fmt: skip
    _rows(rows, out)


def show_measured(title: str, measured: Sequence[Measured], out: Console) -> None:
    """Print the table of the all-reduce."""
    _line(out, title, "bold")
    rows = [("bytes", "time, ms", "algorithm, GB/s", "bus, GB/s", "sum")]
    for one in measured:
        right = "right" if one.right else "WRONG"
        rows.append((
            f"{one.bytes:,}", f"{1e3 * one.seconds:.3f}", f"{one.algorithm_bandwidth / 1e9:.3f}",
            f"{one.bus_bandwidth / 1e9:.3f}", right,
        ))  # fmt: skip
    _rows(rows, out, right_aligned=True)


def _rows(rows: Sequence[tuple[str, ...]], out: Console, right_aligned: bool = False) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{word:>{width}}" if right_aligned else f"{word:<{width}}"
                 for word, width in zip(row, widths, strict=True)]  # fmt: skip
        _line(out, f"  {'  '.join(cells).rstrip()}")


def show_lines(lines: Iterable[str], out: Console) -> None:
    """Print plain lines."""
    for line in lines:
        _line(out, line)


def _line(out: Console, text: str, style: str = "") -> None:
    from rich.text import Text

    out.print(Text(_printable(text), style=style))


def _printable(text: str) -> str:
    """Words from outside (names of files, values of variables) must not steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
