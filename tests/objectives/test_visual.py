"""Masked regions with what overlaps them, and the losses on them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.objectives.test_masking import assert_share
from tests.objectives.unified_batches import DRAWS, Row, pack
from vlscale.data.views import Role
from vlscale.errors import VlscaleError
from vlscale.objectives.row_draws import RowDraws
from vlscale.objectives.visual import (
    class_loss,
    draw_masked_regions,
    overlaps,
    regression_loss,
    top_classes,
    with_overlapping,
)


def image(number: int, regions: int) -> Row:
    return Row(Role.VISUAL, 0, number, None, regions, number)


def drawn(rows, probability=0.15, threshold=0.3, chosen=None):
    batch = pack(rows)
    chosen = np.arange(len(rows)) if chosen is None else np.array(chosen)
    return batch, draw_masked_regions(batch, RowDraws.of(batch, DRAWS), chosen, probability, threshold)


def _iou(one, other) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def test_overlaps_of_touching_equal_and_empty_boxes():
    box = np.array([[0.0, 0.0, 0.5, 0.5]])
    others = np.array([[0.5, 0, 1, 1], [0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.2, 0.2, 0.2, 0.2], [0, 0, 1, 1]])
    assert_close(overlaps(box.repeat(5, 0), others), np.array([0, 1, 1 / 3, 0, 0.25]))
    empty = np.array([[0.2, 0.2, 0.2, 0.2]])
    assert overlaps(empty, empty) == 0


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_what_overlaps_an_anchor_of_its_own_image_is_masked(threshold):
    batch = pack([image(number, 1 + number) for number in range(12)])
    cu, boxes = batch.cu_regions.numpy().astype(np.int64), batch.boxes.double().numpy()
    anchors = np.flatnonzero(np.random.default_rng(0).random(cu[-1]) < 0.3)
    expected = np.zeros(cu[-1], bool)
    for begin, end in pairwise(cu):
        for region in range(begin, end):
            mine = [anchor for anchor in anchors if begin <= anchor < end]
            near = any(_iou(boxes[region], boxes[anchor]) > threshold for anchor in mine)
            expected[region] = region in mine or near
    assert (with_overlapping(anchors, boxes, cu, threshold) == expected).all()
    assert not with_overlapping(anchors[:0], boxes, cu, threshold).any()


def test_shares_and_at_least_one_region():
    rows = [image(number, 1 + number % 40) for number in range(1000)]
    batch, chosen = drawn(rows, threshold=1.0)
    large = batch.region_counts[batch.region_owner()] > 30  # an added one hardly counts here
    hits, trials = int(chosen[large].sum()), int(large.sum())
    assert_share(hits, trials, 0.15 + 0.85**35 / 35)
    assert torch.unique(batch.region_owner()[chosen]).numel() == len(rows)
    _, more = drawn(rows, threshold=0.3)
    assert (more | ~chosen).all()
    assert more.sum() > chosen.sum()
    batch, single = drawn([image(number, 5) for number in range(4000)], 0.0, 1.0)
    for region in single.view(-1, 5).sum(0):
        assert_share(int(region), 4000, 0.2)


def test_other_rows_and_images_without_regions_are_left_alone():
    _, chosen = drawn([image(0, 4), image(1, 4), image(2, 0)], 1.0, chosen=[1, 2])
    assert chosen.tolist() == [False] * 4 + [True] * 4
    assert not drawn([image(0, 4)], 1.0, chosen=np.array([], np.int64))[1].any()


def test_an_image_is_masked_alike_in_any_batch():
    rows = [image(number, 2 + number) for number in range(10)]
    _, whole = drawn(rows)
    cu = pack(rows).cu_regions.tolist()
    for chosen in ([4, 0, 7], [9], [1, 2]):
        _, part = drawn([rows[number] for number in chosen])
        assert torch.equal(part, torch.cat([whole[cu[number] : cu[number + 1]] for number in chosen]))


def test_losses_are_sums_over_regions():
    draw = torch.Generator().manual_seed(0)
    predicted, features = (torch.randn(5, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    assert_close(regression_loss(predicted, features), (predicted - features).square().sum() / 8)
    logits = torch.randn(5, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(5, 7, generator=draw, dtype=torch.float64).mul(2).softmax(1)
    logs = logits.log_softmax(1)
    soft, kl = class_loss(logits, probs, "soft"), class_loss(logits, probs, "kl")
    assert_close(soft, -(probs * logs).sum())
    assert_close(kl, (probs * (probs.log() - logs)).sum())
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (soft, kl)]
    assert_close(*grads)
    assert_close(class_loss(logits, probs, "hard"), -logs[range(5), probs.argmax(1)].sum())
    for loss in ("soft", "kl", "hard"):
        assert class_loss(logits[:0], probs[:0], loss).item() == 0.0


def test_the_background_is_never_a_target():
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    assert top_classes(probs).tolist() == [0, 2]
    assert top_classes(probs, 0).tolist() == [1, 2]
    with pytest.raises(VlscaleError, match="background_class: 3 is not one of the 3 classes"):
        top_classes(probs, 3)
