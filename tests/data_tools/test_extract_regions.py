"""``python -m data_tools.extract_regions``: from pictures to stores, in shares, after a kill, and by mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from data_tools import extract_regions
from data_tools.regions import source as region_source
from tests.data_tools.test_regions import small_detector, write_pictures
from vlscale.data.image_store import ImageStore
from vlscale.data.store import ClassStore
from vlscale.errors import VlscaleError


def make_small(options):
    """The published detector's network, three layers deep, with the weights that the command line names."""
    from data_tools.regions import weights

    detector = small_detector()
    weights.load(detector, options.weights)
    return detector


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "pictures", 7)


@pytest.fixture
def detector_weights(tmp_path):
    path = tmp_path / "detector.safetensors"
    save_file(small_detector(3).state_dict(), path)
    return path


@pytest.fixture
def grid_weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "resnet18.safetensors"
    save_file(models.resnet18(num_classes=3).state_dict(), path)
    return path


def files_of(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in ("images", "classes")
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def extract(out, pictures, weights, *more):
    return extract_regions.run(
        ["bottom_up", str(pictures), "--out", str(out), "--weights", str(weights), "--batch", "2", *more], make_small
    )


def test_features_classes_and_attributes_reach_their_stores(tmp_path, pictures, detector_weights):
    (pictures / "a" / "p2.png").write_bytes(b"no picture")
    report = extract(tmp_path / "out", pictures, detector_weights, "--on-error", "skip", "--max-regions", "20")
    assert report["rows"] == 6
    assert "p2.png" in (tmp_path / "out" / "dropped-images.jsonl").read_text()
    images = ImageStore(tmp_path / "out" / "images")
    assert [images.row(row)["id"] for row in range(6)] == [f"a/p{number}" for number in (0, 1, 3, 4, 5, 6)]
    features, boxes, counts, region_rows = images.regions(np.arange(6), 100)
    assert features.dtype in (torch.float16, np.float16)
    assert features.shape[1] == 128
    assert 6 <= len(boxes) <= 120
    first = images.row(0)["extra"]
    assert len(first["objects"]) == len(first["attributes"]) == len(first["attributes_conf"]) == int(counts[0])
    classes = ClassStore(tmp_path / "out" / "classes")
    probs = np.asarray(classes.probs(np.asarray(region_rows)), np.float32)
    assert probs.shape == (len(boxes), 7)
    assert np.allclose(probs.sum(1), 1, atol=5e-3)


def test_shares_and_a_kill_give_the_same_bytes(tmp_path, pictures, detector_weights, monkeypatch):
    monkeypatch.setattr(region_source, "PART", 2)
    extract(tmp_path / "whole", pictures, detector_weights)
    for share in ("0/3", "1/3", "2/3"):
        extract(tmp_path / "shares", pictures, detector_weights, "--shard", share)
    assert not (tmp_path / "shares" / "images").exists()
    extract(tmp_path / "shares", pictures, detector_weights, "--merge")
    assert files_of(tmp_path / "shares") == files_of(tmp_path / "whole")

    calls = []

    def stops(decode, path):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(path)

    with monkeypatch.context() as patch:
        patch.setattr(region_source, "decode", partial(stops, region_source.decode))
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path / "stopped", pictures, detector_weights)
    again = []
    with monkeypatch.context() as patch:
        decode = region_source.decode
        patch.setattr(region_source, "decode", lambda path: again.append(path) or decode(path))
        extract(tmp_path / "stopped", pictures, detector_weights)
    assert 0 < len(again) < 7  # what was finished is not extracted again
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    with pytest.raises(VlscaleError, match="exists"):
        extract(tmp_path / "whole", pictures, detector_weights)


def test_given_boxes(tmp_path, pictures, detector_weights):
    boxes = tmp_path / "boxes.jsonl"
    rows = [{"image": f"a/p{number}", "boxes": [[0, 0, 45, 30], [9, 9, 90, 60]]} for number in range(7)]
    boxes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extract(tmp_path / "out", pictures, detector_weights, "--boxes", str(boxes))
    found = ImageStore(tmp_path / "out" / "images").regions(np.array([0]), 100)
    assert int(found[2][0]) == 2
    assert np.allclose(np.asarray(found[1]), [[0, 0, 0.5, 0.5], [0.1, 0.15, 1, 1]])


def test_grid_features_from_the_command_line(tmp_path, pictures, grid_weights):
    command = [sys.executable, "-m", "data_tools.extract_regions", "grid", pictures, "--out", tmp_path / "out"]
    command += ["--weights", grid_weights, "--backbone", "resnet18", "--classes", "3", "--size", "96"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = ImageStore(tmp_path / "out" / "images")
    features, boxes, counts, _ = images.regions(np.arange(7), 100)
    assert features.shape == (63, 512)
    assert np.asarray(counts).tolist() == [9] * 7
    assert not (tmp_path / "out" / "classes").exists()
    assert np.asarray(boxes).max() == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bottomup", "F"], "extractor 'bottomup' is not known"),
        (["grid", "F", "--out", "O"], "--weights"),
        (["grid", "F", "--out", "O", "--weights", "W", "--min-regions", "3"], "--min-regions"),
        (["grid", "F", "--out", "O", "--weights", "W"], "W: no such file"),
        (
            ["bottom_up", "F", "--out", "O", "--weights", "W", "--min-regions", "30", "--max-regions", "20"],
            "is more than",
        ),
        (["bottom_up", "F", "--out", "O", "--weights", "W", "--box-format", "xywh"], "give both"),
        (["bottom_up", "F", "--out", "O", "--weights", "W", "--device", "cuda:9"], "cuda:9: not usable here"),
        (["bottom_up", "F", "--out", "O", "--weights", "W", "--nms", "1.5"], "is not a number in 0..1"),
        (["bottom_up", "F", "--out", "O", "--weights", "W", "--batch", "0"], "is not a whole number"),
        (["torchvision", "F", "--out", "O", "--weights", "W", "--shard", "3/3"], "is not i/n"),
        (["torchvision", "F", "--out", "O", "--weights", "W", "--detector", "yolo"], "yolo"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, pictures, arguments, says):
    monkeypatch.chdir(tmp_path)
    pictures.rename("F")
    with pytest.raises(SystemExit) as stop:
        extract_regions.main(arguments)
    found = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in found
    assert found.count("\n") == 1
    assert not (tmp_path / "O" / "images").exists()
