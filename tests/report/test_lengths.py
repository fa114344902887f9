"""Histograms in text and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from tests.data.toy import toy_lengths
from vlscale.data.inspection import describe_histogram
from vlscale.data.plan_figures import PlanFigures, plan_figures
from vlscale.data.source import PlanSettings
from vlscale.data.survey import Histogram
from vlscale.errors import VlscaleError
from vlscale.report.lengths import bars, check_png, draw_lengths, histogram_table, quantile_table


def histogram(*values: int) -> Histogram:
    found = Histogram()
    found.add(np.array(values, np.int32))
    return found


def rendered(table: object) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.fixture(scope="module")
def figures() -> PlanFigures:
    return plan_figures(toy_lengths(images=100), "mlm", PlanSettings(1, micro_batch_tokens=200), 2, 2)


def test_bars_of_a_table_are_in_proportion() -> None:
    said = rendered(histogram_table("tokens", describe_histogram(histogram(3, 3, 3, 3, 5, 5, 9)), "#"))
    lengths = {line.split()[0]: line.count("#") for line in said.splitlines() if "%" in line}
    assert lengths["3"] == 2 * lengths["5"] > 0
    assert 0 < lengths["9"] < lengths["5"]
    assert lengths["4"] == 0
    assert "57.1%" in said


def test_quantiles_are_listed() -> None:
    said = rendered(quantile_table({"tokens": describe_histogram(histogram(*range(1, 101)))}))
    row = next(line for line in said.splitlines() if line.startswith(" tokens per text"))
    assert row.split()[3:] == ["100", "50.5", "1", "1", "5", "25", "50", "75", "95", "99", "100"]


@pytest.mark.parametrize("most", [1, 7, 60, 61, 1000])
def test_bars_count_every_length_once(most: int) -> None:
    values = np.random.default_rng(most).integers(1, most + 1, 500)
    left, counts, width = bars(histogram(*values))
    assert len(left) <= 60
    assert counts.sum() == 500
    for at, count in zip(left, counts, strict=True):
        assert count == ((values >= at) & (values < at + width)).sum()


def test_a_picture_is_drawn_with_and_without_a_plan(tmp_path: Path, figures: PlanFigures) -> None:
    shown = {"tokens": histogram(3, 4, 9), "regions": histogram(36, 36), "joint": histogram(41, 47)}
    alone = imread(draw_lengths(shown, None, tmp_path / "a.png", "toy"))
    both = imread(draw_lengths(shown, figures, tmp_path / "b.png", "toy"))
    assert alone.shape[1] == both.shape[1] > 1000
    assert both.shape[0] > 1.5 * alone.shape[0]
    for picture in (alone, both):  # nothing is cut off: the outermost pixels are blank
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges[:, :3] == 1).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_the_panel_of_micro_batches_shows_the_budget(tmp_path: Path, figures: PlanFigures) -> None:
    picture = imread(draw_lengths({}, figures, tmp_path / "a.png", "toy"))[..., :3]
    red = (np.abs(picture - np.array([0xD6, 0x27, 0x28]) / 255) < 0.05).all(-1)
    assert red.any(1).sum() >= 1
    assert red.sum(1).max() > 0.8 * picture.shape[1]


def test_many_micro_batches_are_thinned(tmp_path: Path) -> None:
    found = plan_figures(toy_lengths(images=400), "mlm", PlanSettings(1, micro_batch_tokens=60), 8, 2)
    many = PlanFigures(**{**found.__dict__, "tokens": np.tile(found.tokens, (200, 1))})
    assert draw_lengths({}, many, tmp_path / "a.png", "toy").is_file()


def test_a_title_with_a_dollar_sign_is_no_formula(tmp_path: Path) -> None:
    assert draw_lengths({"tokens": histogram(1, 2)}, None, tmp_path / "a.png", "$\\frac{$").is_file()


@pytest.mark.parametrize("name", ["a.jpg", "none/a.png", "folder.png"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(VlscaleError, match="--png"):
        check_png(tmp_path / name)


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(VlscaleError, match="no lengths to draw"):
        draw_lengths({"tokens": Histogram()}, None, tmp_path / "a.png", "toy")
    assert not list(tmp_path.iterdir())
