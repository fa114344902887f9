"""Any Faster R-CNN of torchvision, with weights from a file: features are what its box head computes per detection."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import detection

from data_tools.regions.selection import choose, surviving_confidence
from data_tools.regions.types import Choice, Regions
from vlscale.errors import VlscaleError, nearest

NAMES = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)


class TorchvisionDetector(nn.Module):
    """A torchvision Faster R-CNN as an extractor.

    Proposals are pooled, and the box head's output is their feature; the boxes are the proposals, chosen as the
    bottom-up detector chooses (see :mod:`data_tools.regions.selection`). Class 0 is the background.

    Args:
        name: one of :data:`NAMES`.
        num_classes: classes of the weights, background included (COCO: 91).

    Raises:
        VlscaleError: there is no such detector.
    """

    def __init__(self, name: str, num_classes: int = 91) -> None:
        super().__init__()
        if name not in NAMES:
            raise VlscaleError(f"--detector {name}: not one of {', '.join(NAMES)}{nearest(name, NAMES)}")
        self.network: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=num_classes)
        self.description = f"torchvision {name}, box head"
        self.feature_dim = int(self.network.roi_heads.box_predictor.cls_score.in_features)
        self.num_classes = num_classes
        self.eval()

    @torch.inference_mode()
    def extract(
        self, pictures: list[NDArray[np.uint8]], given: list[NDArray[np.float32] | None], choice: Choice
    ) -> list[Regions]:
        """See :class:`data_tools.regions.types.Extractor`."""
        device = next(self.network.parameters()).device
        images = [torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1).float() / 255 for picture in pictures]
        batch, _ = self.network.transform(images)
        maps = self.network.backbone(batch.tensors)
        proposals, _ = self.network.rpn(batch, maps)
        scales = [
            boxes_scale(image.shape[1:], size, device) for image, size in zip(images, batch.image_sizes, strict=True)
        ]
        for place, boxes in enumerate(given):
            if boxes is not None:
                proposals[place] = torch.from_numpy(boxes).to(device) * scales[place]
        heads = self.network.roi_heads
        pooled = heads.box_head(heads.box_roi_pool(maps, proposals, batch.image_sizes))
        probs = heads.box_predictor(pooled)[0].softmax(1)
        sizes = [len(boxes) for boxes in proposals]
        return [
            _chosen(boxes / scale, features, classes, boxes_given is not None, choice)
            for boxes, scale, features, classes, boxes_given in zip(
                proposals, scales, pooled.split(sizes), probs.split(sizes), given, strict=True
            )
        ]


def boxes_scale(size: tuple[int, ...], resized: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [4]: what boxes in pixels of a picture [height, width] are multiplied by in the resized one."""
    ratio = [resized[1] / size[1], resized[0] / size[0]]
    return torch.tensor(ratio * 2, device=device)


def _chosen(boxes: Tensor, features: Tensor, probs: Tensor, given: bool, choice: Choice) -> Regions:
    confidence = probs[:, 1:].amax(1) if given else surviving_confidence(boxes, probs[:, 1:], choice.overlap)
    kept = torch.arange(len(boxes), device=boxes.device) if given else choose(confidence, choice)
    return Regions(
        features=features[kept].cpu().numpy(),
        boxes=boxes[kept].cpu().numpy(),
        conf=confidence[kept].cpu().numpy(),
        class_probs=probs[kept].cpu().numpy(),
        objects=(probs[kept, 1:].argmax(1) + 1).cpu().numpy(),
    )
