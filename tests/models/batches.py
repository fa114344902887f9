"""Small random batches and models for the model tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 16,
    "feature_dim": 12,
    "num_classes": 7,
    "initializer": "fan_in",
}


def tiny_model(seed: int = 0, **config: Any) -> UniterForPretraining:
    """A small model with reproducible weights."""
    torch.manual_seed(seed)
    return UniterForPretraining(UniterConfig(**{**TINY, **config}))


def random_batch(text_lengths: list[int], region_counts: list[int], seed: int = 0, masked: bool = True) -> RaggedBatch:
    """Examples with the given lengths; every third region is masked."""
    draw = torch.Generator().manual_seed(seed)
    texts, regions, batch = sum(text_lengths), sum(region_counts), len(text_lengths)
    corner = torch.rand(regions, 2, generator=draw) * 0.5
    features = torch.randn(regions, TINY["feature_dim"], generator=draw)
    mask = torch.arange(regions) % 3 == 0
    return RaggedBatch(
        task="mlm",
        dataset="random",
        input_ids=torch.randint(5, TINY["vocab_size"], (texts,), generator=draw),
        cu_text=cumulative(torch.tensor(text_lengths)),
        features=features.masked_fill(mask[:, None], 0.0) if masked else features,
        boxes=torch.cat([corner, corner + torch.rand(regions, 2, generator=draw) * 0.5], 1),
        cu_regions=cumulative(torch.tensor(region_counts)),
        passes=torch.zeros(batch, dtype=torch.int64),
        examples=torch.arange(batch),
        images=torch.arange(batch),
        group=torch.arange(batch, dtype=torch.int32),
        region_rows=torch.arange(regions),
        region_mask=mask if masked else None,
    )


def all_head_loss(model: UniterForPretraining, batch: RaggedBatch) -> Tensor:
    """A scalar that reaches every parameter."""
    encoded = model.encode(batch)
    words = torch.arange(0, batch.input_ids.numel(), 2)
    regions = torch.arange(0, batch.boxes.shape[0], 2)
    outputs = (
        model.mlm_logits(encoded, words),
        model.predict_features(encoded, regions),
        model.classify_regions(encoded, regions),
        model.itm_logits(encoded),
    )
    return sum(((output - 1.0).square().mean() for output in outputs), torch.zeros(()))
