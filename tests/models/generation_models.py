"""Models that generate, ways to generate, and the scores of next tokens as encoding everything anew has them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.models.unimo_batches import tiny_unimo
from vlscale.models.generation.sources import Sources
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining
from vlscale.ragged import cumulative

SPECIAL: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
MIXED = ["image", "image and tags", "pair", "pair and tags", "text", "text to text", "caption"]
SPEAKING = {"type_vocab_size": 3, "role_vocab_size": 3, "turn_vocab_size": 4}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "official": {"num_beams": 3, "length_penalty": 0.6, "num_return_sequences": 3},
    "official without repeats": {"num_beams": 3, "no_repeat_ngram_size": 2},
    "huggingface": {"num_beams": 3, "scoring": "huggingface", "num_return_sequences": 2},
    "paddlenlp": {"num_beams": 4, "scoring": "paddlenlp", "length_penalty": 0.6, "min_new_tokens": 3},
}


def sources_of(batch: UnimoBatch) -> UnimoBatch:
    """The batch without its targets, and without notes of sizes, so that it may be changed."""
    unnoted = {"sizes": None, "max_joint": None, "max_text": None, "max_regions": None}
    return dataclasses.replace(Sources.read(batch).batch, **unnoted)


def speaking(batch: UnimoBatch) -> UnimoBatch:
    """The batch with types, roles and turns."""
    count = torch.arange(batch.input_ids.numel())
    return dataclasses.replace(batch, text_types=count % 3, role_ids=count % 2 + 1, turn_ids=count % 4)


def model_of(seed: int = 0, **config: Any) -> UnimoForPretraining:
    """A tiny model in evaluation mode whose next tokens differ enough to be told apart."""
    return tiny_unimo(seed, **{"max_position_embeddings": 40, **config}).eval()


def with_targets(batch: UnimoBatch, targets: Tensor, positions: Tensor | None = None) -> UnimoBatch:
    """The sources followed by targets, int64 [B, T], in one batch to be encoded anew."""
    size, new = targets.shape
    lengths = batch.text_lengths

    def joined(source: Tensor | None, target: Tensor) -> Tensor | None:
        if source is None:
            return None
        parts = zip(source.split(lengths.tolist()), target, strict=True)
        return torch.cat([part for pair in parts for part in pair])

    counted = torch.cat([torch.arange(n) for n in lengths.tolist()]) + 2
    first = positions if positions is not None else torch.full((size,), 2)
    nothing = torch.zeros_like(targets)
    return dataclasses.replace(
        batch,
        input_ids=joined(batch.input_ids, targets),
        cu_text=cumulative(lengths + new),
        prefix_len=lengths,
        text_positions=joined(counted, first[:, None] + torch.arange(new)),
        text_types=joined(batch.text_types, nothing),
        role_ids=joined(batch.role_ids, nothing),
        turn_ids=joined(batch.turn_ids, nothing),
        sizes=None,
    )


@torch.no_grad()
def anew(model: UnimoForPretraining, batch: UnimoBatch, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of the tokens after each target token, encoded without any cache."""
    size, new = targets.shape
    whole = with_targets(batch, targets, positions)
    behind = whole.cu_text[1:].long()[:, None] - torch.arange(new, 0, -1)
    return model.mlm_logits(model.encode(whole), behind.flatten()).view(size, new, -1)
