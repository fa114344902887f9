"""RaggedBatch: cumulative lengths and owners, for full, one-sided and empty examples."""

from __future__ import annotations

import torch

from vlscale.ragged import RaggedBatch, cumulative, owners


def batch() -> RaggedBatch:
    text, regions = torch.tensor([3, 0, 2]), torch.tensor([1, 2, 0])
    return RaggedBatch(
        task="mlm",
        dataset="d",
        input_ids=torch.arange(5),
        cu_text=cumulative(text),
        features=torch.ones(3, 4),
        boxes=torch.zeros(3, 4),
        cu_regions=cumulative(regions),
        passes=torch.zeros(3, dtype=torch.long),
        examples=torch.arange(3),
        images=torch.arange(3),
        group=torch.arange(3, dtype=torch.int32),
        region_rows=torch.arange(3),
        targets={"itm_labels": torch.ones(3, dtype=torch.long)},
    )


def test_lengths_and_owners() -> None:
    b = batch()
    assert len(b) == 3
    assert b.tokens == 8
    assert b.text_lengths.tolist() == [3, 0, 2]
    assert b.region_counts.tolist() == [1, 2, 0]
    assert b.cu_joint.tolist() == [0, 4, 6, 8]
    assert b.text_owner().tolist() == [0, 0, 0, 2, 2]
    assert b.region_owner().tolist() == [0, 1, 1]


def test_map_reaches_every_tensor_and_only_tensors() -> None:
    doubled = batch().map(lambda tensor: tensor * 2)
    assert doubled.input_ids.tolist() == [0, 2, 4, 6, 8]
    assert doubled.targets["itm_labels"].tolist() == [2, 2, 2]
    assert doubled.task == "mlm"
    assert doubled.region_mask is None


def test_cumulative_of_nothing() -> None:
    assert cumulative(torch.zeros(0, dtype=torch.long)).tolist() == [0]
    assert owners(torch.tensor([0], dtype=torch.int32), 0).tolist() == []
