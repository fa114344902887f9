"""Published checkpoints there and back, on the golden state dict."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.golden_batches import golden_meta, golden_model, official_state
from vlscale.convert.uniter import TIED, config_from_official, from_official, to_official
from vlscale.errors import VlscaleError

pytestmark = pytest.mark.golden
LAYER = "uniter.encoder.layer.0"


@pytest.fixture(scope="module")
def official():
    return official_state()


def _equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_uniter_there_and_back_is_exact(official):
    ours = from_official(official)
    back = to_official(ours)
    assert _equal(back, official)
    assert _equal(from_official(back), ours)
    for second, first in TIED.items():
        assert back[second].data_ptr() == back[first].data_ptr()


def test_uniter_fits_the_model(official):
    model = golden_model()
    ours = from_official(official)
    assert ours.keys() == model.state_dict().keys()
    assert _equal(to_official(model.state_dict()), official)
    qkv = ours["encoder.layers.0.attention.qkv.weight"]
    for part, name in zip(qkv.chunk(3), ("query", "key", "value"), strict=True):
        assert torch.equal(part, official[f"{LAYER}.attention.self.{name}.weight"])


def test_uniter_gradients(official):
    """A text-only forward leaves the image side and all other heads without gradients."""
    model = golden_model()
    hidden = model.text_embedder(torch.tensor([5, 6]), torch.arange(2), model.type_embedding(torch.zeros(2).long()))
    hidden = model.encoder(hidden, torch.tensor([0, 2], dtype=torch.int32), 2)
    model.word_head(hidden).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = to_official(gradients, partial=True, tied=False)
    assert not set(found) & set(TIED)
    assert "uniter.img_embeddings.img_linear.weight" not in found
    assert set(found) <= set(official)
    assert_close(
        torch.cat([found[f"{LAYER}.attention.self.{part}.bias"] for part in ("query", "key", "value")]),
        model.encoder.layers[0].attention.qkv.bias.grad,
    )
    assert _equal(from_official(found, partial=True), gradients)


def test_uniter_half_precision_and_old_norm_names(official):
    old = {
        (name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")): tensor.half()
        for name, tensor in official.items()
    }
    found = from_official(old)
    expected = from_official({name: tensor.half().float() for name, tensor in official.items()})
    assert _equal(found, expected)


def test_uniter_tied_second_names_may_be_left_out(official):
    fewer = {name: tensor for name, tensor in official.items() if name not in TIED}
    assert _equal(from_official(fewer), from_official(official))
    only_second = {name: tensor for name, tensor in official.items() if name not in TIED.values()}
    assert _equal(from_official(only_second), from_official(official))


def test_uniter_what_does_not_fit_is_listed(official):
    state = dict(official)
    del state[f"{LAYER}.attention.self.key.bias"]
    state["vqa_output.0.weight"] = torch.zeros(1)
    with pytest.raises(VlscaleError, match=r"1 missing: .*key\.bias; 1 unexpected: vqa_output\.0\.weight"):
        from_official(state)
    del state["vqa_output.0.weight"]
    with pytest.raises(VlscaleError, match=r"needs all of .*query\.bias"):
        from_official(state, partial=True)
    untied = {**official, "feat_regress.weight": official["feat_regress.weight"] + 1}
    with pytest.raises(VlscaleError, match=r"feat_regress\.weight differs"):
        from_official(untied)
    twice = {**official, "uniter.embeddings.LayerNorm.gamma": torch.zeros(1)}
    with pytest.raises(VlscaleError, match="gamma/beta"):
        from_official(twice)
    flat = {**official, "uniter.img_embeddings.mask_embedding.weight": torch.zeros(3, 4)}
    with pytest.raises(VlscaleError, match=r"\[3, 4\], expected \[2"):
        from_official(flat)
    far = {**official, "uniter.encoder.layer.1000000000.output.dense.weight": torch.zeros(1)}
    with pytest.raises(VlscaleError, match="is of a layer beyond 1000"):
        from_official(far)
    hole = {
        name.replace(".layer.0.", ".layer.1."): tensor for name, tensor in official.items() if ".layer.1." not in name
    }
    with pytest.raises(VlscaleError, match="but nothing of layer 0; give the whole checkpoint, layers 0 to 1"):
        from_official(hole)
    ours = from_official(official)
    ours.pop("pooler.dense.bias")
    with pytest.raises(VlscaleError, match=r"1 missing: pooler\.dense\.bias"):
        to_official(ours)
    with pytest.raises(VlscaleError, match="pre-norm"):
        to_official({**ours, "encoder.final_norm.weight": torch.zeros(1)}, partial=True)


def test_uniter_config():
    raw = dict(golden_meta()["model"])
    config = config_from_official(raw, 9, 4, norm="post")
    assert config.hidden_dropout == raw["hidden_dropout_prob"]
    assert config.attention_dropout == raw["attention_probs_dropout_prob"]
    assert (config.feature_dim, config.num_classes) == (9, 4)
    assert config.num_hidden_layers == raw["num_hidden_layers"]
    with pytest.raises(VlscaleError, match="relu"):
        config_from_official({**raw, "hidden_act": "relu"}, 9, 4)
    del raw["hidden_size"]
    with pytest.raises(VlscaleError, match="hidden_size missing"):
        config_from_official(raw, 9, 4)
