"""Small random UNIMO batches and models."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.models.batches import TINY, random_batch
from vlscale.models.unimo import UnimoBatch, UnimoConfig, UnimoForPretraining
from vlscale.ragged import cumulative

# (text tokens, regions, tags, tokens of the text that belong to the source)
KINDS: dict[str, tuple[int, int, int, int]] = {
    "text": (5, 0, 0, 5),
    "image": (0, 4, 0, 0),
    "image and tags": (0, 3, 2, 0),
    "pair": (6, 3, 0, 6),
    "pair and tags": (4, 2, 3, 4),
    "caption": (5, 3, 2, 0),
    "text to text": (9, 0, 0, 4),
    "pair to text": (7, 3, 0, 3),
}


def tiny_unimo(seed: int = 0, **config: Any) -> UnimoForPretraining:
    """A small model with reproducible weights, dropout as published."""
    torch.manual_seed(seed)
    return UnimoForPretraining(UnimoConfig(**{**TINY, **config}))


def unimo_batch(kinds: list[str], seed: int = 0, masked: bool = True) -> UnimoBatch:
    """Examples of the kinds; every third region is masked."""
    texts, regions, tags, prefixes = (list(column) for column in zip(*(KINDS[kind] for kind in kinds), strict=True))
    draw = torch.Generator().manual_seed(seed)
    batch = UnimoBatch.of(random_batch(texts, regions, seed, masked))
    batch.tag_ids = torch.randint(5, TINY["vocab_size"], (sum(tags),), generator=draw)
    batch.cu_tags = cumulative(torch.tensor(tags))
    batch.prefix_len = torch.tensor(prefixes, dtype=torch.int32)
    return batch


def alone(batch: UnimoBatch, example: int) -> UnimoBatch:
    """One example of a batch as a batch of its own."""
    text, region, tag = (
        slice(*cu[example : example + 2].tolist()) for cu in (batch.cu_text, batch.cu_regions, batch.cu_tags)
    )

    def cut(tensor: Tensor | None, where: slice) -> Tensor | None:
        return None if tensor is None else tensor[where]

    one = slice(example, example + 1)
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[text],
        cu_text=cumulative(batch.text_lengths[one]),
        features=batch.features[region],
        boxes=batch.boxes[region],
        cu_regions=cumulative(batch.region_counts[one]),
        region_mask=cut(batch.region_mask, region),
        tag_ids=cut(batch.tag_ids, tag),
        cu_tags=cumulative(batch.tag_counts[one]),
        prefix_len=cut(batch.prefix_len, one),
        **{name: getattr(batch, name)[one] for name in ("passes", "examples", "images", "group")},
        region_rows=batch.region_rows[region],
    )
