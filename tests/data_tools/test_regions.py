"""Region extraction: what is chosen, what the detector computes, and pictures, boxes and weights that are bad."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from data_tools.records import BadRow, ImageRecord
from data_tools.regions import bottom_up, weights
from data_tools.regions.bottom_up import BottomUp, BottomUpConfig, apply_deltas, cell_anchors, shifted_anchors
from data_tools.regions.grid import GridBackbone
from data_tools.regions.selection import choose, inclusive, surviving_confidence
from data_tools.regions.source import RegionSource
from data_tools.regions.torchvision_detector import TorchvisionDetector
from data_tools.regions.types import Choice
from vlscale.errors import VlscaleError

SMALL = BottomUpConfig(blocks=(1, 1, 2, 1), width=4, classes=7, attributes=5, rpn_width=8, class_width=3)
EVERYTHING = Choice(minimum=10, maximum=100, confidence=0.2)


def small_detector(seed: int = 0) -> BottomUp:
    torch.manual_seed(seed)
    detector = BottomUp(SMALL)
    torch.nn.init.normal_(detector.proposal_generator.rpn_head.anchor_deltas.weight, std=0.3)
    return detector


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def overlap(one, other):
    """IoU of boxes that contain their last pixel."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    inside = max(0, right - left + 1) * max(0, bottom - top + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
    return inside / (sum(areas) - inside)


@pytest.mark.parametrize("classes", [3, 300])
def test_confidence_is_the_best_score_of_a_class_that_survives(classes):
    """Against the rule spelled out: class by class, from the strongest box down."""
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 60, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (40, 2))], 1).astype(np.float32)
    scores = rng.dirichlet(np.ones(classes), 40).astype(np.float32)
    expected = np.zeros(40)
    for kind in range(classes):
        kept: list[int] = []
        for place in np.argsort(-scores[:, kind], kind="stable"):
            if all(overlap(boxes[place], boxes[other]) <= 0.3 for other in kept):
                kept.append(place)
                expected[place] = max(expected[place], scores[place, kind])
    found = surviving_confidence(inclusive(torch.from_numpy(boxes)), torch.from_numpy(scores), 0.3)
    assert np.allclose(found.numpy(), expected)
    if classes == 3:  # suppression has taken something away
        assert (expected < scores.max(1)).any()


@pytest.mark.parametrize(
    ("above", "total", "expected"), [(3, 50, 10), (30, 50, 30), (150, 200, 100), (2, 6, 6), (0, 0, 0)]
)
def test_how_many_are_kept(above, total, expected):
    confidence = torch.cat([torch.linspace(0.9, 0.2, above), torch.linspace(0.19, 0.01, total - above)])
    confidence = confidence[torch.randperm(total, generator=torch.Generator().manual_seed(3))]
    kept = choose(confidence, EVERYTHING)
    assert len(kept) == expected
    assert torch.equal(confidence[kept], confidence.sort(descending=True).values[:expected])


def test_anchors_are_those_of_faster_rcnn():
    """The table in the comment of py-faster-rcnn's generate_anchors (scales 8, 16, 32), and ours at scale 4."""
    published = {
        (0, 8): [-84, -40, 99, 55], (0, 16): [-176, -88, 191, 103], (0, 32): [-360, -184, 375, 199],
        (1, 8): [-56, -56, 71, 71], (1, 16): [-120, -120, 135, 135], (1, 32): [-248, -248, 263, 263],
        (2, 8): [-36, -80, 51, 95], (2, 16): [-80, -168, 95, 183], (2, 32): [-168, -344, 183, 359],
    }  # fmt: skip
    found = cell_anchors().reshape(3, 4, 4)
    for (ratio, scale), box in published.items():
        assert found[ratio, bottom_up.SCALES.index(scale)].tolist() == box
    assert found[1, 0].tolist() == [-24, -24, 39, 39]
    grid = shifted_anchors(2, 3).view(2, 3, 12, 4)
    assert_close(grid[1, 2] - grid[0, 0], torch.tensor([32.0, 16, 32, 16]).expand(12, 4))


