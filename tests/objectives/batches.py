"""Random packed batches and a small model for the objectives' tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlscale.data.schema import Vocabulary
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative, owners

FEATURE_DIM, NUM_CLASSES, VOCAB_SIZE = 6, 5, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_vocabulary(words: list[str] | None = None, size: int = VOCAB_SIZE) -> Vocabulary:
    words = words or []
    filler = [f"w{i}" for i in range(size - len(SPECIAL) - len(words))]
    return Vocabulary.from_tokens(SPECIAL + words + filler)


def make_batch(
    words: list[int], regions: list[int], task: str = "mlm", seed: int = 0, labels: list[int] | None = None
) -> RaggedBatch:
    """Texts of so many words between [CLS] and [SEP], and images of so many regions."""
    vocabulary, generator = make_vocabulary(), torch.Generator().manual_seed(seed)
    total, count = sum(words) + 2 * len(words), sum(regions)
    cu_text, cu_regions = cumulative(torch.tensor(words) + 2), cumulative(torch.tensor(regions))
    ids = torch.randint(len(SPECIAL), VOCAB_SIZE, (total,), generator=generator)
    ids[cu_text[:-1].long()], ids[cu_text[1:].long() - 1] = vocabulary.cls, vocabulary.sep
    corners = torch.rand(count, 2, generator=generator) / 2
    targets = {} if labels is None else {"itm_labels": torch.tensor(labels)}
    return RaggedBatch(
        task=task,
        dataset="pairs",
        input_ids=ids,
        cu_text=cu_text,
        features=torch.randn(count, FEATURE_DIM, generator=generator),
        boxes=torch.cat([corners, corners + 0.4], dim=1),
        cu_regions=cu_regions,
        passes=torch.zeros(len(words), dtype=torch.int64),
        examples=torch.arange(len(words)) * 3 + 1,
        images=torch.arange(len(words)),
        group=torch.arange(len(words), dtype=torch.int32),
        region_rows=torch.arange(count),
        targets=targets,
    )


def segments(cu: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the chosen segments in their new order, and their cumulative lengths."""
    lengths = cu.diff()[chosen]
    new = cumulative(lengths)
    owner = owners(new, int(lengths.sum()))
    within = torch.arange(owner.numel()) - new.long()[owner]
    return cu.long()[chosen][owner] + within, new


def take(batch: RaggedBatch, chosen: list[int]) -> RaggedBatch:
    """The batch of these examples, in this order; its targets must be one per example."""
    index = torch.tensor(chosen)
    text, cu_text = segments(batch.cu_text, index)
    regions, cu_regions = segments(batch.cu_regions, index)
    return replace(
        batch,
        input_ids=batch.input_ids[text],
        cu_text=cu_text,
        features=batch.features[regions],
        boxes=batch.boxes[regions],
        cu_regions=cu_regions,
        region_rows=batch.region_rows[regions],
        region_mask=None if batch.region_mask is None else batch.region_mask[regions],
        passes=batch.passes[index],
        examples=batch.examples[index],
        images=batch.images[index],
        group=batch.group[index],
        targets={name: value[index] for name, value in batch.targets.items()},
    )


def tiny_model(seed: int = 0) -> UniterForPretraining:
    """Small, without dropout, and with weights large enough that every loss depends on its inputs."""
    torch.manual_seed(seed)
    config = UniterConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        feature_dim=FEATURE_DIM,
        num_classes=NUM_CLASSES,
        initializer_range=0.3,
    )
    return UniterForPretraining(config).eval()


def class_probs(batch: RaggedBatch) -> RaggedBatch:
    """What the loader does: fill the class probabilities of the masked regions, keyed by their store row."""
    rows = batch.region_rows[batch.targets["region_positions"]]
    scores = torch.sin(rows[:, None] * 7.0 + torch.arange(NUM_CLASSES) * 1.7) * 3
    return replace(batch, targets=batch.targets | {"class_probs": scores.softmax(1)})
