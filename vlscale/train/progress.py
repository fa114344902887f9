"""What a person sees while it trains: a bar on a terminal, plain lines elsewhere, and the same lines in train.log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_SMOOTHING = 0.5  # of rows, which are means over the logging interval already
_BAR_EVERY_S = 0.2


class Reporter:
    """Prints on the main process; in the others every method does nothing.

    Args:
        active: whether this is the main process.
        log: file that every line is added to.
        console: where to print; standard output by default.
    """

    def __init__(self, active: bool, log: Path | None = None, console: Console | None = None) -> None:
        self.active = active
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._log: TextIO | None = log.open("a", encoding="utf-8") if active and log else None
        self._bar: Progress | None = None
        self._smooth: dict[str, float] = {}
        self._rate: float | None = None
        self._last = (time.perf_counter(), 0)
        self._drawn = 0.0

    def line(self, text: str) -> None:
        """Print a line and add it to the log."""
        if not self.active:
            return
        self._console.print(text, markup=False)
        self._note(text)

    def start(self, step: int, total: int) -> None:
        """Begin at ``step`` of ``total``; shows the bar if this is a terminal."""
        self._last = (time.perf_counter(), step)
        if self.active and self._console.is_terminal:
            columns = (
                TextColumn("[bold]train"),
                BarColumn(None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA {task.fields[eta]}"),
                TextColumn("{task.fields[doing]}"),
            )
            self._bar = Progress(*columns, console=self._console, expand=True, auto_refresh=False)
            self._bar.add_task("train", total=total, completed=step, eta="-", doing="")
            self._bar.start()

    def step(self, done: int, total: int, task: str) -> None:
        """Move the bar on; cheap enough for every step."""
        if self._bar is None:
            return
        now = time.perf_counter()
        self._bar.update(self._bar.task_ids[0], completed=done)
        if now - self._drawn > _BAR_EVERY_S:
            self._drawn = now
            self._bar.update(self._bar.task_ids[0], doing=self._doing(task), eta=self._eta(done, total))
            self._bar.refresh()

    def row(self, done: int, total: int, task: str, lr: float, row: Mapping[str, float]) -> None:
        """Take in a row of metrics; without a terminal, print it as a line."""
        if not self.active:
            return
        self._take(done, row)
        speed = row.get("speed/tokens_per_s", 0.0)
        text = (
            f"step {done}/{total}  {self._losses()}  lr {lr:.2e}  {_short(speed)} tokens/s  "
            f"data wait {row.get('speed/data_wait', 0.0):.0%}  ETA {self._eta(done, total)}"
        )
        if self._bar is None:
            self.line(text)
            return
        self._speed = f"{_short(speed)} tok/s  wait {row.get('speed/data_wait', 0.0):.0%}"
        self._note(text)
        self.step(done, total, task)

    def close(self) -> None:
        """Take the bar down and close the log."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None

    _speed = ""

    def _take(self, done: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name.endswith("/loss"):
                task = name.removesuffix("/loss")
                before = self._smooth.get(task, value)
                self._smooth[task] = _SMOOTHING * before + (1 - _SMOOTHING) * value
        now = time.perf_counter()
        began, step = self._last
        if done > step:
            rate = (done - step) / max(now - began, 1e-9)
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        self._last = (now, done)

    def _losses(self) -> str:
        return " ".join(f"{task} {loss:.3f}" for task, loss in self._smooth.items())

    def _doing(self, task: str) -> str:
        return f"{task:5s} {self._losses()}  {self._speed}".rstrip()

    def _eta(self, done: int, total: int) -> str:
        if not self._rate:
            return "-"
        seconds = int((total - done) / self._rate)
        days, rest = divmod(seconds, 86400)
        clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
        return f"{days}d {clock}" if days else clock

    def _note(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 10_000 else f"{number:.0f}"
