"""UNIMO's fine-tuning losses and optimiser against its authors' code; pre-training losses against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.unimo_goldens import LOSS, OUTPUT, load, official_batch, official_model
from vlscale.convert.unimo_model import to_official
from vlscale.models.unimo_batch import JointLayout
from vlscale.objectives.adversarial import Villa, villa_loss
from vlscale.objectives.contrastive import circle_loss, contrastive_loss
from vlscale.objectives.generation import next_tokens, smoothed_cross_entropy
from vlscale.objectives.visual import class_loss, overlaps, regression_loss, with_overlapping
from vlscale.ragged import cumulative
from vlscale.train.optim import build_param_groups
from vlscale.train.paddle import PaddleAdamW, linear_warmup_decay

pytestmark = pytest.mark.golden


@torch.no_grad()
def test_retrieval_scores_and_circle_losses():
    golden, model = load("retrieval"), official_model()
    scores = model.match_scores(model.encode(official_batch(golden)[0]))
    assert_close(scores, golden["out.match_score"].squeeze(1), **OUTPUT)
    expected = golden["out.sigmoid_scores"]
    similarities = scores.sigmoid().view(expected.shape)
    assert_close(similarities, expected, **OUTPUT)
    positive, images, captions = similarities.split([1, *[(expected.shape[1] - 1) // 2] * 2], 1)
    of_images, of_captions = circle_loss(positive, images).mean(), circle_loss(positive, captions).mean()
    assert_close(of_images, golden["out.loss_i"].squeeze(), **LOSS)
    assert_close(of_captions, golden["out.loss_c"].squeeze(), **LOSS)
    assert_close((of_images + of_captions) / 2, golden["out.loss"].squeeze(), **LOSS)
    sharper = circle_loss(positive, captions, margin=0.25, scale=32).mean()
    assert_close(sharper, golden["out.loss_c_m0.25_s32"].squeeze(), rtol=1e-5, atol=1e-5)


def test_adversarial_caption_loss():
    golden, model = load("img2txt"), official_model()
    batch, _ = official_batch(golden)
    positions, labels = next_tokens(batch)

    def scores(text_delta, image_delta):
        return model.mlm_logits(model.encode(batch, text_delta=text_delta, image_delta=image_delta), positions)

    settings = Villa(2, learning_rate=0.05, max_norm=0.4, initial_magnitude=0.0, kl_weight=1.5, projection="reference")
    layout = JointLayout(batch, batch.measured)
    widths = model.config.hidden_size, model.config.feature_dim
    loss = villa_loss(settings, layout, widths, scores, lambda logits: smoothed_cross_entropy(logits, labels, 0.1))
    expected = golden["out.villa_loss_init0_step2_lr0.05_max0.4_kl1.5"].squeeze()
    assert_close(loss / labels.numel(), expected, rtol=2e-6, atol=1e-5)


def test_six_steps_of_the_optimizer():
    golden, model = load("optim"), official_model()
    batch, _ = official_batch(load("seq2seq"))
    positions, labels = next_tokens(batch)
    groups = [
        {"params": group["params"], "weight_decay": 0.01 if group["decay"] else 0.0}
        for group in build_param_groups(model, "correct")
    ]
    optimizer = PaddleAdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6)
    for step, (expected, rate) in enumerate(zip(golden["out.loss"], golden["out.lr"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = linear_warmup_decay(step, 1e-2, 2, 8)
            assert group["lr"] == pytest.approx(float(rate), abs=1e-9)
        logits = model.mlm_logits(model.encode(batch), positions)
        loss = smoothed_cross_entropy(logits, labels, 0.1) / labels.numel()
        assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5), step
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ours = to_official(model.state_dict())
        for name in (name for name in golden if name.startswith(f"out.step{step + 1}.")):
            assert_close(ours[name.split(".", 2)[2]], golden[name], **OUTPUT)
    assert_close(to_official(model.state_dict())["word_embedding"], golden["out.final.word_embedding"], **OUTPUT)


def test_contrastive_loss_and_its_gradients():
    golden = load("objectives_float64", "definition_only")
    kinds = ("pos", "neg", "img", "txt")
    scores = [golden[f"cmcl.in.score_{kind}"] for kind in kinds]
    packed = torch.cat(scores, 1).reshape(-1).requires_grad_()
    groups, candidates = scores[0].shape[0], sum(part.shape[1] for part in scores)
    positive = torch.cat([torch.full(part.shape, kind != "neg") for kind, part in zip(kinds, scores, strict=True)], 1)
    cu = cumulative(torch.full((groups,), candidates))
    losses = contrastive_loss(packed, positive.reshape(-1), cu, golden["cmcl.in.tau"])
    assert_close(losses, golden["cmcl.out.loss_per_example"], rtol=1e-12, atol=1e-12)
    assert_close(losses.mean(), golden["cmcl.out.loss"].squeeze(), rtol=1e-12, atol=1e-12)
    losses.mean().backward()
    grads = packed.grad.view(groups, candidates).split([part.shape[1] for part in scores], 1)
    for kind, grad in zip(kinds, grads, strict=True):
        assert_close(grad, golden[f"cmcl.out.grad_{kind}"], rtol=1e-10, atol=1e-12)


def test_visual_losses():
    golden = load("objectives_float64", "definition_only")
    masked = golden["visual.in.mask"].bool()
    predicted, features = golden["visual.in.pred"][masked], golden["visual.in.features"][masked]
    logits, probs = golden["visual.in.class_logits"][masked], golden["visual.in.class_probs"][masked]
    count, width = predicted.shape
    exact = {"rtol": 1e-12, "atol": 1e-12}
    summed = regression_loss(predicted, features) * width  # ours is a mean over the dimensions
    assert_close(summed, golden["visual.out.regression_sum"].squeeze(), **exact)
    assert_close(summed / count, golden["visual.out.regression_mean_over_masked"].squeeze(), **exact)
    for labels, name in (("hard", "hard_ce_mean"), ("soft", "soft_ce_mean"), ("kl", "soft_kl_mean")):
        assert_close(class_loss(logits, probs, labels) / count, golden[f"visual.out.{name}"].squeeze(), **exact)


def test_masks_of_overlapping_regions():
    golden = load("objectives_float64", "definition_only")
    boxes, anchors = golden["comask.in.boxes"].numpy(), golden["comask.in.anchors"].numpy()
    size = len(boxes)
    every = overlaps(boxes.repeat(size, 0), np.tile(boxes, (size, 1))).reshape(size, size)
    np.testing.assert_allclose(every, golden["comask.out.iou"].numpy(), rtol=1e-12, atol=1e-12)
    thresholds = [float(name.rsplit("_", 1)[1]) for name in golden if name.startswith("comask.out.mask_iou_gt_")]
    assert thresholds
    for threshold in thresholds:
        expected = golden[f"comask.out.mask_iou_gt_{threshold}"].bool().numpy()
        assert (with_overlapping(anchors, boxes, np.array([0, size]), threshold) == expected).all()
