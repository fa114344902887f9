from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.batches import make_batch, make_vocabulary, take, tiny_model
from vlscale.config import ObjectivesSection
from vlscale.data.random import Draws
from vlscale.objectives import build_objectives

DRAWS = Draws(3, "pairs")
WORDS, REGIONS = [5, 9, 3, 7], [2, 4, 1, 3]


def mlm(**section):
    settings = ObjectivesSection.model_validate({"mlm": {"probability": 0.4}, **section})
    return build_objectives(settings, ["mlm"], make_vocabulary())["mlm"]


def test_loss_and_accuracy_of_known_logits():
    batch, model = mlm().prepare(make_batch(WORDS, REGIONS), DRAWS), tiny_model()
    terms = mlm().terms(model, batch)
    logits = model.mlm_logits(model.encode(batch), batch.targets["token_positions"])
    labels = batch.targets["token_labels"]
    assert mlm().counts(batch) == {"mlm_tokens": len(labels)}
    torch.testing.assert_close(terms["mlm"].sum, F.cross_entropy(logits, labels) * len(labels))
    assert terms["mlm_accuracy"].sum == (logits.argmax(1) == labels).sum()
    assert (terms["mlm"].weight, terms["mlm_accuracy"].weight) == (1.0, 0.0)
    assert not terms["mlm_accuracy"].sum.requires_grad
    assert {term.count for term in terms.values()} == {"mlm_tokens"}


def test_only_words_are_masked_unless_masking_is_joint():
    batch = make_batch(WORDS * 20, REGIONS * 20)
    single = mlm().prepare(batch, DRAWS)
    assert single.region_mask is None
    assert torch.equal(single.features, batch.features)
    joint = mlm(masking="joint", mrm={"probability": 0.3}).prepare(batch, DRAWS)
    assert torch.equal(joint.input_ids, single.input_ids)
    assert 0.2 < joint.region_mask.float().mean() < 0.4
    assert not joint.features[joint.region_mask].any()
    assert set(joint.targets) == {"token_positions", "token_labels"}


def test_sums_add_up_over_any_micro_batches():
    batch, model, objective = make_batch(WORDS, REGIONS), tiny_model(), mlm()
    whole = objective.prepare(batch, DRAWS)
    parts = [objective.prepare(take(batch, group), DRAWS) for group in ([3], [0, 2], [1])]
    for name, term in objective.terms(model, whole).items():
        total = sum(objective.terms(model, part)[name].sum for part in parts)
        torch.testing.assert_close(total, term.sum, rtol=1e-5, atol=1e-6)
    assert sum(objective.counts(part)["mlm_tokens"] for part in parts) == objective.counts(whole)["mlm_tokens"]


def test_preparing_leaves_the_batch_alone():
    batch = make_batch(WORDS, REGIONS)
    ids = batch.input_ids.clone()
    mlm().prepare(batch, DRAWS)
    assert torch.equal(batch.input_ids, ids)
    assert not batch.targets


@pytest.mark.parametrize("case", ["weight 0", "no targets"])
def test_nothing_to_learn_from_is_a_finite_zero_with_a_graph(case):
    batch, model = mlm().prepare(make_batch(WORDS, REGIONS), DRAWS), tiny_model()
    if case == "weight 0":
        batch = replace(batch, weight=0.0)
    else:
        batch = replace(batch, targets={name: value[:0] for name, value in batch.targets.items()})
    terms = mlm().terms(model, batch)
    assert all(term.sum == 0 for term in terms.values())
    assert mlm().counts(batch) == {"mlm_tokens": 0}
    terms["mlm"].sum.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "word_head.bias" in gradients
    assert "encoder.layers.0.attention.qkv.weight" in gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_the_loss_is_float32_for_a_half_precision_model():
    batch, model = mlm().prepare(make_batch(WORDS, REGIONS), DRAWS), tiny_model()
    exact = mlm().terms(model, batch)["mlm"].sum
    rough = mlm().terms(model.bfloat16(), batch)["mlm"].sum
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
