"""The bottom-up-attention detector: Faster R-CNN on ResNet-101 C4, Visual Genome classes and attributes.

Published UNITER, UNIMO, LXMERT and ViLBERT models expect its 2048 features per region. Module names are those of the
PyTorch port of the Caffe weights (github.com/MILVLG/bottom-up-attention.pytorch, bua-caffe-frcn-r101_with_attributes),
so that file loads as it is. What it does, from peteanderson80/bottom-up-attention's prototxt and that port:

- the shorter side to 600 pixels, the longer to at most 1000; BGR minus (102.9801, 115.9465, 122.7717);
- ResNet-101 to res4 (stride 16; strides in the 1x1 convolutions; pooling without padding, rounded up);
- proposals: 12 anchors, the 6000 best, suppression at 0.7, the 300 best; sides of at least 16 pixels of the picture;
- RoIPool 14x14, res5 with dilation 2 and no stride, mean over the 14x14: the features;
- 1601 class scores, class 0 is the background; 401 attribute scores from the features and the likeliest class's
  embedding, 0 means none. ``objects`` and ``attributes`` are the likeliest others, as in the published scripts (which
  then count them from 0, so LXMERT's and the port's ids are one less).

Boxes of the features are the proposals themselves: the regression to classes is only for detection, and is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_pool

from data_tools.regions.selection import choose, inclusive, suppressed, surviving_confidence
from data_tools.regions.types import Choice, Regions

MEAN_BGR = (102.9801, 115.9465, 122.7717)
SHORT_SIDE, LONG_SIDE = 600, 1000
STRIDE = 16
SCALES, RATIOS = (4, 8, 16, 32), (0.5, 1.0, 2.0)
_DELTA_LIMIT = float(np.log(1000.0 / 16))


@dataclass(frozen=True)
class BottomUpConfig:
    """Sizes of the network; the defaults are those of the published weights."""

    blocks: tuple[int, int, int, int] = (3, 4, 23, 3)
    width: int = 64
    classes: int = 1601
    attributes: int = 401
    rpn_width: int = 512
    class_width: int = 256
    attribute_width: int = 512


class _Convolution(nn.Conv2d):
    """A convolution without bias and the normalisation behind it, whose parameters lie in ``norm``."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1, padding: int = 0):
        super().__init__(inputs, outputs, size, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class _Bottleneck(nn.Module):
    """1x1 (with the stride), 3x3, 1x1, and the way around."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = _Convolution(inputs, width, 1, stride)
        self.conv2 = _Convolution(width, width, 3, 1, dilation, padding=dilation)
        self.conv3 = _Convolution(width, outputs, 1)
        self.shortcut = _Convolution(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


def _stage(inputs: int, width: int, blocks: int, stride: int, dilation: int = 1) -> nn.Sequential:
    first = _Bottleneck(inputs, width, stride, dilation)
    return nn.Sequential(first, *[_Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)])


class _Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _Convolution(3, width, 7, 2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv1(x)), 3, 2, 0, ceil_mode=True)


class _Backbone(nn.Module):
    """Stem and res2 to res4: [B, 3, H, W] -> [B, 16 w, H / 16, W / 16]."""

    def __init__(self, config: BottomUpConfig) -> None:
        super().__init__()
        w, blocks = config.width, config.blocks
        self.stem = _Stem(w)
        self.res2 = _stage(w, w, blocks[0], 1)
        self.res3 = _stage(4 * w, 2 * w, blocks[1], 2)
        self.res4 = _stage(8 * w, 4 * w, blocks[2], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.res4(self.res3(self.res2(self.stem(x))))


class _RpnHead(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        anchors = len(SCALES) * len(RATIOS)
        self.conv = nn.Conv2d(inputs, width, 3, padding=1)
        self.objectness_logits = nn.Conv2d(width, 2 * anchors, 1)
        self.anchor_deltas = nn.Conv2d(width, 4 * anchors, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.conv(x))
        return self.objectness_logits(hidden), self.anchor_deltas(hidden)


class _ProposalGenerator(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.rpn_head = _RpnHead(inputs, width)


class _BoxPredictor(nn.Module):
    """Class scores, box deltas (loaded, not used) and attribute scores of pooled features."""

    def __init__(self, inputs: int, config: BottomUpConfig) -> None:
        super().__init__()
        self.cls_score = nn.Linear(inputs, config.classes)
        self.bbox_pred = nn.Linear(inputs, 4 * config.classes)
        self.cls_embed = nn.Embedding(config.classes, config.class_width)
        self.attr_linear1 = nn.Linear(inputs + config.class_width, config.attribute_width)
        self.attr_linear2 = nn.Linear(config.attribute_width, config.attributes)

    def forward(self, pooled_PD: Tensor) -> tuple[Tensor, Tensor]:
        scores_PC = self.cls_score(pooled_PD)
        likeliest = self.cls_embed(scores_PC.argmax(1))
        attributes = self.attr_linear2(F.relu(self.attr_linear1(torch.cat([pooled_PD, likeliest], 1))))
        return scores_PC.softmax(1), attributes.softmax(1)


class _RoiHeads(nn.Module):
    def __init__(self, config: BottomUpConfig) -> None:
        super().__init__()
        self.res5 = _stage(16 * config.width, 8 * config.width, config.blocks[3], 1, dilation=2)
        self.box_predictor = _BoxPredictor(32 * config.width, config)


class BottomUp(nn.Module):
    """The detector as an extractor; see the module. Weights come from :func:`data_tools.regions.weights.load`."""

    description = "bottom-up attention: Faster R-CNN, ResNet-101 C4/res5, Visual Genome"
    mean: Tensor

    def __init__(self, config: BottomUpConfig | None = None) -> None:
        super().__init__()
        config = config or BottomUpConfig()
        self.backbone = _Backbone(config)
        self.proposal_generator = _ProposalGenerator(16 * config.width, config.rpn_width)
        self.roi_heads = _RoiHeads(config)
        self.feature_dim = 32 * config.width
        self.num_classes = config.classes
        self.register_buffer("mean", torch.tensor(MEAN_BGR).view(3, 1, 1), persistent=False)
        self.eval()

    @torch.inference_mode()
    def extract(
        self, pictures: list[NDArray[np.uint8]], given: list[NDArray[np.float32] | None], choice: Choice
    ) -> list[Regions]:
        """See :class:`data_tools.regions.types.Extractor`. Pictures are run together where their sizes agree."""
        prepared = [self._prepare(picture) for picture in pictures]
        found: list[Regions | None] = [None] * len(pictures)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, (pixels, _) in enumerate(prepared):
            by_shape.setdefault(tuple(pixels.shape), []).append(place)
        for places in by_shape.values():
            maps = self.backbone(torch.stack([prepared[place][0] for place in places]))
            for place, one in zip(places, maps.split(1), strict=True):
                pixels, scale = prepared[place]
                found[place] = self._regions(one, pixels.shape[1:], scale, given[place], choice)
        return [regions for regions in found if regions is not None]

    def _prepare(self, picture: NDArray[np.uint8]) -> tuple[Tensor, float]:
        """float32 [3, h, w], resized and centred, and the scale."""
        bgr = torch.from_numpy(picture[:, :, ::-1].copy()).to(self.mean.device).permute(2, 0, 1).float() - self.mean
        short, long = sorted(bgr.shape[1:])
        scale = SHORT_SIDE / short
        if round(scale * long) > LONG_SIDE:
            scale = LONG_SIDE / long
        size = [max(1, round(side * scale)) for side in bgr.shape[1:]]
        return F.interpolate(bgr[None], size, mode="bilinear", align_corners=False)[0], scale

    def _regions(
        self, map_: Tensor, size: torch.Size, scale: float, given: NDArray[np.float32] | None, choice: Choice
    ) -> Regions:
        boxes = self._proposals(map_, size, scale) if given is None else torch.from_numpy(given).to(map_) * scale
        pooled = roi_pool(map_, [boxes], 14, 1 / STRIDE)
        features = self.roi_heads.res5(pooled).mean((2, 3))
        probs, attributes = self.roi_heads.box_predictor(features)
        boxes = boxes / scale
        if given is None:
            confidence = surviving_confidence(inclusive(boxes), probs[:, 1:], choice.overlap)
            kept = choose(confidence, choice)
        else:
            confidence = probs[:, 1:].amax(1)
            kept = torch.arange(len(boxes), device=boxes.device)
        strongest = attributes[kept, 1:].max(1)
        return Regions(
            features=features[kept].cpu().numpy(),
            boxes=boxes[kept].cpu().numpy(),
            conf=confidence[kept].cpu().numpy(),
            class_probs=probs[kept].cpu().numpy(),
            objects=(probs[kept, 1:].argmax(1) + 1).cpu().numpy(),
            attributes=((strongest.indices + 1).cpu().numpy(), strongest.values.cpu().numpy()),
        )

    def _proposals(self, map_: Tensor, size: torch.Size, scale: float) -> Tensor:
        """The at most 300 best proposals, [P, 4] in pixels of the resized picture."""
        logits, deltas = self.proposal_generator.rpn_head(map_)
        count, height, width = len(SCALES) * len(RATIOS), *map_.shape[2:]
        # The first half of the channels scores the background, the second what is in front of it.
        scores = logits.view(2, count, height, width).softmax(0)[1].permute(1, 2, 0).reshape(-1)
        deltas = deltas.view(count, 4, height, width).permute(2, 3, 0, 1).reshape(-1, 4)
        boxes = apply_deltas(shifted_anchors(height, width).to(map_), deltas)
        limit = boxes.new_tensor([size[1] - 1, size[0] - 1] * 2)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        sides = boxes[:, 2:] - boxes[:, :2]
        fits = ((sides > 0) & (sides + 1 > STRIDE * scale)).all(1)
        boxes, scores = boxes[fits], scores[fits]
        if not len(boxes):  # nothing of that size in a tiny picture: all of it is the proposal
            return torch.cat([limit.new_zeros(2), limit[2:]])[None]
        order = torch.argsort(scores, descending=True, stable=True)[:6000]
        kept = suppressed(inclusive(boxes[order]), scores[order], 0.7, 300)
        return boxes[order[kept]]


def cell_anchors() -> NDArray[np.float32]:
    """float32 [12, 4]: anchors around one 16x16 cell, ratio by ratio, as Faster R-CNN's code makes them (rounded)."""
    anchors = []
    for ratio in RATIOS:
        width = np.round(np.sqrt(STRIDE * STRIDE / ratio))
        height = np.round(width * ratio)
        for scale in SCALES:
            w, h = width * scale, height * scale
            middle = (STRIDE - 1) / 2
            anchors.append([middle - (w - 1) / 2, middle - (h - 1) / 2, middle + (w - 1) / 2, middle + (h - 1) / 2])
    return np.array(anchors, np.float32)


def shifted_anchors(height: int, width: int) -> Tensor:
    """float32 [height * width * 12, 4]: the anchors of every cell, row by row."""
    y, x = torch.meshgrid(torch.arange(height) * STRIDE, torch.arange(width) * STRIDE, indexing="ij")
    shifts = torch.stack([x, y, x, y], -1).view(-1, 1, 4).float()
    return (shifts + torch.from_numpy(cell_anchors())).view(-1, 4)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move and scale boxes [P, 4], whose sides count their last pixel, by (dx, dy, dw, dh) [P, 4]."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    centre = boxes[:, :2] + sides / 2 + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].clamp(max=_DELTA_LIMIT).exp()
    return torch.cat([centre - sides / 2, centre + sides / 2], 1)