def test_deltas_move_and_scale():
    boxes = torch.tensor([[10.0, 20, 29, 59]])  # 20 x 40 pixels
    assert_close(apply_deltas(boxes, torch.zeros(1, 4)), torch.tensor([[10.0, 20, 30, 60]]))
    moved = apply_deltas(boxes, torch.tensor([[0.5, -0.25, math.log(2.0), 100.0]]))
    assert_close(moved[0, [0, 2]], torch.tensor([10.0, 50]))
    assert float(moved[0, 3] - moved[0, 1]) == pytest.approx(40 * 1000 / 16, rel=1e-5)  # growth is bounded


def test_published_names_and_shapes():
    """The port's file loads by name: a few of its names, and the sizes of the published heads."""
    with torch.device("meta"):
        state = BottomUp().state_dict()
    shapes = {
        "backbone.stem.conv1.weight": [64, 3, 7, 7],
        "backbone.res2.0.shortcut.norm.running_var": [256],
        "backbone.res4.22.conv3.norm.weight": [1024],
        "proposal_generator.rpn_head.objectness_logits.weight": [24, 512, 1, 1],
        "proposal_generator.rpn_head.anchor_deltas.bias": [48],
        "roi_heads.res5.2.conv2.weight": [512, 512, 3, 3],
        "roi_heads.box_predictor.cls_score.weight": [1601, 2048],
        "roi_heads.box_predictor.bbox_pred.weight": [6404, 2048],
        "roi_heads.box_predictor.cls_embed.weight": [1601, 256],
        "roi_heads.box_predictor.attr_linear1.weight": [512, 2304],
        "roi_heads.box_predictor.attr_linear2.weight": [401, 512],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes


def test_bottom_up_extracts_regions():
    detector = small_detector()
    pictures = [picture(120, 160), picture(90, 200, 1), picture(120, 160, 2)]
    together = detector.extract(pictures, [None] * 3, EVERYTHING)
    for one, image in zip(together, pictures, strict=True):
        count = len(one.features)
        assert 1 <= count <= 100
        assert one.features.shape == (count, 128)
        assert one.class_probs is not None
        assert one.class_probs.shape == (count, 7)
        assert np.allclose(one.class_probs.sum(1), 1, atol=1e-5)
        assert np.all(np.diff(one.conf) <= 0)
        assert np.all(one.boxes[:, :2] < one.boxes[:, 2:])
        assert np.all(one.boxes >= 0)
        assert np.all(one.boxes[:, 2:] <= [image.shape[1], image.shape[0]])
        sides = one.boxes[:, 2:] - one.boxes[:, :2]
        assert sides.min() > 15  # 16 pixels of the picture, the last one counted
        assert one.objects is not None
        assert one.objects.min() >= 1
        assert one.attributes is not None
        assert one.attributes[0].max() < 5
    alone = detector.extract(pictures[1:2], [None], EVERYTHING)[0]
    assert_close(torch.from_numpy(alone.features), torch.from_numpy(together[1].features), rtol=1e-4, atol=1e-5)
    assert np.allclose(alone.boxes, together[1].boxes, atol=1e-3)


def test_given_boxes_are_taken_as_they_are():
    detector = small_detector()
    boxes = np.array([[5, 5, 60, 70], [0, 0, 159, 119], [5, 5, 60, 70]], np.float32)
    found = detector.extract([picture(120, 160)], [boxes], EVERYTHING)[0]
    assert np.allclose(found.boxes, boxes, atol=1e-4)
    assert np.array_equal(found.features[0], found.features[2])
    assert not np.allclose(found.features[0], found.features[1])


def test_a_picture_smaller_than_an_anchor_is_one_region():
    found = small_detector().extract([picture(8, 8)], [None], EVERYTHING)[0]
    assert len(found.features) >= 1
    assert np.isfinite(found.features).all()


def test_torchvision_detector():
    torch.manual_seed(0)
    detector = TorchvisionDetector("fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=6)
    boxes = np.array([[5, 5, 60, 70], [0, 0, 159, 119]], np.float32)
    free, given = detector.extract([picture(120, 160), picture(120, 160, 1)], [None, boxes], Choice(3, 12, 0.9))
    assert 3 <= len(free.features) <= 12
    assert free.features.shape[1] == detector.feature_dim == 1024
    assert np.allclose(given.boxes, boxes, atol=1e-3)
    with pytest.raises(VlscaleError, match="did you mean 'fasterrcnn_resnet50_fpn'"):
        TorchvisionDetector("fasterrcnn_resnet50")


def test_grid_backbone():
    torch.manual_seed(0)
    grid = GridBackbone("resnet18", size=96)
    found = grid.extract([picture(50, 80), picture(30, 30)], [None, None], EVERYTHING)
    assert [one.features.shape for one in found] == [(9, 512), (9, 512)]
    assert found[0].boxes[0].tolist() == pytest.approx([0, 0, 80 / 3, 50 / 3])
    assert found[0].boxes[-1].tolist() == pytest.approx([160 / 3, 100 / 3, 80, 50])
    flat = np.zeros((64, 64, 3), np.uint8)
    flat[:, 32:] = 255
    one = grid.extract([flat], [None], EVERYTHING)[0].features.reshape(3, 3, -1)
    assert not np.allclose(one[1, 0], one[1, 2])
    with pytest.raises(VlscaleError, match="grid's boxes"):
        grid.extract([flat], [np.ones((1, 4), np.float32)], EVERYTHING)
    with pytest.raises(VlscaleError, match="multiple of 32"):
        GridBackbone("resnet18", size=100)


@pytest.mark.parametrize("wrapped", [None, "model", "state_dict"])
def test_weights_load_by_name(tmp_path, wrapped):
    state = small_detector(1).state_dict()
    torch.save(state if wrapped is None else {wrapped: state}, tmp_path / "w.pth")
    detector = small_detector(2)
    weights.load(detector, tmp_path / "w.pth")
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())


def write_pictures(folder, count=5):
    for number in range(count):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(60 + number, 90, number)).save(folder / "a" / f"p{number}.png")
    return folder


