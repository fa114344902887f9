"""``python -m data_tools.extract_regions``: from pictures to stores, in shares, after a kill, and by mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

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


def test_shares_may_run_on_several_devices_and_be_merged_on_another_machine(
    tmp_path, pictures, detector_weights, monkeypatch
):
    monkeypatch.setattr(region_source, "PART", 2)
    extract(tmp_path / "whole", pictures, detector_weights)
    extract(tmp_path / "out", pictures, detector_weights, "--shard", "0/2", "--device", "cpu")
    extract(tmp_path / "out", pictures, detector_weights, "--shard", "1/2", "--device", "cpu:0", "--batch", "3")

    def no_network(_):
        raise AssertionError("the merge builds a network")

    command = ["bottom_up", str(pictures), "--out", str(tmp_path / "out"), "--weights", str(detector_weights)]
    extract_regions.run([*command, "--merge", "--device", "cuda:7"], no_network)
    one, other = (ImageStore(tmp_path / name / "images") for name in ("whole", "out"))
    assert [other.row(row)["id"] for row in range(7)] == [one.row(row)["id"] for row in range(7)]
    assert np.allclose(one.row(3)["features"], other.row(3)["features"], atol=1e-2)
    with pytest.raises(VlscaleError, match="nothing is built here yet"):
        extract(tmp_path / "none", pictures, detector_weights, "--merge")


def test_evaluation_images_in_folders_are_left_out(tmp_path, pictures, detector_weights, capsys):
    (pictures / "a" / "p3.png").rename(pictures / "a" / "COCO_val2014_000000000042.png")
    karpathy = tmp_path / "dataset_coco.json"
    karpathy.write_text(json.dumps({"dataset": "coco", "images": [{"cocoid": 42, "split": "val"}]}))
    options = ("--exclude-karpathy", str(karpathy))
    report = extract(tmp_path / "out", pictures, detector_weights, *options)
    assert (report["rows"], report["excluded"]) == (6, 1)
    assert "warning" not in report
    (pictures / "a" / "COCO_val2014_000000000042.png").unlink()
    capsys.readouterr()
    report = extract(tmp_path / "none", pictures, detector_weights, *options)
    assert "NOT ONE image" in report["warning"]
    assert "WARNING: " in capsys.readouterr().err


def test_mistakes_in_boxes_are_found_before_the_network_is_built(tmp_path, pictures, detector_weights):
    def no_network(_):
        raise AssertionError("built")

    boxes = tmp_path / "boxes.jsonl"
    command = ["bottom_up", str(pictures), "--out", str(tmp_path / "out"), "--weights", str(detector_weights)]
    with pytest.raises(VlscaleError, match=r"--boxes .*boxes\.jsonl: no such file"):
        extract_regions.run([*command, "--boxes", str(boxes)], no_network)
    boxes.write_text("{")
    with pytest.raises(VlscaleError, match=r"boxes\.jsonl: line 1"):
        extract_regions.run([*command, "--boxes", str(boxes)], no_network)
    assert not (tmp_path / "out" / ".parts").exists()  # which would refuse the corrected file
    rows = [{"image": f"a/p{number}", "boxes": [[0, 0, 45, 30]]} for number in range(7)]
    boxes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert extract(tmp_path / "out", pictures, detector_weights, "--boxes", str(boxes))["rows"] == 7


def test_the_store_says_what_objects_and_attributes_count(tmp_path, pictures, detector_weights):
    extract(tmp_path / "out", pictures, detector_weights)
    meta = json.loads((tmp_path / "out/images/meta.json").read_bytes())
    assert "objects 1..1600 and attributes 1..400" in json.dumps(meta)


def test_linked_pictures_are_bad_rows_or_followed(tmp_path, pictures, detector_weights):
    outside = tmp_path / "outside.png"
    (pictures / "a" / "p1.png").rename(outside)
    (pictures / "a" / "p1.png").symlink_to(outside)
    with pytest.raises(VlscaleError, match=r"p1\.png: is a link that leads out of the folder; --follow-links"):
        extract(tmp_path / "stop", pictures, detector_weights)
    report = extract(tmp_path / "skip", pictures, detector_weights, "--on-error", "skip")
    assert (report["rows"], report["dropped"]) == (6, {"row": 1})
    assert extract(tmp_path / "follow", pictures, detector_weights, "--follow-links")["rows"] == 7


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
    if "yolo" in arguments:
        Path("W").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        extract_regions.main(arguments)
    found = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in found
    assert found.count("\n") == 1
    assert not (tmp_path / "O" / "images").exists()
