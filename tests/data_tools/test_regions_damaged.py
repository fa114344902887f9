"""Region extraction: pictures, links, boxes and weights that are bad, and devices that are too small."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_tools.records import BadRow
from data_tools.regions import weights
from data_tools.regions.bottom_up import BottomUp
from data_tools.regions.pictures import decode, find
from data_tools.regions.source import RegionSource, read_boxes
from tests.data_tools.test_regions import picture, small_detector, write_pictures
from vlscale.errors import VlscaleError


def test_damaged_weights_are_one_line(tmp_path):
    """Cut off, and with changed bytes, in every way that torch writes: the reader fails in many ways."""
    rng = np.random.default_rng(0)
    written = []
    torch.save({"model": {"a": torch.ones(3), "b": torch.zeros(2, 2)}}, tmp_path / "new.pth")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.ones(3)}, tmp_path / "s.safetensors")
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        for attempt in range(150):
            damaged = bytearray(data[: int(rng.integers(0, len(data)))] if attempt % 2 else data)
            for place in rng.integers(0, max(1, len(damaged)), 3 if damaged else 0):
                damaged[place] = int(rng.integers(0, 256))
            path.write_bytes(damaged)
            try:
                weights.read(path)
            except VlscaleError as error:
                written.append(str(error))
    assert len(written) > 200
    assert not any("\n" in text for text in written)


def test_tensors_that_are_not_plain_are_refused(tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "w.pth")
    with pytest.raises(VlscaleError, match="sparse"):
        weights.read(tmp_path / "w.pth")


def test_bad_weights(tmp_path):
    detector, path = small_detector(), tmp_path / "w.pth"
    with pytest.raises(VlscaleError, match="no such file"):
        weights.load(detector, path)
    good = detector.state_dict()
    name = "roi_heads.box_predictor.cls_score.bias"
    for state, says in (
        ({key: value for key, value in good.items() if key != name}, f"{name}' is missing"),
        ({**good, "more": torch.ones(1)}, "'more' is not part"),
        ({**good, name: torch.ones(3)}, r"shape \[3\], expected \[7\]"),
        ({**good, name: torch.full((7,), float("nan"))}, "NaN"),
        ([1, 2], "not a mapping"),
    ):
        torch.save(state, path)
        with pytest.raises(VlscaleError, match=says):
            weights.load(detector, path)
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(VlscaleError, match="tensors alone"):
        weights.load(detector, path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1: JSONDecodeError"),
        ('{"image": "a"}', "KeyError"),
        ('{"image": 3, "boxes": [[1, 2, 3, 4]]}', "expected"),
        ('{"image": "a", "boxes": [[1, 2, 3]]}', "expected"),
        ('{"image": "a", "boxes": []}', "expected"),
        ('{"image": "a", "boxes": [[1, 2, 3, 1e99]]}', "NaN or infinity"),
        ('{"image": "a", "boxes": [[1, 2, 3, 4]]}\n{"image": "a", "boxes": [[1, 2, 3, 4]]}', "line 2: .* twice"),
    ],
)
def test_bad_box_files(tmp_path, line, says):
    (tmp_path / "boxes.jsonl").write_text(line)
    with pytest.raises(VlscaleError, match=says):
        read_boxes(tmp_path / "boxes.jsonl", "xyxy")


def test_pictures_are_found_and_bombs_are_not_opened(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pictures", 2)
    outside = tmp_path / "outside.png"
    Image.fromarray(picture(5, 5)).save(outside)
    assert list(find(folder)) == ["a/p0.png", "a/p1.png"]
    monkeypatch.setattr("data_tools.regions.pictures.MAX_PIXELS", 1000)
    assert isinstance(decode(folder / "a" / "p0.png"), BadRow)
    Image.fromarray(picture(2, 400)).save(folder / "strip.png")
    assert "strip" in str(decode(folder / "strip.png"))
    with pytest.raises(VlscaleError, match="no pictures"):
        find(outside.parent / "pictures" / "b") if (folder / "b").mkdir() else find(folder / "b")
    with pytest.raises(VlscaleError, match="no such folder"):
        find(tmp_path / "nowhere")


def test_links_are_followed_or_listed_but_never_passed_over(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 2)
    outside = write_pictures(tmp_path / "outside", 1)
    (folder / "b.png").symlink_to(outside / "a" / "p0.png")
    (folder / "c.png").symlink_to(folder / "a" / "p0.png")
    (folder / "d.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "e").symlink_to(outside)
    (folder / "f").symlink_to(folder)
    os.mkfifo(folder / "g.png")
    found = find(folder)
    assert [name for name, why in found.items() if not why] == ["a/p0.png", "a/p1.png", "c.png"]
    assert {name: why.partition(";")[0] for name, why in found.items() if why} == {
        "b.png": "is a link that leads out of the folder",
        "d.png": "is a link that leads to no file",
        "e": "is a linked folder",
        "f": "is a linked folder",
        "g.png": "is not a file",
    }
    followed = find(folder, follow_links=True)
    assert [name for name, why in followed.items() if not why] == [
        "a/p0.png",
        "a/p1.png",
        "b.png",
        "c.png",
        "e/a/p0.png",
    ]
    assert followed["f"] == "is a link to a folder that it lies in"
    source = RegionSource(folder, small_detector)
    rows = [row for row in source.read(source.parts()[0]) if isinstance(row, BadRow)]
    assert [str(row) for row in rows] == [f"{folder / name}: {why}" for name, why in found.items() if why]


EXIF_TRUNCATED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"


def test_no_damaged_picture_is_more_than_a_bad_row(tmp_path, monkeypatch):
    path = tmp_path / "p.jpg"
    Image.fromarray(picture(40, 30)).save(path, exif=EXIF_TRUNCATED)
    assert isinstance(decode(path), (np.ndarray, BadRow))
    good = {}
    for kind in ("jpeg", "png", "webp", "bmp"):
        Image.fromarray(picture(40, 30)).save(tmp_path / kind, format=kind)
        good[kind] = (tmp_path / kind).read_bytes()
    rng = np.random.default_rng(0)
    for data in good.values():
        for _ in range(60):
            damaged = bytearray(data[: int(rng.integers(1, len(data) + 1))])
            for place in rng.integers(0, len(damaged), 4):
                damaged[place] = int(rng.integers(0, 256))
            path.write_bytes(damaged)
            assert isinstance(decode(path), (np.ndarray, BadRow))
    path.write_bytes(good["jpeg"])
    for error in (struct.error("unpack requires 2 bytes"), KeyError("x"), TypeError("a\nb"), zlib.error("bad")):
        monkeypatch.setattr("data_tools.regions.pictures.ImageOps.exif_transpose", _raising(error))
        found = decode(path)
        assert isinstance(found, BadRow)
        assert type(error).__name__ in str(found)
        assert "\n" not in str(found)


def _raising(error):
    def fails(*_):
        raise error

    return fails


@pytest.mark.parametrize("batch", [4, 1])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory")]
)
def test_too_little_memory_is_one_line_that_names_the_cure(tmp_path, monkeypatch, batch, error):
    folder = write_pictures(tmp_path / "pictures", 2)
    source = RegionSource(folder, small_detector, batch=batch, device="cpu")
    monkeypatch.setattr(BottomUp, "extract", _raising(error))
    cure = "give a smaller --batch than 4" if batch == 4 else "use another --device"
    with pytest.raises(VlscaleError, match=rf"too small for --batch {batch}; {cure}"):
        list(source.read(source.parts()[0]))
    monkeypatch.setattr(BottomUp, "extract", _raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        list(source.read(source.parts()[0]))


def test_two_pictures_of_one_name(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    Image.fromarray(picture(9, 9)).save(folder / "a" / "p0.jpg")
    with pytest.raises(VlscaleError, match="same name up to its suffix"):
        RegionSource(folder, small_detector).parts()
