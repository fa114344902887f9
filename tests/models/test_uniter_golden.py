"""The encoder against numbers computed by UNITER's own code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.golden_batches import (
    OUTPUT,
    golden_batch,
    golden_model,
    image_only,
    joint_kind,
    load_golden,
    text_only,
)

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=["padded", "packed"])
def case(request):
    golden = load_golden("encoder")
    return golden_model(attention_backend=request.param), golden_batch(golden, "encoder"), golden


def _real(padded: Tensor, mask: Tensor) -> Tensor:
    return padded[mask.bool()]


@torch.no_grad()
def test_uniter_embeddings(case):
    model, batch, golden = case
    assert_close(model.embed_text(batch), _real(golden["out.txt_emb"], golden["in.txt_only_mask"]), **OUTPUT)
    assert_close(model.embed_regions(batch), _real(golden["out.img_emb"], golden["in.img_only_mask"]), **OUTPUT)
    joint = model.encode(batch, all_layers=True).layers[0]
    assert_close(joint, _real(golden["out.joint_emb"], golden["in.attn_masks"]), **OUTPUT)


@torch.no_grad()
def test_uniter_every_layer_and_pooled(case):
    model, batch, golden = case
    encoded = model.encode(batch, all_layers=True)
    names = sorted(
        (name for name in golden if name.startswith("out.hidden.")), key=lambda name: int(name.split(".")[2])
    )
    assert len(names) == len(encoded.layers) - 1 == model.config.num_hidden_layers
    for name, layer in zip(names, encoded.layers[1:], strict=True):
        assert_close(layer, _real(golden[name], golden["in.attn_masks"]), **OUTPUT)
    assert_close(encoded.hidden, encoded.layers[-1])
    assert_close(model.pool(encoded), golden["out.pooled"], **OUTPUT)


@torch.no_grad()
def test_uniter_text_and_region_views(case):
    model, batch, golden = case
    encoded = model.encode(batch)
    last = golden[f"out.hidden.{model.config.num_hidden_layers - 1}"]
    text, region = joint_kind(golden)
    assert_close(encoded.text, last[text], **OUTPUT)
    assert_close(encoded.regions, last[region], **OUTPUT)


@torch.no_grad()
def test_uniter_one_modality(case):
    model, batch, golden = case
    texts, images = text_only(batch), image_only(batch)
    assert_close(model.encode(texts).hidden, _real(golden["out.txt_only"], golden["in.txt_only_mask"]), **OUTPUT)
    assert_close(model.encode(images).hidden, _real(golden["out.img_only"], golden["in.img_only_mask"]), **OUTPUT)


@torch.no_grad()
@pytest.mark.parametrize(
    ("task", "output"), [("mlm", "out.logits"), ("mrfr", "out.pred"), ("mrc", "out.logits"), ("itm", "out.scores")]
)
def test_uniter_head_outputs(task, output):
    golden, model = load_golden(task), golden_model()
    batch = golden_batch(golden, task)
    encoded = model.encode(batch)
    head = {
        "mlm": lambda: model.mlm_logits(encoded, batch.targets["token_positions"]),
        "mrfr": lambda: model.predict_features(encoded, batch.targets["region_positions"]),
        "mrc": lambda: model.classify_regions(encoded, batch.targets["region_positions"]),
        "itm": lambda: model.itm_logits(encoded),
    }[task]
    assert_close(head(), golden[output], **OUTPUT)
