"""UNIMO against numbers computed by its authors' code, and by PaddleNLP's for the text models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tests.unimo_goldens import (
    LOSS,
    OUTPUT,
    load,
    official_batch,
    official_model,
    paddlenlp_batch,
    paddlenlp_model,
)
from vlscale.convert.unimo_model import to_official
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining
from vlscale.objectives.generation import next_tokens, smoothed_cross_entropy

pytestmark = pytest.mark.golden
BACKENDS = pytest.mark.parametrize("backend", ["padded", "packed"])


def _flat(position: Tensor, real: Tensor, first: int) -> Tensor:
    """From indices into the flattened padded texts to indices into the packed ones; texts begin in column ``first``."""
    in_text = real[:, first:].reshape(-1)
    assert in_text[position].all()
    return in_text.long().cumsum(0)[position] - 1


@torch.no_grad()
@BACKENDS
def test_text_understanding(backend):
    golden, params = load("text_nlu"), load("params")
    model = official_model(attention_backend=backend)
    batch, real = official_batch(golden)
    encoded = model.encode(batch)
    assert_close(encoded.hidden, golden["out.seq"][real], **OUTPUT)
    assert_close(encoded.text, encoded.hidden)
    pooled = model.pool_text(encoded)
    assert_close(pooled, golden["out.pooled_text"], **OUTPUT)
    logits3 = pooled @ params["cls_out_3_w"] + params["cls_out_3_b"]
    assert_close(logits3, golden["out.logits3"], **OUTPUT)
    assert_close(F.cross_entropy(logits3, golden["in.label"].squeeze(1)), golden["out.cls_loss"].squeeze(), **LOSS)
    logits1 = pooled @ params["cls_out_1_w"] + params["cls_out_1_b"]
    assert_close(logits1, golden["out.logits1"], **OUTPUT)
    assert_close(F.mse_loss(logits1, golden["in.target"]), golden["out.reg_loss"].squeeze(), **LOSS)
    counted = model.encode(dataclasses.replace(batch, text_positions=None))
    assert torch.equal(counted.hidden, encoded.hidden)  # its positions are those that we count


@torch.no_grad()
@BACKENDS
def test_pairs(backend):
    golden, model = load("pair_vl"), official_model(attention_backend=backend)
    batch, real = official_batch(golden)
    width = golden["in.image_embedding"].shape[1]
    encoded = model.encode(batch)
    assert_close(encoded.hidden, golden["out.enc_vl"][real], **OUTPUT)
    assert_close(encoded.text, golden["out.enc_l"][real[:, width:]], **OUTPUT)
    assert_close(encoded.images, golden["out.enc_v"][:, 0], **OUTPUT)
    assert_close(encoded.regions, golden["out.enc_v"][:, 1:][real[:, 1:width]], **OUTPUT)
    text, image = model.pool_text(encoded), model.pool_image(encoded)
    assert_close(text, golden["out.pooled_text"], **OUTPUT)
    assert_close(image, golden["out.pooled_image"], **OUTPUT)
    assert_close(text * image, golden["out.match_mul"], **OUTPUT)
    assert_close(text + image, golden["out.match_sum"], **OUTPUT)
    assert_close(model.match_scores(encoded), golden["out.match_score"].squeeze(1), **OUTPUT)


@torch.no_grad()
@BACKENDS
@pytest.mark.parametrize("name", ["seq2seq", "seq2seq_contpos", "dialog"])
def test_text_generation(name, backend):
    golden, model = load(name), official_model(roles=name == "dialog", attention_backend=backend)
    batch, real = official_batch(golden)
    assert batch.prefix_len is not None
    encoded = model.encode(batch)
    assert_close(encoded.hidden, golden["out.seq"][real], **OUTPUT)
    positions, labels = next_tokens(batch)
    assert torch.equal(positions, _flat(golden["in.tgt_pos"].squeeze(1), real, 0))
    assert torch.equal(labels, golden["in.tgt_label"].squeeze(1))
    logits = model.mlm_logits(encoded, positions)
    assert_close(logits, golden["out.logits"], **OUTPUT)
    loss = smoothed_cross_entropy(logits, labels, 0.1) / labels.numel()
    assert_close(loss, golden["out.loss"].squeeze(), **LOSS)


def _caption_loss(model: UnimoForPretraining, batch: UnimoBatch, smoothing: float) -> Tensor:
    positions, labels = next_tokens(batch)
    return smoothed_cross_entropy(model.mlm_logits(model.encode(batch), positions), labels, smoothing) / labels.numel()


@torch.no_grad()
@BACKENDS
def test_captions(backend):
    golden, model = load("img2txt"), official_model(attention_backend=backend)
    batch, real = official_batch(golden)
    first = real.shape[1] - golden["in.tok_ids"].shape[1]
    encoded = model.encode(batch)
    assert_close(encoded.hidden, golden["out.enc_vol"][real], **OUTPUT)
    positions, labels = next_tokens(batch)
    assert torch.equal(positions, _flat(golden["in.tgt_pos"].squeeze(1), real, first))
    assert torch.equal(labels, golden["in.tgt_label"].squeeze(1))
    assert_close(model.mlm_logits(encoded, positions), golden["out.logits"], **OUTPUT)
    assert_close(_caption_loss(model, batch, 0.1), golden["out.loss"].squeeze(), **LOSS)
    assert_close(_caption_loss(model, batch, 0.0), golden["out.loss_nosmooth"].squeeze(), **LOSS)
    counted = model.encode(dataclasses.replace(batch, text_positions=None, tag_positions=None))
    assert torch.equal(counted.hidden, encoded.hidden)


@BACKENDS
def test_caption_gradients(backend):
    golden, model = load("img2txt"), official_model(attention_backend=backend)
    _caption_loss(model, official_batch(golden)[0], 0.1).backward()
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    ours = to_official(grads)
    names = [name.removeprefix("out.grad.") for name in golden if name.startswith("out.grad.")]
    assert names
    for name in names:
        assert_close(ours[name], golden[f"out.grad.{name}"], **LOSS, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
@BACKENDS
def test_paddlenlp_understanding(backend):
    golden, model = load("paddlenlp_io", "paddlenlp"), paddlenlp_model(attention_backend=backend)
    batch, real = paddlenlp_batch(golden, generated=False)
    encoded = model.encode(batch)
    every = torch.arange(batch.input_ids.numel())
    assert_close(encoded.hidden, golden["out.hidden_default_mask"][real], **OUTPUT)
    assert_close(model.mlm_logits(encoded, every), golden["out.logits_default_mask"][real], **OUTPUT)
    plain, _ = paddlenlp_batch(golden, generated=False, types=False)
    plain = dataclasses.replace(plain, text_positions=None)  # counted from 0 behind the padding, there as here
    logits = model.mlm_logits(model.encode(plain), every)
    assert_close(logits, golden["out.logits_default_pos_no_type"][real], **OUTPUT)


@torch.no_grad()
@BACKENDS
def test_paddlenlp_generation(backend):
    golden, model = load("paddlenlp_io", "paddlenlp"), paddlenlp_model(attention_backend=backend)
    batch, real = paddlenlp_batch(golden, generated=True)
    positions = _flat(golden["in.masked_positions"], real, 0)
    logits = model.mlm_logits(model.encode(batch), positions)
    assert_close(logits, golden["out.logits_seq2seq_masked"], **OUTPUT)
    # Labels are of the same positions, not of the next; the mean there is over all positions, ignored ones included.
    labels = golden["in.labels"]
    kept = labels[real] != -100
    logits = model.mlm_logits(model.encode(batch), kept.nonzero()[:, 0])
    mean = F.cross_entropy(logits, labels[real][kept], reduction="sum") / labels.numel()
    assert_close(mean, golden["out.loss"].squeeze(), **LOSS)
