from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from vlscale.data.packing import Block, PackedBatch
from vlscale.ragged import RaggedBatch


def batch_of(examples=3):
    generator = torch.Generator().manual_seed(0)
    tokens, regions = 4 * examples, 3 * examples
    return RaggedBatch(
        task="mrfr",
        dataset="toy",
        input_ids=torch.arange(tokens),
        cu_text=torch.arange(0, tokens + 1, 4, dtype=torch.int32),
        features=torch.randn(regions, 5, generator=generator),
        boxes=torch.rand(regions, 4, generator=generator),
        cu_regions=torch.arange(0, regions + 1, 3, dtype=torch.int32),
        passes=torch.zeros(examples, dtype=torch.int64),
        examples=torch.arange(examples),
        images=torch.arange(examples),
        group=torch.arange(examples, dtype=torch.int32),
        region_rows=torch.arange(regions),
        region_mask=torch.arange(regions) % 2 == 0,
        targets={"region_positions": torch.arange(2), "empty": torch.zeros(0, 5), "scalar": torch.tensor(2.5)},
        weight=0.0,
    )


def equal(one, other):
    for item in dataclasses.fields(RaggedBatch):
        a, b = getattr(one, item.name), getattr(other, item.name)
        if item.name == "targets":
            assert list(a) == list(b)
            assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
        elif isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, item.name
            assert torch.equal(a, b), item.name
        else:
            assert a == b


@pytest.mark.parametrize("examples", [0, 3])
def test_round_trip(examples):
    batch = batch_of(examples)
    packed = PackedBatch.pack(batch)
    equal(packed.unpack(), batch)
    equal(pickle.loads(pickle.dumps(packed)).unpack(), batch)


def test_one_block():
    packed = PackedBatch.pack(batch_of())
    assert packed.buffer.is_shared()
    assert packed.slot is None
    unpacked = packed.unpack()
    base = packed.buffer.untyped_storage().data_ptr()
    tensors = [unpacked.features, unpacked.input_ids, unpacked.region_mask, unpacked.targets["region_positions"]]
    assert all(tensor.untyped_storage().data_ptr() == base for tensor in tensors)
    assert all(tensor.data_ptr() % 64 == base % 64 for tensor in tensors)


def test_what_lies_in_the_block_is_not_copied():
    memory = torch.full((4096,), 7, dtype=torch.uint8)
    block = Block(memory)
    features = block.empty((9, 5), torch.float16)
    boxes = block.empty((9, 4), torch.float32)
    batch = dataclasses.replace(batch_of(), features=features.fill_(1.5), boxes=boxes.fill_(0.25))
    places = [block.place(features), block.place(boxes)]
    assert places == [0, 128]
    packed = PackedBatch.pack(batch, block, 3)
    assert (packed.buffer, packed.slot) == (None, 3)
    layout = {(name, key): begin for name, key, _, _, begin in packed.layout}
    assert [layout["features", None], layout["boxes", None]] == places
    assert layout["input_ids", None] == 128 + 192
    equal(pickle.loads(pickle.dumps(packed)).unpack(memory), batch)


def test_parts_of_what_lies_in_the_block_keep_their_place():
    block = Block(torch.zeros(4096, dtype=torch.uint8))
    whole = block.empty((8, 4), torch.float32)
    assert block.place(whole[2:5]) == 32
    assert block.place(whole[:, 1]) == 128  # has gaps: copied
    assert block.place(torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("size", [0, 64, 500])
def test_a_block_that_is_too_small_is_replaced(size):
    block = Block(torch.zeros(size, dtype=torch.uint8))
    features = block.empty((9, 5), torch.float32)  # fits into 500
    batch = dataclasses.replace(batch_of(), features=features.copy_(batch_of().features))
    packed = PackedBatch.pack(batch, block, 3)
    assert packed.slot is None
    equal(packed.unpack(), batch_of())
    assert all(begin % 64 == 0 for *_, begin in packed.layout)
