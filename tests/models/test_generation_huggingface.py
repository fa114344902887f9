"""Searches and rules against ``transformers`` itself, which decodes the same model without its cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.models.generation_models import anew, model_of, sources_of
from tests.models.unimo_batches import alone, unimo_batch
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining, generate

transformers = pytest.importorskip("transformers")
BATCH = sources_of(unimo_batch(["image", "pair", "text", "image and tags"], seed=4))
ENDS = [3, 9, 14, 21, 30]


def rival(model: UnimoForPretraining, batch: UnimoBatch) -> Any:
    """The model and its sources as what ``transformers`` can generate with: every row is decoded anew, every time."""

    class Config(transformers.PretrainedConfig):
        model_type = "rival"

    class Rival(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class, main_input_name = Config, "input_ids"

        def __init__(self) -> None:
            super().__init__(Config(vocab_size=model.config.vocab_size, is_decoder=True, use_cache=False))
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # tells the device

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            beams = len(input_ids) // len(batch)
            rows = [
                anew(model, alone(batch, example), ids[None])
                for example, group in enumerate(input_ids.split(beams))
                for ids in group
            ]
            return Logits(torch.cat(rows))

        def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
            return {"input_ids": input_ids}

        @classmethod
        def can_generate(cls) -> bool:
            return True

    class Logits(SimpleNamespace):
        def __init__(self, logits: Tensor) -> None:
            super().__init__(logits=logits)

        def __contains__(self, name: str) -> bool:
            return hasattr(self, name)

    return Rival().eval()


def of_transformers(model: UnimoForPretraining, arguments: dict[str, Any]) -> tuple[list[list[int]], Tensor]:
    """Texts without padding, and scores."""
    first = torch.full((len(BATCH), 1), 2)
    found = rival(model, BATCH).generate(
        first, use_cache=False, bos_token_id=2, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        attention_mask=torch.ones_like(first), **arguments,
    )  # fmt: skip
    rows = []
    for row in found.sequences.tolist():
        ended = next((at for at, token in enumerate(row) if at and token in arguments["eos_token_id"]), len(row) - 1)
        rows.append(row[: ended + 1])
    return rows, getattr(found, "sequences_scores", None)


CASES: dict[str, dict[str, Any]] = {
    "beams": {},
    "longer": {"length_penalty": 2.0},
    "shorter": {"length_penalty": -1.0},
    "unpenalised, never early": {"length_penalty": 0.0, "early_stopping": "never"},
    "never early": {"early_stopping": "never"},
    "early": {"early_stopping": True},
    "least length": {"min_new_tokens": 4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "tokens": {"suppress_tokens": [5, 14, 25], "bad_words_ids": [[36], [12, 14], [21, 8, 9]]},
    "one end": {"eos_token_id": [14]},
}


@pytest.mark.parametrize("case", CASES)
def test_beam_search_is_that_of_transformers(case):
    model = model_of()
    arguments = {
        "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 7, "eos_token_id": ENDS, **CASES[case]
    }  # fmt: skip
    rows, scores = of_transformers(model, arguments)
    found = generate(model, BATCH, bos_token_id=2, pad_token_id=0, scoring="huggingface", **arguments)
    ours = [found.tokens(example, which) for example in range(len(BATCH)) for which in range(3)]
    assert ours == rows
    assert_close(found.scores.flatten(), scores, rtol=0, atol=1e-4)
    assert len({len(row) for row in rows}) > 1 or case in ("longer", "one end", "least length")


@pytest.mark.parametrize("case", ["least length", "n-grams", "tokens"])
def test_greedy_search_under_rules_is_that_of_transformers(case):
    model = model_of()
    arguments = {"max_new_tokens": 7, "eos_token_id": ENDS, "num_beams": 1, "do_sample": False, **CASES[case]}
    rows, _ = of_transformers(model, arguments)
    assert generate(model, BATCH, bos_token_id=2, pad_token_id=0, **arguments).best() == rows
