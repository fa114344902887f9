from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from tests.report.scenes import OracleModel, heldout, make_scenes
from vlscale.config import WraSection
from vlscale.report.heldout import HeldOut
from vlscale.report.pictures import choose_text, draw_grounding, load_picture

SECTION = WraSection(tokens="words")


@pytest.mark.parametrize("tokens", ["all", "words"])
def test_picture_of_a_blank_canvas(scenes: HeldOut, tmp_path: Path, tokens: str) -> None:
    section = WraSection(tokens=tokens)  # type: ignore[arg-type]
    path = draw_grounding(OracleModel(), scenes, section, tmp_path / "g.png")
    assert path == tmp_path / "g.png"
    height, width = imread(path).shape[:2]
    assert width > 1000
    assert height > 400


def test_the_scene_is_shown_if_it_is_there(tmp_path: Path) -> None:
    root = make_scenes(tmp_path / "s", 10)
    found = heldout(root)
    image = found.first_image[choose_text(found, found.mentions)]
    blank = imread(draw_grounding(OracleModel(), found, SECTION, tmp_path / "a.png"))
    (root / "scenes").mkdir()
    Image.new("RGB", (384, 256), (10, 200, 30)).save(root / "scenes" / f"scene-{image}.webp")
    green = imread(draw_grounding(OracleModel(), found, SECTION, tmp_path / "b.png"))
    share = lambda picture: float(((picture[..., 1] > 0.7) & (picture[..., 0] < 0.15)).mean())  # noqa: E731
    assert share(green) > 0.2
    assert share(blank) < 0.01


def test_the_caption_is_the_first_of_three_things(scenes: HeldOut) -> None:
    text = choose_text(scenes, scenes.mentions)
    named = scenes.named(scenes.captions()).sum(1)
    assert text == scenes.captions()[int(np.argmax(named >= 3))]


def test_no_ground_truth_no_picture(bare: HeldOut, tmp_path: Path) -> None:
    assert draw_grounding(OracleModel(), bare, SECTION, tmp_path / "g.png") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../secret", "a/b", "", ".hidden", "/etc/passwd", 3, "damaged", "missing"])
def test_pictures_come_from_their_folder_only(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "good.webp")
    shutil.copy(folder / "good.webp", tmp_path / "secret.webp")
    shutil.copy(folder / "good.webp", folder / ".hidden.webp")
    (folder / "damaged.webp").write_bytes(b"RIFF0000WEBPnothing")
    assert load_picture(folder, "good") is not None
    assert load_picture(folder, name) is None


def test_a_caption_of_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    found = heldout(make_scenes(tmp_path / "s", 4))
    read = found.dataset.texts.row
    found.dataset.texts.row = lambda row: read(row) | {"text": r"a $\frac{ and $"}  # type: ignore[method-assign]
    assert draw_grounding(OracleModel(), found, SECTION, tmp_path / "g.png") is not None
