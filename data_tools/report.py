"""What an import ends with: a JSON report beside the stores, and the same as a table."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from data_tools.parts import Work
from data_tools.records import BadRow
from data_tools.under_way import rows_under_way
from vlscale.errors import VlscaleError

_BINS = (1, 10, 20, 36, 50, 100, 1024)


class _Rows(ProgressColumn):
    """Rows of finished parts and, as they are read, of the others."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['rows'] + rows_under_way():,} rows")


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr; yields ``advance(steps, rows)``."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rows(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, rows=0)
        seen = 0

        def advance(steps: int, rows: int) -> None:
            nonlocal seen
            seen += rows
            progress.update(task, advance=steps, rows=seen)

        yield advance


def sum_up(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the results of all parts: numbers are summed, counters merged (keys in numerical or alphabetical order)."""
    total: dict[str, Any] = {}
    for name in results[0] if results else ():
        values = [result[name] for result in results]
        if isinstance(values[0], dict):
            counter: Counter[str] = Counter()
            for value in values:
                counter.update(value)
            total[name] = dict(sorted(counter.items(), key=lambda item: (len(item[0]) * item[0].isdigit(), item[0])))
        elif isinstance(values[0], (int, float)):
            total[name] = sum(values)
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of the files of a store."""
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.exists() else 0


def write_report(folder: Path, kind: str, report: Mapping[str, Any]) -> None:
    """Write ``report-KIND.json``."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (folder / f"report-{kind}.json").write_text(text, encoding="utf-8")


def collect_dropped(work: Work, parts: int, target: Path, skip: bool) -> None:
    """Put the lists of dropped rows together, in the order of parts.

    Raises:
        VlscaleError: there are some, though bad rows are not to be skipped (an earlier run did).
    """
    with target.open("wb") as file:
        for number in range(parts):
            with (work.part(number) / "dropped.jsonl").open("rb") as part:
                shutil.copyfileobj(part, file)
    if not skip and target.stat().st_size:
        with target.open(encoding="utf-8") as rows:
            row = BadRow(**json.loads(rows.readline()))
        raise VlscaleError(f"{row}; --on-error skip leaves such rows out and lists them")


def show_report(root: Path, kind: str, console: Console, done: str = "imported into") -> None:
    """Print a report as a table; its title is ``KIND DONE ROOT``."""
    report = json.loads((root / f"report-{kind}.json").read_text(encoding="utf-8"))
    table = Table(title=f"{kind} {done} {root}", show_header=False)
    table.add_column("what")
    table.add_column("how many", justify="right")
    for name, value in report.items():
        if name == "warning":  # stands below the table, where it is seen
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, dict)):
            table.add_row(name, str(value))
        elif isinstance(value, dict):
            rows = _bins(value) if name.endswith("histogram") else value
            for key, number in rows.items():
                of = "" if name == "told" else f"{name.removesuffix(' histogram')}: "
                table.add_row(of + key, _number(number))
        else:
            table.add_row(name.replace("_", " "), _number(value))
    console.print(table)
    dropped = sum(report.get("dropped", {}).values())
    if dropped:
        console.print(f"{dropped:,} rows were left out; {root / f'dropped-{kind}.jsonl'} lists them")
    if "warning" in report:
        console.print(f"WARNING: {report['warning']}", style="bold red", highlight=False, markup=False, soft_wrap=True)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _bins(histogram: Mapping[str, int]) -> dict[str, int]:
    """Counts in a few ranges."""
    found: dict[str, int] = {}
    for low, high in zip((0, *_BINS), _BINS, strict=False):
        count = sum(number for key, number in histogram.items() if low < int(key) <= high)
        if count:
            found[f"{low + 1}..{high}" if low + 1 < high else f"{high}"] = count
    return found