def test_source_gives_records_in_order(tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    (folder / "a" / "p2.png").write_bytes(b"not a picture")
    source = RegionSource(folder, small_detector, batch=2)
    assert source.layout().feature_dim == 128
    (part,) = source.parts()
    assert json.loads(json.dumps(part)) == part
    found = list(source.read(part))
    assert [record.id for record in found if isinstance(record, ImageRecord)] == [f"a/p{n}" for n in (0, 1, 3, 4)]
    bad = found[2]
    assert isinstance(bad, BadRow)
    assert "p2.png" in str(bad)
    record = found[0]
    assert isinstance(record, ImageRecord)
    assert record.features.dtype == np.float16
    assert record.class_probs is not None
    assert (record.width, record.height) == (90, 60)
    assert record.boxes.max() <= 1
    assert len(record.extra["objects"]) == len(record.extra["attributes"]) == len(record.features)


@pytest.mark.parametrize(("box_format", "box"), [("xyxy", [10, 20, 40, 50]), ("xywh", [10, 20, 30, 30])])
def test_given_boxes_from_a_file(tmp_path, box_format, box):
    folder = write_pictures(tmp_path / "pictures", 3)
    rows = [{"image": "a/p0", "boxes": [box]}, {"image": "a/p1", "boxes": [[50, 20, 10, 30]]}]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = RegionSource(folder, small_detector, tmp_path / "boxes.jsonl", box_format)
    good, swapped, none = source.read(source.parts()[0])
    assert isinstance(good, ImageRecord)
    assert np.allclose(good.boxes, np.array([[10 / 90, 20 / 60, 40 / 90, 50 / 60]]))
    if box_format == "xyxy":
        assert isinstance(swapped, BadRow)
        assert "boxes: [50.0, 20.0, 10.0, 30.0] is not x1 < x2" in str(swapped)
    assert "has no boxes for image 'a/p2'" in str(none)


def test_attribute_0_is_never_the_likeliest():
    detector = small_detector()
    detector.roi_heads.box_predictor.attr_linear2.bias.data[0] = 100
    found = detector.extract([picture(120, 160)], [None], EVERYTHING)[0]
    assert found.attributes is not None
    assert found.attributes[0].min() >= 1
    assert found.attributes[1].max() < 1e-3
