"""What generation refuses, and how it says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.models.batches import TINY
from tests.models.generation_models import SPEAKING, SPECIAL, WAYS, model_of, sources_of, speaking
from tests.models.unimo_batches import unimo_batch
from vlscale.errors import VlscaleError
from vlscale.models.unimo import UnimoBatch, generate


def _broken(batch: UnimoBatch) -> UnimoBatch:
    return dataclasses.replace(batch, prefix_len=torch.zeros_like(batch.text_lengths))


def _prefixed(*lengths: int) -> UnimoBatch:
    return dataclasses.replace(unimo_batch(["pair", "text"]), prefix_len=torch.tensor(lengths, dtype=torch.int32))


def _outside(name: str, token: int) -> UnimoBatch:
    batch = unimo_batch(["pair and tags"])
    return dataclasses.replace(batch, **{name: torch.full_like(getattr(batch, name), token)})


def _long(tokens: int) -> UnimoBatch:
    batch = unimo_batch(["text"])
    ids = torch.full((tokens,), 7)
    cu, prefix = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    return dataclasses.replace(batch, input_ids=ids, cu_text=cu, prefix_len=prefix)


GOOD = unimo_batch(["image", "pair"])
COMMON = (
    "do_sample", "early_stopping", "num_beams", "temperature", "top_k", "top_p", "length_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "num_return_sequences", "max_length", "min_length",
    "max_new_tokens", "min_new_tokens",
)  # fmt: skip
"""Settings that transformers has too."""
BEAMS = {"num_beams": 3}
STARTS = torch.ones(50, dtype=torch.bool)
ERRORS: list[tuple[dict[str, Any], UnimoBatch, str]] = [
    ({}, _broken(unimo_batch(["image", "text"])), "example 1 has neither image nor tags nor text"),
    ({"bos_token_id": None}, GOOD, "example 0 has no text to go on from"),
    ({"max_new_tokens": 39}, GOOD, r"needs? 41 positions, the model has 40; lower max_new_tokens .* to 38"),
    ({"max_new_tokens": 0}, GOOD, "max_new_tokens"),
    ({"max_length": 1}, GOOD, "leaves no token"),
    ({"max_length": 9, "max_new_tokens": 8}, GOOD, "give one of them"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, GOOD, "at least 9 new tokens are asked for, and at most 8"),
    ({"max_new_tokens": 8, "target_positions": "continue"}, _long(38), "the model has 40; shorten the source$"),
    ({"num_beams": 51}, GOOD, "num_beams 51 exceeds the 50 tokens"),
    ({"num_beams": 49, "suppress_tokens": [7, 8]}, GOOD, "num_beams 49 exceeds the 48 tokens"),
    ({"num_beams": 49, "bad_words_ids": [[7], [8], [9, 9]]}, GOOD, "num_beams 49 exceeds the 48 tokens"),
    ({"num_beams": 50, "min_new_tokens": 1}, GOOD, "num_beams 50 exceeds the 49 tokens"),
    ({"bad_words_ids": [[token] for token in range(49)], "suppress_tokens": [49]}, GOOD, "forbid every token"),
    ({"suppress_tokens": [t for t in range(50) if t != 3], "min_new_tokens": 1}, GOOD, "forbid every token"),
    ({"length_penalty": 10.5, **BEAMS}, GOOD, "length_penalty"),
    ({"length_penalty": -100, **BEAMS}, GOOD, "length_penalty"),
    (
        {"length_penalty": 10, "max_new_tokens": 1100, **BEAMS},
        GOOD,
        "length_penalty 10.0 of 1100 tokens leaves float32",
    ),
    ({"length_penalty": 0.6}, GOOD, "belong to beam search"),
    ({"early_stopping": True, "scoring": "huggingface"}, GOOD, "belong to beam search"),
    ({"seed": 1}, GOOD, "seed and generator belong to do_sample"),
    ({"generator": torch.Generator(), **BEAMS}, GOOD, "seed and generator belong to do_sample"),
    ({"top_k": 5}, GOOD, "belong to do_sample"),
    ({"word_starts": STARTS}, GOOD, "word_starts belongs to no_repeat_ngram_size"),
    ({"word_starts": STARTS.float().numpy(), "no_repeat_ngram_size": 3}, GOOD, "is an array of float32, expected bool"),
    ({"word_starts": STARTS.tolist(), "no_repeat_ngram_size": 3}, GOOD, r"word_starts is a list, expected bool \[V\]"),
    ({}, _prefixed(6, 6), "prefix_len of example 1 is 6, its text has 5 tokens; give 0 to 5"),
    ({}, _prefixed(-1, 5), "prefix_len of example 0 is -1, its text has 6"),
    ({}, _prefixed(6), r"prefix_len is \[1\], the batch has 2 texts"),
    ({}, _outside("input_ids", 50), "input_ids goes from 50 to 50, the model has rows 0 to 49"),
    ({}, _outside("tag_ids", -1), "tag_ids goes from -1 to -1, the model has rows 0 to 49"),
    ({"num_beams": 0}, GOOD, "num_beams"),
    ({"num_beams": 2, "do_sample": True}, GOOD, "do_sample with num_beams > 1"),
    ({"num_beams": 2, "num_return_sequences": 3}, GOOD, "num_return_sequences 3 exceeds num_beams 2"),
    ({"num_return_sequences": 2}, GOOD, "greedy search finds one text"),
    ({"do_sample": True, "top_k": 51}, GOOD, "top_k 51 exceeds the vocabulary of 50"),
    ({"do_sample": True, "top_k": -1}, GOOD, "top_k"),
    ({"do_sample": True, "top_p": 0.0}, GOOD, "top_p"),
    ({"do_sample": True, "top_p": 1.5}, GOOD, "top_p"),
    ({"do_sample": True, "temperature": 0.0}, GOOD, "temperature"),
    ({"temperature": 0.5}, GOOD, "belong to do_sample"),
    ({"num_beams": 2, "early_stopping": True}, GOOD, "official has no pool"),
    ({"do_sample": True, "seed": 1, "generator": torch.Generator()}, GOOD, "give one of them"),
    ({"eos_token_id": [3, 50]}, GOOD, r"eos_token_id 50 is not in the vocabulary \(0 to 49\)"),
    ({"bad_words_ids": [[1, 60]]}, GOOD, "bad_words_ids 60"),
    ({"bad_words_ids": [[]]}, GOOD, "empty sequence"),
    ({"no_repeat_ngram_size": 3, "word_starts": STARTS[:49]}, GOOD, r"word_starts is torch.bool \[49\]"),
    ({"num_beam": 2}, GOOD, "did you mean 'num_beams'"),
    ({"scoring": "google"}, GOOD, "scoring"),
    ({"target_type_id": 1}, GOOD, "target_type_id is 1, the model has 0"),
    ({"bos_token_id": None, "target_positions": "restart"}, GOOD, "needs a bos_token_id"),
]


@pytest.mark.parametrize(("arguments", "batch", "told"), ERRORS, ids=[told[:40] for _, _, told in ERRORS])
def test_bad_arguments_and_sources_are_told_in_one_line(arguments, batch, told):
    given = {**SPECIAL, **({} if "max_length" in arguments else {"max_new_tokens": 5}), **arguments}
    with pytest.raises(VlscaleError, match=told) as raised:
        generate(model_of(), batch, **given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", [{"target_role_id": 2}, {"target_turn_id": 1}])
def test_roles_and_turns_of_a_target_need_those_of_the_sources(given):
    model, batch = model_of(**SPEAKING), sources_of(GOOD)
    name = next(iter(given)).removeprefix("target_") + "s"
    with pytest.raises(VlscaleError, match=f"gives no {name}"):
        generate(model, batch, **SPECIAL, **given)
    changed = [generate(model, speaking(batch), **SPECIAL, max_new_tokens=3, **more).scores for more in ({}, given)]
    assert not torch.equal(*changed)


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}])
def test_the_defaults_of_transformers_may_be_written_out(way):
    defaults = pytest.importorskip("transformers").GenerationConfig()
    written = {name: getattr(defaults, name) for name in COMMON}
    for more in (way, {"max_new_tokens": 6, "min_new_tokens": 2, **way}):
        found = generate(model_of(), GOOD, **SPECIAL, **{**written, **more})
        assert torch.equal(found.sequences, generate(model_of(), GOOD, **SPECIAL, **more).sequences)


def test_what_begins_a_word_may_be_an_array():
    starts = torch.arange(50) % 3 != 0
    rule = {"num_beams": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 1, "eos_token_id": None}
    found, same, tokens = (
        generate(model_of(), GOOD, **SPECIAL | rule, word_starts=each) for each in (starts.numpy(), starts, None)
    )
    assert torch.equal(found.sequences, same.sequences)
    assert not torch.equal(found.sequences, tokens.sequences)


@pytest.mark.parametrize("way", [*WAYS.values(), {"do_sample": True}])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_an_error(way, broken):
    features = GOOD.features.clone()
    features[-1] = broken
    with pytest.raises(VlscaleError, match=r"example 1 has a score that is no finite number; look for NaN"):
        generate(model_of(), dataclasses.replace(GOOD, features=features, region_mask=None), **SPECIAL | way)


@pytest.mark.parametrize("penalty", [-10, 10])
@pytest.mark.parametrize("scoring", ["official", "paddlenlp", "huggingface"])
def test_the_largest_penalties_leave_numbers(scoring, penalty):
    found = generate(
        model_of(max_position_embeddings=600), GOOD, **SPECIAL | {"eos_token_id": None}, num_beams=2,
        scoring=scoring, length_penalty=penalty, max_new_tokens=120,
    )  # fmt: skip
    assert found.scores.lt(0).all()
    assert found.scores.isfinite().all()


def test_an_empty_batch_a_training_model_and_a_missing_head_are_errors():
    empty = dataclasses.replace(
        UnimoBatch.of(unimo_batch(["text"])),
        **{name: torch.zeros(0, dtype=torch.int64) for name in ("input_ids", "passes", "examples", "images", "group")},
        **{name: torch.zeros(1, dtype=torch.int32) for name in ("cu_text", "cu_regions", "cu_tags")},
        prefix_len=None,
    )
    with pytest.raises(VlscaleError, match="the batch is empty"):
        generate(model_of(), empty, **SPECIAL)
    with pytest.raises(VlscaleError, match=r"call model\.eval"):
        generate(model_of().train(), GOOD, **SPECIAL)
    with pytest.raises(VlscaleError, match="no head 'words'"):
        generate(model_of(heads=("text_pooler",)), GOOD, **SPECIAL)
    with pytest.raises(VlscaleError, match="text-only"):
        generate(model_of(images=False, heads=("words",)), GOOD, **SPECIAL)
    with pytest.raises(VlscaleError, match="eos_token_id: Field required"):
        generate(model_of(), GOOD, bos_token_id=1, pad_token_id=0)
    assert TINY["vocab_size"] == 50  # what the messages above count on
