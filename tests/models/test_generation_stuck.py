"""Rules that leave a hypothesis nothing, or an example fewer texts than are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.generation_models import SPECIAL, anew, model_of, sources_of
from tests.models.unimo_batches import alone, unimo_batch
from vlscale.errors import VlscaleError
from vlscale.models.unimo import generate

VOCABULARY = 9
MODEL = {"vocab_size": VOCABULARY, "hidden_size": 16}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 1, "num_return_sequences": 4},
    "official": {"num_beams": 2, "num_return_sequences": 2},
    "huggingface": {"num_beams": 2, "num_return_sequences": 2, "scoring": "huggingface"},
    "paddlenlp": {"num_beams": 2, "num_return_sequences": 2, "scoring": "paddlenlp"},
}
DEAD_END: dict[str, Any] = {
    "bad_words_ids": [[5, token] for token in range(VOCABULARY)],
    "suppress_tokens": [token for token in range(VOCABULARY) if token not in (5, 6)],
    "eos_token_id": None,
}
"""Texts are 6 6 ... 6 5, and nothing may follow a 5."""


def _batch():
    batch = sources_of(unimo_batch(["image", "pair", "text"], seed=3))
    batch.input_ids = batch.input_ids % VOCABULARY
    return batch


@pytest.mark.parametrize("way", WAYS)
def test_a_text_stops_where_every_next_token_is_forbidden(way):
    found = generate(model_of(**MODEL), _batch(), **SPECIAL | DEAD_END, max_new_tokens=5, **WAYS[way])
    stopped = 0
    for example in range(3):
        for which in range(found.lengths.shape[1]):
            tokens = found.tokens(example, which)[1:]
            assert tokens in [[6] * before + [5] for before in range(5)] + [[6] * 5]
            stopped += tokens[-1] == 5 and len(tokens) < 5
            tail = found.running_scores[example, which, len(tokens) :]
            assert tail.eq(tail[0]).all()
            assert way == "huggingface" or way == "paddlenlp" or tail[0] == found.scores[example, which]
    assert stopped
    assert found.scores.isfinite().all()
    assert not found.finished.any()


@pytest.mark.parametrize(
    ("scoring", "worth"),
    [
        ("huggingface", lambda scores: sum(scores) / len(scores) ** 0.8),
        ("paddlenlp", lambda scores: sum(scores) / ((5 + len(scores)) / 6) ** 0.8),
    ],
)
def test_what_stopped_competes_with_what_goes_on(scoring, worth):
    model, batch, steps = model_of(**MODEL), _batch(), 5
    found = generate(
        model, batch, **SPECIAL | DEAD_END, max_new_tokens=steps, **WAYS[scoring], length_penalty=0.8,
        early_stopping="never",
    )  # fmt: skip
    for example in range(3):
        logits = anew(model, alone(batch, example), torch.tensor([[2] + [6] * (steps - 1)]))[0]
        if scoring == "paddlenlp":
            logits[:, DEAD_END["suppress_tokens"]] = float("-inf")
        log_probs = logits.log_softmax(1)
        six, five = log_probs[:, 6].tolist(), log_probs[:, 5].tolist()
        texts = {(6,) * n + (5,): worth([*six[:n], five[n]]) for n in range(steps)} | {(6,) * steps: worth(six)}
        expected = sorted(texts, key=lambda text: -texts[text])[:2]
        assert [tuple(found.tokens(example, which)[1:]) for which in range(2)] == expected
        assert found.scores[example].tolist() == pytest.approx([texts[text] for text in expected], abs=1e-5)


@pytest.mark.parametrize("way", ["greedy", "sampling", "huggingface", "paddlenlp"])
def test_a_text_ends_when_all_tokens_are_used_up(way):
    given = {**SPECIAL, "eos_token_id": None, "no_repeat_ngram_size": 1, "max_new_tokens": 20}
    found = generate(model_of(**MODEL), _batch(), **given, **WAYS[way])
    for example in range(3):
        for which in range(found.lengths.shape[1]):
            assert sorted(found.tokens(example, which)) == list(range(VOCABULARY))
    assert not found.finished.any()


def test_the_authors_rule_of_ngrams_gives_way_where_nothing_else_is_left():
    given = {**SPECIAL, "eos_token_id": None, "no_repeat_ngram_size": 1, "max_new_tokens": 12}
    found = generate(model_of(**MODEL), _batch(), **given, **WAYS["official"])
    assert found.lengths.eq(13).all()
    assert found.scores.lt(-65000 / 3).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_text_may_be_over_before_it_begins(way):
    forbidden = [[2, token] for token in range(VOCABULARY)]
    chosen = {name: value for name, value in WAYS[way].items() if name != "num_return_sequences"}
    found = generate(model_of(**MODEL), _batch(), **SPECIAL, bad_words_ids=forbidden, max_new_tokens=5, **chosen)
    assert found.best() == [[2]] * 3
    assert found.scores.eq(0).all()


@pytest.mark.parametrize("scoring", ["official", "huggingface", "paddlenlp"])
def test_fewer_texts_than_asked_for_are_an_error_and_never_made_up(scoring):
    forbidden = [[2, token] for token in range(VOCABULARY) if token not in (4, 5)]
    forbidden += [[first, token] for first in (4, 5) for token in range(VOCABULARY)]
    given = {**SPECIAL, "num_beams": 3, "scoring": scoring, "bad_words_ids": forbidden, "max_new_tokens": 6}
    two = generate(model_of(**MODEL), _batch(), **given, num_return_sequences=2)
    assert [sorted(two.tokens(example, which) for which in range(2)) for example in range(3)] == [[[2, 4], [2, 5]]] * 3
    with pytest.raises(VlscaleError, match="example 0 has 2 texts that the rules allow, 3 are asked for") as raised:
        generate(model_of(**MODEL), _batch(), **given, num_return_sequences=3)
    assert "\n" not in str(raised.value)
