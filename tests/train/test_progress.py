"""A bar on a terminal, plain lines elsewhere, the same lines in the log, and silence in other processes."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from vlscale.train.progress import Reporter

ROW = {"mlm/loss": 2.0, "speed/tokens_per_s": 12345.0, "speed/data_wait": 0.25}


def run(active: bool, terminal: bool, log: Path) -> str:
    out = io.StringIO()
    reporter = Reporter(active, log, Console(file=out, force_terminal=terminal, width=160, highlight=False))
    reporter.line("hello [world]")
    reporter.start(0, 4)
    for step in (1, 2):
        reporter.step(step, 4, "mlm")
        reporter.row(step, 4, "mlm", 1e-3, ROW | {"mlm/loss": 2.0 * step})
    reporter.close()
    return out.getvalue()


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    lines = run(True, False, tmp_path / "log").splitlines()
    assert lines[0] == "hello [world]"
    assert lines[1].startswith("step 1/4  mlm 2.000  lr 1.00e-03  12.3k tokens/s  data wait 25%  ETA ")
    assert lines[2].startswith("step 2/4  mlm 3.000"), "losses are smoothed"
    logged = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == lines


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    text = run(True, True, tmp_path / "log")
    assert "mlm" in text
    assert "2/4" in text
    assert "step 2/4  mlm 3.000" not in text
    assert "step 2/4  mlm 3.000" in (tmp_path / "log").read_text(encoding="utf-8")


def test_other_processes_say_nothing(tmp_path: Path) -> None:
    assert run(False, True, tmp_path / "log") == ""
    assert not (tmp_path / "log").exists()
