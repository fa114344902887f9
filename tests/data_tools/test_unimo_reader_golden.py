"""Whole batches of UNIMO's own reader, from its feature files through our importers and the model's own bookkeeping."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data_tools.formats import unimo_images, unimo_texts
from tests.data_tools.feature_files import good
from tests.golden_batches import golden_folder, load_golden
from tests.unimo_goldens import official_model
from vlscale.models.unimo_batch import JointLayout, UnimoBatch
from vlscale.models.unimo_embeddings import global_features, location_vectors
from vlscale.ragged import cumulative

pytestmark = pytest.mark.golden
FILES = golden_folder("unimo") / "official" / "feature_files"


def _records(module, name):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_args([])
    arguments.sources = [FILES / name]
    return good(module.open_source(arguments))


def _batch(golden) -> UnimoBatch:
    """The SNLI-VE file as a packed batch; [CLS] and [SEP] as the golden has them."""
    images = {image.id: image for image in _records(unimo_images, "snli_ve_part0.txt")}
    texts = _records(unimo_texts, "snli_ve_part0.txt")
    pictures = [images[text.images[0]] for text in texts]
    cls, sep = int(golden["out.src_ids"][0, 0, 0]), 2
    ids = [[cls, *text.input_ids, sep] for text in texts]
    counts = [len(picture.features) for picture in pictures]
    size = len(texts)
    return UnimoBatch(
        task="golden",
        dataset="golden",
        input_ids=torch.tensor([token for text in ids for token in text]),
        cu_text=cumulative(torch.tensor([len(text) for text in ids])),
        features=torch.from_numpy(np.concatenate([picture.features for picture in pictures])),
        boxes=torch.from_numpy(np.concatenate([picture.boxes for picture in pictures])).float(),
        cu_regions=cumulative(torch.tensor(counts)),
        passes=torch.zeros(size, dtype=torch.int64),
        examples=torch.arange(size),
        images=torch.arange(size),
        group=torch.arange(size, dtype=torch.int32),
        region_rows=torch.arange(sum(counts)),
    )


def test_snli_ve_batch_is_the_official_readers():
    golden = {name.removeprefix("out."): t for name, t in load_golden("reader_snli_ve", "unimo/official").items()}
    batch = _batch(load_golden("reader_snli_ve", "unimo/official"))
    layout = JointLayout(batch, batch.measured)
    in_text, in_image = golden["t_mask"].squeeze(2).bool(), golden["v_mask"].squeeze(2).bool()
    assert torch.equal(batch.text_lengths, in_text.sum(1).int())
    assert torch.equal(batch.region_counts + 1, in_image.sum(1).int())
    assert torch.equal(batch.input_ids, golden["src_ids"].squeeze(2)[in_text])
    positions = official_model().text_embedder.positions(batch)
    assert torch.equal(positions, golden["pos_ids"].squeeze(2)[in_text])
    slots = golden["image_embedding"][:, 0]
    assert_close(global_features(batch.features, batch, layout), slots, rtol=0, atol=1e-6)
    inside = in_image[:, 1:]
    assert torch.equal(batch.features, golden["image_embedding"][:, 1:][inside])
    assert_close(location_vectors(batch.boxes), golden["image_loc"][:, 1:][inside], rtol=0, atol=1e-6)
    # what sees what: all real positions of an example see each other, which is what packing means
    real = torch.cat([in_image, in_text], 1)
    assert torch.equal(golden["input_mask"].bool(), real[:, :, None] & real[:, None, :])
    assert torch.equal(layout.cu.diff(), real.sum(1).int())
    assert not golden["sent_ids"].squeeze(2)[in_text].any()
