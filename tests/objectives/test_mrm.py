from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.objectives.batches import (
    FEATURE_DIM,
    NUM_CLASSES,
    class_probs,
    make_batch,
    make_vocabulary,
    take,
    tiny_model,
)
from vlscale.config import ObjectivesSection
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.objectives import build_objectives

DRAWS = Draws(3, "pairs")
WORDS, REGIONS = [5, 9, 3, 7], [2, 6, 1, 5]
TASKS = ["mrfr", "mrc", "mrckl"]


def objective(task: str, **section):
    settings = ObjectivesSection.model_validate({"mrm": {"probability": 0.4}, **section})
    return build_objectives(settings, [task], make_vocabulary())[task]


def prepared(task: str, batch=None, **section):
    built = objective(task, **section)
    batch = built.prepare(make_batch(WORDS, REGIONS) if batch is None else batch, DRAWS)
    return built, class_probs(batch) if built.needs_class_probs else batch


def test_feature_regression():
    built, batch = prepared("mrfr")
    model, original = tiny_model(), make_batch(WORDS, REGIONS)
    positions = batch.targets["region_positions"]
    target = original.features[positions]
    assert torch.equal(batch.targets["region_features"], target)
    predicted = model.predict_features(model.encode(batch), positions)
    terms = built.terms(model, batch)
    torch.testing.assert_close(terms["mrfr"].sum, (predicted - target).square().sum() / FEATURE_DIM)
    torch.testing.assert_close(terms["mrfr_zero"].sum, target.square().sum() / FEATURE_DIM)
    assert built.counts(batch) == {"mrfr_regions": len(positions)}
    assert not built.needs_class_probs


@pytest.mark.parametrize("background", [None, 2])
def test_hard_classes(background):
    section = {"mrm": {"probability": 0.4, "background_class": background}}
    built, batch = prepared("mrc", **section)
    probs = batch.targets["class_probs"]
    probs[:, 2] += 2  # the most probable everywhere
    model = tiny_model()
    logits = model.classify_regions(model.encode(batch), batch.targets["region_positions"])
    allowed = [c for c in range(NUM_CLASSES) if c != background]
    labels = torch.tensor([max(allowed, key=lambda c: row[c]) for row in probs.tolist()])
    assert (labels == 2).all() == (background is None)
    terms = built.terms(model, batch)
    torch.testing.assert_close(terms["mrc"].sum, -logits.log_softmax(1)[torch.arange(len(labels)), labels].sum())
    assert terms["mrc_accuracy"].sum == (logits.argmax(1) == labels).sum()
    assert built.needs_class_probs


def test_the_background_is_no_target_even_where_nothing_else_is_likely():
    built, batch = prepared("mrc", mrm={"probability": 0.4, "background_class": 0})
    batch.targets["class_probs"] = torch.zeros_like(batch.targets["class_probs"])
    batch.targets["class_probs"][:, 0] = 1
    model = tiny_model()
    logits = model.classify_regions(model.encode(batch), batch.targets["region_positions"])
    torch.testing.assert_close(built.terms(model, batch)["mrc"].sum, -logits.log_softmax(1)[:, 1].sum())


def test_soft_classes_and_a_target_with_zeros():
    built, batch = prepared("mrckl")
    probs = batch.targets["class_probs"]
    probs[0] = torch.eye(NUM_CLASSES)[1]
    model = tiny_model()
    log_q = model.classify_regions(model.encode(batch), batch.targets["region_positions"]).log_softmax(1)
    expected = (torch.xlogy(probs, probs) - probs * log_q).sum() / NUM_CLASSES
    terms = built.terms(model, batch)
    torch.testing.assert_close(terms["mrckl"].sum, expected)
    terms["mrckl"].sum.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert terms["mrckl_accuracy"].sum == (log_q.argmax(1) == probs.argmax(1)).sum()


@pytest.mark.parametrize("task", TASKS)
def test_regions_are_masked_and_words_only_if_masking_is_joint(task):
    large = make_batch(WORDS * 300, REGIONS * 300)
    built, batch = prepared(task, large)
    assert torch.equal(batch.region_mask.nonzero()[:, 0], batch.targets["region_positions"])
    assert not batch.features[batch.region_mask].any()
    assert torch.equal(batch.features[~batch.region_mask], large.features[~batch.region_mask])
    assert torch.equal(batch.input_ids, large.input_ids)
    _, joint = prepared(task, large, masking="joint")
    assert torch.equal(joint.region_mask, batch.region_mask)
    share = (joint.input_ids == make_vocabulary().mask).sum().item() / (sum(WORDS) * 300)
    assert share == pytest.approx(0.15 * 0.8, abs=0.015)  # four standard deviations of 7200 words
    assert set(joint.targets) == set(batch.targets)
    assert built.counts(joint) == built.counts(batch)


def test_tasks_draw_different_masks():
    masks = [prepared(task, make_batch(WORDS * 30, REGIONS * 30))[1].region_mask for task in TASKS]
    for i in range(3):
        assert not torch.equal(masks[i], masks[i - 1])


@pytest.mark.parametrize("task", TASKS)
def test_sums_add_up_over_any_micro_batches(task):
    model, batch = tiny_model(), make_batch(WORDS, REGIONS)
    built, whole = prepared(task)
    parts = [prepared(task, take(batch, group))[1] for group in ([3], [0, 2], [1])]
    for name, term in built.terms(model, whole).items():
        total = sum(built.terms(model, part)[name].sum for part in parts)
        torch.testing.assert_close(total, term.sum, rtol=1e-5, atol=1e-6)
    assert sum(sum(built.counts(part).values()) for part in parts) == sum(built.counts(whole).values())


@pytest.mark.parametrize("case", ["weight 0", "no targets"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_to_learn_from_is_a_finite_zero_with_a_graph(task, case):
    built, batch = prepared(task)
    if case == "weight 0":
        batch = replace(batch, weight=0.0)
    else:
        batch = replace(batch, targets={name: value[:0] for name, value in batch.targets.items()})
    model = tiny_model()
    terms = built.terms(model, batch)
    assert all(term.sum == 0 for term in terms.values())
    assert not any(built.counts(batch).values())
    terms[task].sum.backward()
    head = "feature_head.bias" if task == "mrfr" else "region_classifier.out.bias"
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert head in gradients
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_float32_for_a_half_precision_model(task):
    built, batch = prepared(task)
    exact = built.terms(tiny_model(), batch)[task].sum
    rough = built.terms(tiny_model().bfloat16(), batch)[task].sum
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)


def test_class_counts_that_do_not_fit():
    built, batch = prepared("mrc")
    batch.targets["class_probs"] = batch.targets["class_probs"][:, :3]
    with pytest.raises(VlscaleError, match=rf"3 classes, the model {NUM_CLASSES}; set model.config.num_classes to 3"):
        built.terms(tiny_model(), batch)
    built, batch = prepared("mrc", mrm={"background_class": NUM_CLASSES})
    with pytest.raises(VlscaleError, match=rf"background_class: {NUM_CLASSES} is not one of the {NUM_CLASSES}"):
        built.terms(tiny_model(), batch)
