"""What generation refuses, and how it says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.models.batches import TINY
from tests.models.generation_models import SPECIAL, model_of
from tests.models.unimo_batches import unimo_batch
from vlscale.errors import VlscaleError
from vlscale.models.unimo import UnimoBatch, generate


def _broken(batch: UnimoBatch) -> UnimoBatch:
    return dataclasses.replace(batch, prefix_len=torch.zeros_like(batch.text_lengths))


GOOD = unimo_batch(["image", "pair"])
ERRORS: list[tuple[dict[str, Any], UnimoBatch, str]] = [
    ({}, _broken(unimo_batch(["image", "text"])), "example 1 has neither image nor tags nor text"),
    ({"bos_token_id": None}, GOOD, "example 0 has no text to go on from"),
    ({"max_new_tokens": 39}, GOOD, r"needs? 41 positions, the model has 40; lower max_new_tokens .* to 38"),
    ({"max_new_tokens": 0}, GOOD, "max_new_tokens"),
    ({"max_length": 1}, GOOD, "leaves no token"),
    ({"max_length": 9, "max_new_tokens": 8}, GOOD, "give one of them"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, GOOD, "at least 9 new tokens are asked for, and at most 8"),
    ({"num_beams": 51}, GOOD, "num_beams 51 exceeds the 50 tokens"),
    ({"num_beams": 49, "suppress_tokens": [7, 8]}, GOOD, "num_beams 49 exceeds the 48 tokens"),
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
    ({"seed": 1, "generator": torch.Generator()}, GOOD, "give one of them"),
    ({"eos_token_id": [3, 50]}, GOOD, r"eos_token_id 50 is not in the vocabulary \(0 to 49\)"),
    ({"bad_words_ids": [[1, 60]]}, GOOD, "bad_words_ids 60"),
    ({"bad_words_ids": [[]]}, GOOD, "empty sequence"),
    ({"word_starts": torch.ones(49, dtype=torch.bool)}, GOOD, r"word_starts is torch.bool \[49\]"),
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
