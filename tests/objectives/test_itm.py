from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.batches import make_batch, make_vocabulary, take, tiny_model
from vlscale.config import ObjectivesSection
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.objectives import build_objectives

DRAWS = Draws(3, "pairs")
BATCH = make_batch([5, 9, 3, 7], [2, 6, 1, 5], "itm", labels=[1, 0, 0, 1])


def itm(**wra):
    return build_objectives(ObjectivesSection.model_validate({"wra": wra}), ["itm"], make_vocabulary())["itm"]


def test_loss_and_accuracy():
    model, objective = tiny_model(), itm(loss="off")
    batch = objective.prepare(BATCH, DRAWS)
    logits = model.itm_logits(model.encode(batch))
    terms = objective.terms(model, batch)
    assert set(terms) == {"itm", "itm_accuracy"}
    labels = batch.targets["itm_labels"]
    torch.testing.assert_close(terms["itm"].sum, F.cross_entropy(logits, labels, reduction="sum"))
    assert terms["itm_accuracy"].sum == (logits.argmax(1) == labels).sum()
    assert objective.counts(batch) == {"itm_examples": 4}


def test_nothing_is_masked():
    for tokens in ("all", "words"):
        batch = itm(tokens=tokens).prepare(BATCH, DRAWS)
        assert torch.equal(batch.input_ids, BATCH.input_ids)
        assert torch.equal(batch.features, BATCH.features)
        assert batch.region_mask is None


@pytest.mark.parametrize("wra", [{"loss": "off"}, {"loss": "reference"}, {"loss": "hinge", "tokens": "words"}])
def test_an_empty_slot_is_a_finite_zero_with_a_graph(wra):
    model, objective = tiny_model(), itm(**wra)
    batch = replace(objective.prepare(replace(BATCH, group=torch.zeros(4, dtype=torch.int32)), DRAWS), weight=0.0)
    terms = objective.terms(model, batch)
    assert all(term.sum == 0 for term in terms.values())
    assert not any(objective.counts(batch).values())
    assert {term.count for term in terms.values()} <= set(objective.counts(batch))
    sum(term.weight * term.sum for term in terms.values()).backward()
    assert model.itm_head.weight.grad is not None
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_every_term_names_a_count():
    for loss in ("off", "reference", "hinge"):
        objective = itm(loss=loss)
        assert {term.count for term in objective.terms(tiny_model(), BATCH).values()} <= set(objective.counts(BATCH))


def test_sums_add_up_over_any_micro_batches():
    model, objective = tiny_model(), itm()
    parts = [take(BATCH, group) for group in ([3], [0, 2], [1])]
    for name, term in objective.terms(model, BATCH).items():
        total = sum(objective.terms(model, part)[name].sum for part in parts)
        torch.testing.assert_close(total, term.sum, rtol=1e-5, atol=1e-6)
    for name, count in objective.counts(BATCH).items():
        assert sum(objective.counts(part)[name] for part in parts) == count


def test_unknown_names_stop_at_the_start():
    with pytest.raises(VlscaleError, match=r"no IPOT backend 'tritn'"):
        itm(backend="tritn")
    with pytest.raises(VlscaleError, match=r"no objective 'mrckll'; did you mean 'mrckl'"):
        build_objectives(ObjectivesSection(), ["mlm", "mrckll"], make_vocabulary())
