"""Masked regions with what overlaps them: UNIMO's visual learning (section 2.2).

Every region is an anchor with 15 %, at least one per image. With an anchor, all regions of its image whose IoU with it
exceeds the threshold are masked: what overlaps would give the anchor away. (Not what overlaps those in turn.) Features
become zero, boxes stay, and the slot [IMG] is the mean of the regions that are left.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.objectives.row_draws import RowDraws
from vlscale.ragged import RaggedBatch

Labels = Literal["soft", "kl", "hard"]
_ANCHORS = "unified_anchors"


def overlaps(one_K4: NDArray[np.float64], other_K4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return float64 [K], the intersection over union of boxes (x1, y1, x2, y2); 0 where both are empty."""
    low, high = np.maximum(one_K4[:, :2], other_K4[:, :2]), np.minimum(one_K4[:, 2:], other_K4[:, 2:])
    shared = (high - low).clip(0).prod(1)
    union = (one_K4[:, 2:] - one_K4[:, :2]).prod(1) + (other_K4[:, 2:] - other_K4[:, :2]).prod(1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def with_overlapping(
    anchors: NDArray[np.int64], boxes_R4: NDArray[np.float64], cu: NDArray[np.int64], threshold: float
) -> NDArray[np.bool_]:
    """Return bool [R], the anchors and the regions of the same image whose IoU with one of them exceeds a threshold.

    Args:
        anchors: int64 [A], regions.
        boxes_R4: all regions of all images.
        cu: int64 [B+1], cumulative counts of regions.
        threshold: 1 for anchors only.
    """
    masked = np.zeros(len(boxes_R4), bool)
    image = np.searchsorted(cu, anchors, side="right") - 1
    counts = cu[image + 1] - cu[image]
    before = np.cumsum(counts) - counts
    other = np.arange(counts.sum()) + np.repeat(cu[image] - before, counts)
    anchor = np.repeat(anchors, counts)
    masked[other[overlaps(boxes_R4[anchor], boxes_R4[other]) > threshold]] = True
    masked[anchors] = True
    return masked


def draw_masked_regions(
    batch: RaggedBatch, draws: RowDraws, rows: NDArray[np.int64], probability: float, threshold: float
) -> Tensor:
    """Return bool [Nr], the regions of some rows (int64 [n]) that are masked; see the module."""
    cu, boxes = batch.cu_regions.numpy().astype(np.int64), batch.boxes.numpy().astype(np.float64)
    counts = (cu[1:] - cu[:-1])[rows]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    row = np.repeat(rows, counts)
    choice, order, _, _ = draws.uniform(_ANCHORS, row, within).T
    regions = cu[row] + within
    anchor = choice < probability
    none = np.bincount(row[anchor], minlength=len(batch)) == 0
    lacking = np.flatnonzero(none[row])
    lacking = lacking[np.lexsort((order[lacking], row[lacking]))]
    _, first = np.unique(row[lacking], return_index=True)
    anchor[lacking[first]] = True
    return torch.from_numpy(with_overlapping(regions[anchor], boxes, cu, threshold))


def regression_loss(predicted_KD: Tensor, features_KD: Tensor) -> Tensor:
    """Return the sum over regions of the squared distance, divided by the D dimensions.

    The paper sums over dimensions and says nothing of the scale; divided, the loss is as large as the others, for any
    detector. ``feature_weight: D`` is the sum.
    """
    return F.mse_loss(predicted_KD, features_KD, reduction="none").mean(1).sum()


def class_loss(logits_KC: Tensor, probs_KC: Tensor, labels: Labels, background: int | None = None) -> Tensor:
    """Return the sum over regions of a classification loss, against the detector's probabilities.

    Args:
        logits_KC: scores.
        probs_KC: the detector's probabilities.
        labels: ``soft``: cross-entropy with the probabilities, summed over classes (the published configuration says
            soft labels); ``kl``: their KL divergence, the same but for the labels' own entropy, and with equal
            gradients; ``hard``: cross-entropy with the top class.
        background: hard only: class that is never a target.

    Raises:
        VlscaleError: the background is none of the classes.
    """
    if labels == "hard":
        return F.cross_entropy(logits_KC, top_classes(probs_KC, background), reduction="sum")
    if labels == "soft":
        return -(probs_KC * logits_KC.log_softmax(1)).sum()
    return F.kl_div(logits_KC.log_softmax(1), probs_KC, reduction="sum")


def top_classes(probs_KC: Tensor, background: int | None = None) -> Tensor:
    """Return int64 [K], the most probable class, which is not ``background``.

    Raises:
        VlscaleError: the background is none of the classes.
    """
    if background is None:
        return probs_KC.argmax(1)
    if background >= probs_KC.shape[1]:
        raise VlscaleError(
            f"objectives.unified.visual.background_class: {background} is not one of the {probs_KC.shape[1]} classes "
            f"0..{probs_KC.shape[1] - 1}"
        )
    column = torch.arange(probs_KC.shape[1], device=probs_KC.device)
    return probs_KC.masked_fill(column == background, -1.0).argmax(1)
