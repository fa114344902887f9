from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.objectives.batches import make_batch, make_vocabulary, take, tiny_model
from vlscale.config import WraSection
from vlscale.kernels.ipot import ipot_distance
from vlscale.objectives.wra import WordRegionAlignment

LABELS = [1, 0, 0, 1, 1, 0, 1, 1, 0]
GROUPS = [0, 0, 0, 0, 1, 1, 2, 2, 5]
BATCH = replace(
    make_batch([5, 9, 3, 7, 4, 6, 2, 8, 3], [2, 6, 1, 5, 3, 4, 2, 1, 6], "itm", labels=LABELS),
    group=torch.tensor(GROUPS, dtype=torch.int32),
)


def alignment(**section) -> WordRegionAlignment:
    return WordRegionAlignment.build(WraSection(**section), make_vocabulary())


def with_targets(wra: WordRegionAlignment, batch):
    return replace(batch, targets=batch.targets | wra.targets(batch))


def one_by_one(encoded, batch, words_only: bool, **ipot) -> list[torch.Tensor]:
    """Distances, one example at a time."""
    found = []
    for i in range(len(batch)):
        words = encoded.text[batch.cu_text[i] : batch.cu_text[i + 1]]
        words = words[1:-1] if words_only else words
        regions = encoded.regions[batch.cu_regions[i] : batch.cu_regions[i + 1]]
        ends = torch.tensor([0, len(words)]), torch.tensor([0, len(regions)])
        found.append(ipot_distance(words, regions, *ends, **ipot)[0])
    return found


@pytest.mark.parametrize("tokens", ["all", "words"])
@pytest.mark.parametrize("early", [True, False])
def test_which_tokens_take_part(tokens, early):
    wra, model = alignment(tokens=tokens, beta=0.3, iterations=20), tiny_model()
    batch = with_targets(wra, BATCH) if early else BATCH
    encoded = model.encode(batch)
    expected = one_by_one(encoded, batch, tokens == "words", beta=0.3, iterations=20)
    distance, plan = wra.align(encoded, batch)
    torch.testing.assert_close(distance, torch.stack(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wra.distances(encoded, batch), distance)
    longest = int(BATCH.text_lengths.max()) - (2 if tokens == "words" else 0)
    assert plan.shape == (len(BATCH), int(BATCH.region_counts.max()), longest)


def test_reference_loss():
    wra, model = alignment(weight=0.1), tiny_model()
    encoded = model.encode(BATCH)
    distance = one_by_one(encoded, BATCH, words_only=False)
    terms = wra.terms(encoded, BATCH)
    positive = sum(d for d, label in zip(distance, LABELS, strict=True) if label)
    negative = sum(d for d, label in zip(distance, LABELS, strict=True) if not label)
    torch.testing.assert_close(terms["wra"].sum, positive - negative, rtol=1e-5, atol=1e-5)
    assert (terms["wra"].count, terms["wra"].weight) == ("itm_examples", 0.1)
    torch.testing.assert_close(terms["wra_positive"].sum, positive.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms["wra_negative"].sum, negative.detach(), rtol=1e-5, atol=1e-5)
    assert wra.counts(BATCH) == {"wra_positives": 5, "wra_negatives": 4}


def test_hinge_over_the_pairs_of_each_group():
    wra, model = alignment(loss="hinge", weight=3.0, margin=0.2, tokens="words"), tiny_model()
    encoded = model.encode(BATCH)
    distance = one_by_one(encoded, BATCH, words_only=True)
    pairs = [
        (p, n)
        for p in range(len(BATCH))
        for n in range(len(BATCH))
        if LABELS[p] == 1 and LABELS[n] == 0 and GROUPS[p] == GROUPS[n]
    ]
    expected = sum((0.2 + distance[p] - distance[n]).clamp(min=0) for p, n in pairs)
    term = wra.terms(encoded, BATCH)["wra"]
    assert len(pairs) == 5
    assert wra.counts(BATCH)["wra_pairs"] == 5
    torch.testing.assert_close(term.sum, expected, rtol=1e-5, atol=1e-5)
    assert (term.count, term.weight) == ("wra_pairs", 3.0)


@pytest.mark.parametrize("loss", ["reference", "hinge"])
def test_the_total_does_not_depend_on_how_groups_are_dealt(loss):
    wra, model = alignment(loss=loss, tokens="words"), tiny_model()
    whole = wra.terms(model.encode(BATCH), BATCH)
    whole["wra"].sum.backward()
    gradient = model.text_embedder.word.weight.grad.clone()
    for dealt in ([[6, 7, 0, 1, 2, 3], [8, 4, 5]], [[8], [4, 5], [3, 2, 1, 0], [7, 6]]):
        model.zero_grad()
        parts = [take(BATCH, examples) for examples in dealt]
        terms = [wra.terms(model.encode(part), part) for part in parts]
        for name, term in whole.items():
            total = sum(each[name].sum for each in terms)
            torch.testing.assert_close(total, term.sum, rtol=1e-5, atol=1e-5)
        sum(each["wra"].sum for each in terms).backward()
        torch.testing.assert_close(model.text_embedder.word.weight.grad, gradient, rtol=1e-4, atol=1e-5)
        counts = [wra.counts(part) for part in parts]
        assert {name: sum(count[name] for count in counts) for name in counts[0]} == wra.counts(BATCH)


def test_hinge_without_any_pair_is_a_zero_with_a_graph():
    wra, model = alignment(loss="hinge"), tiny_model()
    batch = take(BATCH, [6, 7])
    term = wra.terms(model.encode(batch), batch)["wra"]
    assert wra.counts(batch)["wra_pairs"] == 0
    assert term.sum == 0
    term.sum.backward()
    assert not model.text_embedder.word.weight.grad.any()


def test_alignment_is_float32_for_a_half_precision_model():
    wra = alignment(loss="hinge", tokens="words")
    model = tiny_model().bfloat16()
    encoded = model.encode(BATCH)
    distance = wra.distances(encoded, BATCH)
    assert distance.dtype == torch.float32
    exact = one_by_one(encoded, BATCH, words_only=True)
    torch.testing.assert_close(distance, torch.stack(exact), rtol=1e-5, atol=1e-6)
