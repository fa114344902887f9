"""Captions of a dataset's images, as the folder's README generates them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.generation_models import model_of
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.errors import VlscaleError
from vlscale.models import unimo
from vlscale.models.unimo import UnimoForPretraining, caption_batch

VAL = Path(__file__).parents[1] / "fixtures/demo/val"
README = Path(unimo.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return open_dataset("demo", VAL)


def _model(dataset: Dataset) -> UnimoForPretraining:
    size, width = dataset.texts.meta.vocabulary.size, dataset.images.meta.feature_dim
    return model_of(vocab_size=size, feature_dim=width, max_position_embeddings=80)


def test_the_readmes_example_runs_as_written(dataset, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text().partition("## Generation")[2], re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "runs/demo_unimo/data").mkdir(parents=True)
    (tmp_path / "runs/demo_unimo/data/val_pairs").symlink_to(VAL)
    _model(dataset).save_pretrained(tmp_path / "runs/demo_unimo/model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    assert len(names["captions"]) == 4
    known = {*dataset.texts.meta.vocabulary.tokens[5:]}
    for caption in names["captions"]:
        assert len(caption.split()) >= 5 - 1  # the end token counts
        assert {*caption.split()} <= known


def test_a_batch_of_images_with_empty_texts(dataset):
    rows = [3, 0, 3]
    batch = caption_batch(dataset, rows, 5)
    vocabulary = dataset.texts.meta.vocabulary
    assert batch.input_ids.tolist() == [vocabulary.cls, vocabulary.sep] * 3
    features, boxes, counts, region_rows = dataset.images.regions(np.array(rows), 5)
    assert batch.cu_text.tolist() == [0, 2, 4, 6]
    assert batch.region_counts.tolist() == counts.tolist() == [5, 5, 5]
    assert torch.equal(batch.features, torch.from_numpy(features))
    assert torch.equal(batch.boxes, torch.from_numpy(boxes))
    assert batch.region_rows.tolist() == region_rows.tolist()
    assert batch.images.tolist() == rows
    special = {"bos_token_id": vocabulary.cls, "eos_token_id": None, "pad_token_id": vocabulary.pad}
    found = _model(dataset).generate(batch, **special, max_new_tokens=6)
    assert found.tokens(0) == found.tokens(2) != found.tokens(1)


@pytest.mark.parametrize(
    ("rows", "regions", "told"),
    [
        ([], 5, r"image_rows is float64 \[0\]; give at least one row number"),
        ([[0]], 5, r"image_rows is int64 \[1, 1\]"),
        ([0.5], 5, "image_rows is float64"),
        ([0, -1], 5, "there is no image row -1; give rows 0 to"),
        ([10**6], 5, "there is no image row 1000000"),
        ([0], 0, "max_regions is 0; give at least 1"),
    ],
)
def test_rows_that_are_none_are_errors(dataset, rows, regions, told):
    with pytest.raises(VlscaleError, match=told):
        caption_batch(dataset, rows, regions)


def test_images_alone_need_a_vocabulary(dataset):
    images = Dataset("images", VAL, {"images": dataset.images})
    with pytest.raises(VlscaleError, match="texts"):
        caption_batch(images, [0], 5)
    vocabulary = dataset.texts.meta.vocabulary
    assert caption_batch(images, [0], 5, vocabulary).input_ids.tolist() == [vocabulary.cls, vocabulary.sep]
