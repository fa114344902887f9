"""The bottom-up detector's forward pass against its definition, written once more: taps instead of convolutions, loops
instead of pooling and suppression, float64 instead of float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_tools.regions.bottom_up import BottomUp, BottomUpConfig
from data_tools.regions.types import Choice

SMALL = BottomUpConfig(blocks=(2, 1, 2, 2), width=4, classes=7, attributes=5, rpn_width=8, class_width=3)
MEAN_BGR = np.array([102.9801, 115.9465, 122.7717])


def detector_with_statistics(seed, image):
    """A detector whose normalisations do something, and which sees several classes in the picture."""
    torch.manual_seed(seed)
    detector = BottomUp(SMALL)
    for name, value in detector.state_dict().items():
        if name.endswith("norm.weight") or name.endswith("running_var"):
            value.uniform_(0.7, 1.6)
        elif name.endswith(("norm.bias", "running_mean")):
            value.normal_(0, 0.3)
    torch.nn.init.normal_(detector.proposal_generator.rpn_head.anchor_deltas.weight, std=0.3)
    torch.nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=1)
    torch.nn.init.normal_(detector.roi_heads.box_predictor.attr_linear1.weight, std=0.4)
    torch.nn.init.normal_(detector.roi_heads.box_predictor.attr_linear2.weight, std=0.6)
    scores = detector.roi_heads.box_predictor.cls_score
    middle = torch.from_numpy(detector.extract([image], [None], Choice())[0].features).mean(0)
    scores.bias.data.copy_(-scores.weight.data @ middle)
    return detector


class Reference:
    """The same, from the state dict alone: maps are [C, H, W] and float64."""

    def __init__(self, state):
        self.state = {name: value.double() for name, value in state.items() if value.is_floating_point()}

    def taps(self, name, x, padding=0, stride=1, dilation=1):
        """A convolution as a sum over the places of its window."""
        weight = self.state[f"{name}.weight"]
        height, width = x.shape[1:]
        framed = x.new_zeros(len(x), height + 2 * padding, width + 2 * padding)
        framed[:, padding : padding + height, padding : padding + width] = x
        reach = dilation * (weight.shape[2] - 1)
        rows, columns = ((side + 2 * padding - reach - 1) // stride + 1 for side in (height, width))
        out = x.new_zeros(len(weight), rows, columns)
        for dy in range(weight.shape[2]):
            for dx in range(weight.shape[3]):
                seen = framed[:, dy * dilation :: stride, dx * dilation :: stride][:, :rows, :columns]
                out += torch.einsum("oc,chw->ohw", weight[:, :, dy, dx], seen)
        return out

    def normal(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.norm.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def pointwise(self, name, x):
        return self.normal(name, torch.einsum("oc,chw->ohw", self.state[f"{name}.weight"][:, :, 0, 0], x))

    def block(self, name, x, stride, dilation):
        thinned = x[:, ::stride, ::stride]  # strides stand in the 1x1 convolutions
        inner = self.pointwise(f"{name}.conv1", thinned).clamp(min=0)
        inner = self.normal(f"{name}.conv2", self.taps(f"{name}.conv2", inner, dilation, 1, dilation)).clamp(min=0)
        around = self.pointwise(f"{name}.shortcut", thinned) if f"{name}.shortcut.weight" in self.state else thinned
        return (self.pointwise(f"{name}.conv3", inner) + around).clamp(min=0)

    def stage(self, name, x, blocks, stride, dilation=1):
        for number in range(blocks):
            x = self.block(f"{name}.{number}", x, stride if number == 0 else 1, dilation)
        return x

    def prepare(self, picture):
        """Resized as cv2's linear interpolation does, BGR, centred; and the scale."""
        short, long = sorted(picture.shape[:2])
        scale = 600 / short
        if round(scale * long) > 1000:
            scale = 1000 / long
        turns = []
        for side in picture.shape[:2]:
            size = round(side * scale)
            turn = np.zeros((size, side))
            for place in range(size):
                at = min(max((place + 0.5) * side / size - 0.5, 0), side - 1)
                low = min(int(at), side - 1)
                turn[place, low] += 1 - (at - low)
                turn[place, min(low + 1, side - 1)] += at - low
            turns.append(turn)
        bgr = picture[:, :, ::-1].astype(np.float64)
        resized = np.einsum("yh,hwc,xw->cyx", turns[0], bgr, turns[1], optimize=True)
        return torch.from_numpy(resized - MEAN_BGR[:, None, None]), scale

    def trunk(self, x):
        x = self.normal("backbone.stem.conv1", self.taps("backbone.stem.conv1", x, 3, 2)).clamp(min=0)
        # 3x3 windows, stride 2, none of them padded, the last ones cut off by the border
        rows, columns = (math.ceil((side - 3) / 2) + 1 for side in x.shape[1:])
        pooled = torch.stack([
            torch.stack([x[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3].amax((1, 2)) for c in range(columns)], 1)
            for r in range(rows)
        ], 1)  # fmt: skip
        for number, (blocks, stride) in enumerate(zip(SMALL.blocks[:3], (1, 2, 2), strict=True)):
            pooled = self.stage(f"backbone.res{number + 2}", pooled, blocks, stride)
        return pooled

    def proposals(self, map_, size, scale):
        """[P, 4] in pixels of the resized picture."""
        head = "proposal_generator.rpn_head."
        hidden = (self.taps(f"{head}conv", map_, 1) + self.state[f"{head}conv.bias"].view(-1, 1, 1)).clamp(min=0)
        logits, deltas = (
            self.taps(f"{head}{name}", hidden) + self.state[f"{head}{name}.bias"].view(-1, 1, 1)
            for name in ("objectness_logits", "anchor_deltas")
        )
        boxes, scores = [], []
        for row in range(map_.shape[1]):
            for column in range(map_.shape[2]):
                for anchor, (width, height) in enumerate(anchor_sides()):
                    dx, dy, dw, dh = deltas[4 * anchor : 4 * anchor + 4, row, column].tolist()
                    # a cell's middle lies at 7.5, and an anchor of n pixels begins (n - 1) / 2 before it
                    x, y = 16 * column + 7.5 + 0.5 + dx * width, 16 * row + 7.5 + 0.5 + dy * height
                    w, h = (side * math.exp(min(d, math.log(1000 / 16))) for side, d in ((width, dw), (height, dh)))
                    limits = (size[1] - 1, size[0] - 1) * 2
                    box = [
                        min(max(edge, 0), most)
                        for edge, most in zip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), limits, strict=True)
                    ]
                    if min(box[2] - box[0], box[3] - box[1]) + 1 > 16 * scale:
                        boxes.append(box)
                        back, front = logits[anchor, row, column].item(), logits[12 + anchor, row, column].item()
                        scores.append(1 / (1 + math.exp(back - front)))
        boxes, scores = np.array(boxes), np.array(scores)
        order = np.argsort(-scores, kind="stable")[:6000]
        return boxes[order[survivors(boxes[order], 0.7)[:300]]]

    def pool(self, map_, box):
        """RoIPool: [C, 14, 14] of one box in pixels of the resized picture."""
        x1, y1, x2, y2 = (math.floor(edge / 16 + 0.5) for edge in box)
        out = map_.new_zeros(len(map_), 14, 14)
        height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
        for row in range(14):
            for column in range(14):
                top, bottom = (y1 + each for each in (row * height // 14, -(-(row + 1) * height // 14)))
                left, right = (x1 + each for each in (column * width // 14, -(-(column + 1) * width // 14)))
                seen = map_[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
                if seen.numel():
                    out[:, row, column] = seen.amax((1, 2))
        return out

    def linear(self, name, x):
        name = f"roi_heads.box_predictor.{name}"
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def heads(self, map_, boxes):
        """Features [R, D], class probabilities [R, C] and attribute probabilities [R, A]."""
        blocks = SMALL.blocks[3]
        maps = [self.stage("roi_heads.res5", self.pool(map_, box), blocks, 1, dilation=2) for box in boxes]
        features = torch.stack([each.flatten(1).mean(1) for each in maps])
        scores = self.linear("cls_score", features)
        embedded = self.state["roi_heads.box_predictor.cls_embed.weight"][scores.argmax(1)]
        hidden = self.linear("attr_linear1", torch.cat([features, embedded], 1)).clamp(min=0)
        return [
            each.numpy()
            for each in (features, probabilities(scores), probabilities(self.linear("attr_linear2", hidden)))
        ]


def probabilities(scores):
    powers = (scores - scores.max(1, keepdim=True).values).exp()
    return powers / powers.sum(1, keepdim=True)


def anchor_sides():
    """Width and height in pixels of the 12 anchors, ratio by ratio: 16 x 16 reshaped, rounded, enlarged."""
    for ratio in (0.5, 1.0, 2.0):
        width = round(math.sqrt(256 / ratio))
        for scale in (4, 8, 16, 32):
            yield width * scale, round(width * ratio) * scale


def survivors(boxes, overlap):
    """Indices of boxes that no earlier survivor covers; the last pixel belongs to a box."""
    kept = []
    areas = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    for place, (x1, y1, x2, y2) in enumerate(boxes):
        sides = np.minimum(boxes[kept, 2:], (x2, y2)) - np.maximum(boxes[kept, :2], (x1, y1)) + 1
        inside = sides.clip(min=0).prod(1)
        if (inside <= overlap * (areas[kept] + areas[place] - inside)).all():
            kept.append(place)
    return kept


def picture(height, width, seed):
    """Coarse noise, so that resizing leaves something of it."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return np.repeat(np.repeat(small, 6, 0), 6, 1)


def assert_heads(found, features, probs, attributes):
    assert np.abs(features).max() > 0.1
    np.testing.assert_allclose(found.features, features, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found.class_probs, probs, atol=1e-4)
    np.testing.assert_array_equal(found.objects, 1 + probs[:, 1:].argmax(1))
    np.testing.assert_array_equal(found.attributes[0], 1 + attributes[:, 1:].argmax(1))
    np.testing.assert_allclose(found.attributes[1], attributes[:, 1:].max(1), atol=1e-4)


# 600 x 825; 1000 x 433, where the longer side rules
@pytest.mark.parametrize(("height", "width"), [(96, 132), (180, 78)])
def test_given_boxes_get_the_features_classes_and_attributes_of_the_definition(height, width):
    image = picture(height, width, 3)
    detector = detector_with_statistics(1, image)
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.5, (8, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.05, 0.5, (8, 2))], 1) * [width, height, width, height]
    boxes[0] = [0, 0, width - 1, height - 1]  # the whole would end halfway between two cells: 600 / 16 = 37.5
    found = detector.extract([image], [boxes.astype(np.float32)], Choice())[0]
    reference = Reference(detector.state_dict())
    pixels, scale = reference.prepare(image)
    assert sorted(pixels.shape[1:]) == ([600, 825] if width == 132 else [433, 1000])
    features, probs, attributes = reference.heads(reference.trunk(pixels), boxes * scale)
    assert_heads(found, features, probs, attributes)
    assert len(set(probs.argmax(1))) > 1  # so that embeddings differ
    np.testing.assert_allclose(found.conf, probs[:, 1:].max(1), atol=1e-4)


def test_detected_regions_are_those_of_the_definition():
    image = picture(96, 132, 4)
    detector = detector_with_statistics(2, image)
    choice = Choice(minimum=6, maximum=24, confidence=0.2)
    found = detector.extract([image], [None], choice)[0]
    reference = Reference(detector.state_dict())
    pixels, scale = reference.prepare(image)
    map_ = reference.trunk(pixels)
    boxes = reference.proposals(map_, pixels.shape[1:], scale)
    assert len(boxes) > 30
    features, probs, attributes = reference.heads(map_, boxes)
    confidence = np.zeros(len(boxes))
    for kind in range(1, SMALL.classes):
        order = np.argsort(-probs[:, kind], kind="stable")
        kept = order[survivors(boxes[order] / scale, 0.3)]
        confidence[kept] = np.maximum(confidence[kept], probs[kept, kind])
    order = np.argsort(-confidence, kind="stable")
    kept = order[: min(max((confidence >= 0.2).sum(), 6), 24)]
    np.testing.assert_allclose(found.conf, confidence[kept], atol=1e-4)
    np.testing.assert_allclose(found.boxes, boxes[kept] / scale, atol=1e-3)
    assert_heads(found, features[kept], probs[kept], attributes[kept])
