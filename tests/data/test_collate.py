from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.test_packing import equal
from tests.helpers import make_dataset
from vlscale.data.collate import collate
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import deal
from vlscale.data.packing import Block
from vlscale.data.plan import Plan, PlanSettings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset("toy", make_dataset(tmp_path_factory.mktemp("data") / "toy"), True)


def micro_of(dataset, task, replace="both"):
    plan = Plan([(dataset.lengths, {task: 1})], PlanSettings(seed=3, global_batch_examples=20, itm_replace=replace))
    return deal(plan.step(plan.start())[0], 2, 1, 10_000)[0][0]


@pytest.mark.parametrize("task", ["mlm", "itm"])
def test_batch_holds_what_the_stores_hold(dataset, task):
    micro = micro_of(dataset, task)
    batch = collate(dataset, micro, 4, dataset.vocabulary.cls, dataset.vocabulary.sep)
    assert len(batch) == len(micro)
    assert batch.tokens == micro.tokens - np.maximum(dataset.lengths.regions[micro.images] - 4, 0).sum()
    ptr = np.r_[0, np.cumsum(dataset.lengths.regions)]
    for place in range(len(micro)):
        text, image = dataset.texts.row(micro.texts[place]), dataset.images.row(micro.images[place])
        begin, end = batch.cu_text[place : place + 2].tolist()
        ids = batch.input_ids[begin:end].tolist()
        assert ids == [dataset.vocabulary.cls, *text["input_ids"].tolist(), dataset.vocabulary.sep]
        begin, end = batch.cu_regions[place : place + 2].tolist()
        count = min(4, len(image["boxes"]))
        assert end - begin == count
        assert np.array_equal(batch.features[begin:end].numpy(), image["features"][:count])
        assert np.array_equal(batch.boxes[begin:end].numpy(), image["boxes"][:count])
        first = ptr[micro.images[place]]
        assert batch.region_rows[begin:end].tolist() == list(range(first, first + count))
    for name in ("passes", "examples", "images", "group"):
        assert np.array_equal(getattr(batch, name).numpy(), getattr(micro, name))
    assert (batch.task, batch.dataset, batch.weight) == (task, "toy", 1.0)
    if task == "itm":
        assert batch.targets["itm_labels"].tolist() == micro.labels.tolist()
        assert batch.targets["itm_labels"].dtype == torch.int64
        assert 0 < micro.labels.sum() < len(micro)
    else:
        assert not batch.targets


def test_types(dataset):
    batch = collate(dataset, micro_of(dataset, "mlm"), 100, 2, 3)
    for name in ("input_ids", "passes", "examples", "images", "region_rows"):
        assert getattr(batch, name).dtype == torch.int64, name
    for name in ("cu_text", "cu_regions", "group"):
        assert getattr(batch, name).dtype == torch.int32, name
    assert batch.features.dtype == torch.float16  # as stored
    assert batch.boxes.dtype == torch.float32


def test_planned_tokens_are_the_tokens_read(dataset):
    for task in ("mlm", "itm"):
        micro = micro_of(dataset, task)
        assert collate(dataset, micro, 100, 2, 3).tokens == micro.tokens


def test_texts_without_image(tmp_path):
    dataset = open_dataset("toy", make_dataset(tmp_path / "toy", images=2, texts_without_image=6), True)
    micro = micro_of(dataset, "mlm")
    batch = collate(dataset, micro, 100, 2, 3)
    assert (micro.images == -1).any()
    assert np.array_equal(batch.region_counts.numpy() == 0, micro.images == -1)
    assert batch.tokens == micro.tokens


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("task", ["mlm", "itm"])
def test_into_a_block(tmp_path, task, dtype):
    dataset = open_dataset("toy", make_dataset(tmp_path / "toy", feature_dtype=dtype), True)
    micro = micro_of(dataset, task)
    expected = collate(dataset, micro, 5, 2, 3)
    assert expected.features.dtype == getattr(torch, dtype)
    for size in (1 << 16, 2000, 0):
        memory = torch.full((size,), 255, dtype=torch.uint8)
        batch = collate(dataset, micro, 5, 2, 3, Block(memory))
        equal(batch, expected)
        base = memory.data_ptr()
        tensors = [batch.input_ids, batch.cu_text, batch.features, batch.boxes, batch.images, batch.region_rows]
        inside = [base <= tensor.data_ptr() < base + size for tensor in tensors]
        assert (any(inside), all(inside)) == (size > 0, size > 9000)
