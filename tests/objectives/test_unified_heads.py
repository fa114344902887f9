"""Unified-modal learning: which heads are called and needed, told at the start."""

from __future__ import annotations

import pytest

from tests.objectives.unified_batches import KINDS, LOSSES, calls, learning, model_of, prepared, rows_of, total_loss
from vlscale.errors import VlscaleError
from vlscale.objectives.unified import UnifiedLearning


def weighted(contrast=0.0, features=0.0, classes=0.0, bidirectional=0.0, seq2seq=0.0) -> UnifiedLearning:
    return learning(
        contrast={"weight": contrast},
        visual={"feature_weight": features, "class_weight": classes},
        language={"bidirectional_weight": bidirectional, "seq2seq_weight": seq2seq},
    )


WORDS = {"word_head.transform.dense", "word_head.transform.norm"}
POOLERS = {"text_pooler.dense", "image_pooler.dense"}
HEADS = [
    ({"contrast": 1}, {"text_pooler", "image_pooler", "matching"}, {*POOLERS, "match_head"}),
    ({"features": 1}, {"features"}, {"feature_head"}),
    ({"classes": 1}, {"classes"}, {"region_classifier"}),
    ({"bidirectional": 1}, {"words"}, WORDS),
    ({"seq2seq": 1}, {"words"}, WORDS),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "heads", "modules"), HEADS)
def test_only_heads_whose_loss_has_a_weight_are_called_and_needed(weights, heads, modules):
    objective, model = weighted(**weights), model_of(heads=tuple(heads))
    objective.check_model(model.config)
    batch, called = prepared(objective, rows_of(KINDS)), calls(model)
    terms = objective.terms(model, batch)
    assert {name for name in called if "embedder" not in name and "encoder" not in name} - {"word_head"} == modules
    assert {term.count for term in terms.values()} <= set(objective.counts(batch))
    assert {name for name, term in terms.items() if term.weight} < LOSSES
    sum(term.sum for term in terms.values() if term.weight).backward()
    for lacking in heads:
        left = [head for head in heads if head != lacking and (head != "matching" or not lacking.endswith("pooler"))]
        with pytest.raises(
            VlscaleError, match=r"^model\.config\.heads has no \w+, which the recipe trains: add it, or .*0$"
        ):
            objective.check_model(model_of(heads=tuple(left)).config)


def test_a_text_only_model_trains_on_texts():
    objective, model = weighted(bidirectional=1, seq2seq=1), model_of(images=False, heads=("words",))
    objective.check_model(model.config)
    batch = prepared(objective, rows_of(["text"] * 4))
    total_loss(objective.terms(model, batch), objective.counts(batch)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    with pytest.raises(VlscaleError, match=r"^model\.config\.heads has no features"):
        learning().check_model(model.config)


def test_a_sum_of_pools_cannot_be_contrasted():
    config = model_of(match_fusion="sum").config
    with pytest.raises(
        VlscaleError, match=r"^model\.config\.match_fusion is sum, with which .* set match_fusion to mul"
    ):
        learning().check_model(config)
    learning(contrast={"similarity": "dot"}).check_model(config)
    learning(contrast={"weight": 0}).check_model(config)
    learning().check_model(model_of().config)
