from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vlscale.report.outcome import Outcome
from vlscale.report.table import METRICS, Split, build_table, show, summarise, write_summary


def _split(names: tuple[str, ...] = (*METRICS, "grounding", "mrfr_relative_error"), left_out: bool = False) -> Split:
    values, clusters = np.array([1.0, 0, 1, 1]), np.arange(4)
    trained = {name: Outcome(values, clusters, 0.25, extra={"candidates": 4}) for name in names}
    if "alignment_accuracy" in names:
        trained["alignment_accuracy"] = Outcome(values, clusters, 0.25, baseline=0.3)
    untrained = {name: Outcome(values[::-1] * 0.5, clusters, 0.25) for name in names}
    why = {"mrc_accuracy": "no classes store"} if left_out else {}
    return Split("val", "f" * 64, 4, 16, trained, untrained, why)


def test_summary_has_the_promised_form(tmp_path: Path) -> None:
    path = write_summary(tmp_path / "summary.json", {"metrics": _split(), "unseen_pictures": _split()}, 1)
    found = json.loads(path.read_text())
    for key in ("metrics", "unseen_pictures"):
        assert tuple(found[key]) == METRICS
        for row in found[key].values():
            assert (row["trained"], row["untrained"], row["chance"], row["n"]) == (0.75, 0.375, 0.25, 4)
            low, high = row["interval"]["trained"]
            assert low < 0.75 < high
    assert found["metrics"]["alignment_accuracy"]["baseline"] == 0.3
    assert set(found["reported"]["metrics"]) == {"grounding", "mrfr_relative_error"}
    assert found["datasets"]["metrics"] == {"name": "val", "fingerprint": "f" * 64, "images": 4, "texts": 16}
    assert not list(tmp_path.glob(".*"))


def test_what_was_not_measured_is_left_out_and_named() -> None:
    split = _split(("itm_accuracy",), left_out=True)
    found = summarise({"metrics": split}, 1)
    assert set(found["metrics"]) == {"itm_accuracy"}
    assert found["left_out"] == {"metrics": {"mrc_accuracy": "no classes store"}}
    console = Console(width=80)
    with console.capture() as captured:
        show({"metrics": split}, 1, console)
    text = captured.get()
    assert "left out on val: mrc_accuracy: no classes store" in text
    assert "masked region" not in text


@pytest.mark.parametrize("unseen", [False, True])
def test_table_fits_a_terminal_of_80_columns(unseen: bool) -> None:
    splits = {"metrics": _split()} | ({"unseen_pictures": _split()} if unseen else {})
    console = Console(width=80)
    with console.capture() as captured:
        console.print(build_table(splits, 1))
    text = captured.get()
    assert "…" not in text
    assert text.count("0.750 ±") == 11
    assert ("unseen" in text) == unseen
    (row,) = [line for line in text.splitlines() if "by plan" in line]
    assert row.split()[5:] == ["0.750", "±0.375", "0.375", "0.250", "0.300", *(["0.750"] if unseen else [])]
