"""Which proposals become regions: per-class non-maximum suppression, a threshold, and bounds of the number."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from data_tools.regions.types import Choice


def inclusive(boxes: Tensor) -> Tensor:
    """Boxes whose right and lower edges lie one pixel further: Caffe's boxes contain their last pixel.

    The overlap of such boxes in the usual measure is the overlap of the originals in Caffe's.
    """
    return boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])


def surviving_confidence(boxes: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Highest score of each box over the classes in which it survives suppression.

    Args:
        boxes: [P, 4], the same for all classes.
        scores: [P, K], probabilities of the K classes that count (no background).
        overlap: IoU above which the weaker box gives way.

    Returns:
        [P]; 0 for boxes that survive in no class.
    """
    count, classes = scores.shape
    best = scores.new_zeros(count)
    if not count:
        return best
    # A few hundred classes at a time: batched_nms moves each class's boxes to a place of their own.
    for part in torch.arange(classes, device=scores.device).split(256):
        flat = scores[:, part].T.reshape(-1)
        owner = torch.arange(count, device=scores.device).repeat(len(part))
        kept = batched_nms(boxes[owner], flat, part.repeat_interleave(count), overlap)
        best = best.scatter_reduce(0, owner[kept], flat[kept], "amax")
    return best


def choose(confidence: Tensor, choice: Choice) -> Tensor:
    """Indices of the regions to keep, most confident first.

    All with at least ``choice.confidence``; if they are fewer than ``minimum`` or more than ``maximum``, the best so
    many (the rule of bottom-up-attention, and of UNITER's feature files).

    Args:
        confidence: [P].
    """
    order = torch.argsort(confidence, descending=True, stable=True)
    count = int((confidence >= choice.confidence).sum())
    return order[: min(max(count, choice.minimum), choice.maximum, len(order))]


def suppressed(boxes: Tensor, scores: Tensor, overlap: float, most: int) -> Tensor:
    """Indices of at most ``most`` boxes [P, 4] that survive suppression, best score [P] first."""
    return nms(boxes, scores, overlap)[:most]
