"""UNIMO's model: every kind of input in one batch, what sees what, [IMG], heads, errors, folders."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

from tests.models.batches import TINY, random_batch, tiny_model
from tests.models.unimo_batches import KINDS, alone, tiny_unimo, unimo_batch
from vlscale.config import ModelSection
from vlscale.errors import VlscaleError
from vlscale.models.registry import build_model, resolve_config
from vlscale.models.unimo import UnimoBatch, UnimoConfig, UnimoForPretraining
from vlscale.models.unimo_embeddings import global_features, location_vectors
from vlscale.models.uniter import UniterForPretraining
from vlscale.objectives.mlm import MaskedLanguageModeling

EXACT = {"rtol": 1e-12, "atol": 1e-12}
BACKENDS = pytest.mark.parametrize("backend", ["padded", "packed"])


def _double(batch: UnimoBatch) -> UnimoBatch:
    return dataclasses.replace(batch, features=batch.features.double(), boxes=batch.boxes.double())


def _model(**config) -> UnimoForPretraining:
    return tiny_unimo(**config).double().eval()


@torch.no_grad()
@BACKENDS
def test_every_kind_of_input_is_the_same_in_a_batch_and_alone(backend):
    model, batch = _model(attention_backend=backend), _double(unimo_batch([*KINDS]))
    encoded = model.encode(batch)
    assert encoded.hidden.shape[0] == batch.tokens == int(encoded.cu[-1])
    for example in range(len(batch)):
        start, end = encoded.cu[example : example + 2].tolist()
        assert_close(encoded.hidden[start:end], model.encode(alone(batch, example)).hidden, **EXACT)


@torch.no_grad()
def test_both_backends_agree():
    batch = _double(unimo_batch([*KINDS]))
    hidden = {name: _model(attention_backend=name).encode(batch).hidden for name in ("padded", "packed")}
    assert_close(hidden["padded"], hidden["packed"], **EXACT)


@torch.no_grad()
@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_change_reaches_is_what_may_see_it(kind, backend):
    """A change of text token j reaches all rows if j is of the source, else j and the target behind it, only."""
    model, batch = _model(attention_backend=backend), _double(unimo_batch([kind]))
    before = model.encode(batch)
    text, prefix = KINDS[kind][0], KINDS[kind][3]
    for token in range(text):
        ids = batch.input_ids.clone()
        ids[token] = 4
        after = model.encode(dataclasses.replace(batch, input_ids=ids))
        changed = (after.hidden != before.hidden).any(1)
        row = int(before.text_index[token])
        expected = torch.arange(len(changed)) >= row if token >= prefix else torch.ones_like(changed)
        assert torch.equal(changed, expected), token


@torch.no_grad()
def test_a_target_in_the_batch_changes_nothing_for_others():
    model, batch = _model(), _double(unimo_batch(["text", "pair and tags", "image"]))
    plain = model.encode(dataclasses.replace(batch, prefix_len=None)).hidden
    assert_close(model.encode(batch).hidden, plain, **EXACT)  # whole texts are source: everything sees everything


@torch.no_grad()
def test_order_and_views():
    model, batch = _model(), _double(unimo_batch(["caption", "text", "image"]))
    encoded = model.encode(batch)
    text, regions, tags, _ = KINDS["caption"]
    assert encoded.layout.image_examples.tolist() == [0, 2]
    assert encoded.region_index[:regions].tolist() == [*range(1, 1 + regions)]
    assert encoded.layout.tag_rows.tolist() == [*range(1 + regions, 1 + regions + tags)]
    assert encoded.text_index[:text].tolist() == [*range(1 + regions + tags, 1 + regions + tags + text)]
    rows = [*encoded.layout.image_rows.tolist(), *encoded.layout.tag_rows.tolist(), *encoded.text_index.tolist()]
    assert sorted(rows) == [*range(batch.tokens)]
    assert encoded.images.shape == (2, TINY["hidden_size"])
    assert encoded.regions.shape[0] == batch.boxes.shape[0]
    assert encoded.tags.shape[0] == tags


def _globals(batch: UnimoBatch):
    return global_features(batch.features, batch, tiny_unimo().eval().encode(batch).layout)


@torch.no_grad()
def test_the_slot_is_the_mean_of_what_is_not_masked():
    batch = unimo_batch(["pair", "text", "image"], masked=False)
    first, last = batch.features[: KINDS["pair"][1]], batch.features[KINDS["pair"][1] :]
    assert_close(_globals(batch), torch.stack([first.mean(0), last.mean(0)]))
    mask = torch.zeros(batch.boxes.shape[0], dtype=torch.bool)
    mask[0] = True
    assert_close(_globals(dataclasses.replace(batch, region_mask=mask))[0], first[1:].mean(0))
    hidden = dataclasses.replace(batch, region_mask=torch.ones_like(mask))
    assert_close(_globals(hidden), torch.zeros(2, TINY["feature_dim"]))


@torch.no_grad()
def test_the_slot_does_not_tell_what_is_masked():
    model, batch = tiny_unimo().eval(), unimo_batch(["image"])
    assert batch.region_mask.any()
    other = batch.features.masked_fill(batch.region_mask[:, None], 0.0)
    before, after = (model.encode(dataclasses.replace(batch, features=f)).images for f in (other, batch.features))
    assert torch.equal(before, after)


def test_location_is_the_box_and_its_area():
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.7]])
    assert_close(location_vectors(boxes), torch.tensor([[0.1, 0.2, 0.5, 0.7, 0.2]]))


@torch.no_grad()
def test_half_precision_features_enter_in_the_models_dtype():
    model, batch = tiny_unimo().eval(), unimo_batch(["pair"])
    half = dataclasses.replace(batch, features=batch.features.half())
    assert model.encode(half).hidden.dtype == torch.float32
    assert model.bfloat16().encode(half).hidden.dtype == torch.bfloat16


def _all_head_loss(model: UnimoForPretraining, batch: UnimoBatch):
    encoded = model.encode(batch)
    words, regions = torch.arange(batch.input_ids.numel()), torch.arange(batch.boxes.shape[0])
    pairs = ((batch.text_lengths > 0) & (batch.region_counts > 0)).nonzero()[:, 0]
    outputs = (
        model.mlm_logits(encoded, words),
        model.predict_features(encoded, regions),
        model.classify_regions(encoded, regions),
        model.match_scores(encoded, pairs),
    )
    return sum(((output - 1.0).square().sum() for output in outputs), torch.zeros(()))


@BACKENDS
@pytest.mark.parametrize("policy", ["full", "every 2"])
def test_gradients_reach_everything_and_survive_checkpointing(policy, backend):
    batch = _double(unimo_batch([*KINDS]))
    grads = []
    for chosen in ("none", policy):
        model = _model(attention_backend=backend)
        model.set_activation_checkpointing(chosen)
        _all_head_loss(model, batch).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert_close(plain, again, **EXACT)


@pytest.mark.parametrize("kinds", [["text"], ["image"], ["text to text"]])
def test_a_batch_of_one_kind_keeps_the_graph_of_all_heads(kinds):
    """Idle modules run on zero rows, so that every rank calls every module."""
    model = tiny_unimo()
    _all_head_loss(model, unimo_batch(kinds)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_is_on_in_training_only():
    model, batch = tiny_unimo().train(), unimo_batch([*KINDS])
    assert not torch.equal(model.encode(batch).hidden, model.encode(batch).hidden)
    model.eval()
    assert torch.equal(model.encode(batch).hidden, model.encode(batch).hidden)


@torch.no_grad()
def test_a_plain_batch_is_a_pair_in_which_everything_sees_everything():
    model, plain = _model(), random_batch([4, 3], [2, 0])
    plain = dataclasses.replace(plain, features=plain.features.double())
    assert_close(model.encode(plain).hidden, model.encode(UnimoBatch.of(plain)).hidden, **EXACT)
    assert UnimoBatch.of(plain).tokens == plain.tokens + 1  # the slot of the one image


def test_masked_language_modelling_takes_it_as_it_is():
    model, batch = tiny_unimo().eval(), random_batch([6, 4], [3, 0])
    batch.targets.update(token_positions=torch.tensor([1, 7]), token_labels=torch.tensor([5, 6]))
    terms = MaskedLanguageModeling(masking=None).terms(model, batch)
    assert torch.isfinite(terms["mlm"].sum)


def test_moving_a_batch_notes_its_sizes():
    batch = unimo_batch([*KINDS])
    moved = batch.to("cpu")
    assert isinstance(moved, UnimoBatch)
    assert moved.sizes == batch.measured
    assert (moved.sizes.images, moved.sizes.texts) == (6, 6)
    assert moved.sizes.targets == sum(text - prefix for text, _, _, prefix in KINDS.values())


@torch.no_grad()
def test_matching_of_what_was_encoded_apart():
    model, batch = _model(), _double(unimo_batch(["pair", "pair"]))
    encoded = model.encode(batch)
    text, image = model.pool_text(encoded), model.pool_image(encoded)
    assert_close(model.match_scores(encoded), model.match_pooled(text, image), **EXACT)
    by_sum = _model(match_fusion="sum")
    assert not torch.allclose(by_sum.match_pooled(text, image), model.match_pooled(text, image))
    assert (text >= 0).all()  # relu


def test_weights_are_drawn_within_two_standard_deviations():
    model = UnimoForPretraining(UnimoConfig(**{**TINY, "initializer": "truncated_normal"}))
    table = model.text_embedder.word.weight
    assert table.abs().max() <= 2 * 0.02
    assert 0.015 < float(table.detach().std()) < 0.02  # 0.88 of the untruncated one's


@pytest.mark.parametrize(("preset", "published"), [("unimo-base", 127_457_625), ("unimo-large", 359_616_601)])
def test_presets_have_the_published_size(preset, published):
    heads = ["words", "text_pooler", "image_pooler"]
    with torch.device("meta"):
        model = build_model(ModelSection(name="unimo", preset=preset, config={"heads": heads}))
    assert sum(parameter.numel() for parameter in model.parameters()) == published
    assert model.config.layer_norm_eps == 1e-5
    assert model.config.longest_text == 512


@pytest.mark.parametrize(
    ("config", "facts", "message"),
    [
        ({"hidden_sise": 8}, {}, "unknown key 'hidden_sise'; did you mean 'hidden_size'"),
        (
            {"images": False},
            {},
            "heads has features, classes, matching, image_pooler, which a model with images: false",
        ),
        ({"heads": ["matching", "text_pooler"]}, {}, "matching, which needs image_pooler"),
        ({"first_position": 600}, {}, "leaves no row"),
        ({"activation": "tanh"}, {}, "activation: .* found 'tanh'"),
        ({}, {"vocab_size": 30522}, "vocab_size is 50265, but the texts' vocabulary has 30522"),
        ({}, {"max_text_tokens": 511}, "leaves 512 positions .* needs 513"),
    ],
)
def test_configurations_that_do_not_fit(config, facts, message):
    with pytest.raises(VlscaleError, match=message) as caught:
        resolve_config(ModelSection(name="unimo", preset="unimo-base", config=config), **facts)
    assert "\n" not in str(caught.value)


def _too_long() -> UnimoBatch:
    return UnimoBatch.of(random_batch([15], [2]))


@pytest.mark.parametrize(
    ("batch", "config", "message"),
    [
        (_too_long(), {}, "a text has 15 tokens with .* the model has 14 positions"),
        (unimo_batch(["pair"]), {"feature_dim": 9}, "features are 12 wide, the model expects 9"),
        (unimo_batch(["pair"]), {"images": False, "heads": ["words"]}, "has images, the model is text-only"),
        (
            dataclasses.replace(unimo_batch(["text"]), prefix_len=torch.tensor([6])),
            {},
            "prefix_len is negative or longer than its text",
        ),
        (
            dataclasses.replace(unimo_batch(["text"]), text_positions=torch.arange(12, 17)),
            {},
            "text_positions goes from 12 to 16, the model has rows 0 to 15",
        ),
        (
            dataclasses.replace(unimo_batch(["text"]), turn_ids=torch.arange(5)),
            {"turn_vocab_size": 4},
            "turn_ids goes from 0 to 4, the model has rows 0 to 3",
        ),
        (
            dataclasses.replace(unimo_batch(["caption"]), tag_positions=torch.tensor([-1, 3])),
            {},
            "tag_positions goes from -1 to 3",
        ),
    ],
)
def test_batches_that_do_not_fit(batch, config, message):
    with pytest.raises(VlscaleError, match=message) as caught:
        tiny_unimo(**config).encode(batch)
    assert "\n" not in str(caught.value)


def test_what_an_example_or_a_model_lacks_is_said():
    model = tiny_unimo()
    encoded = model.encode(unimo_batch(["pair", "text", "image"]))
    with pytest.raises(VlscaleError, match="1 of 3 examples have no image"):
        model.pool_image(encoded)
    with pytest.raises(VlscaleError, match="1 of 3 examples have no text"):
        model.pool_text(encoded)
    assert model.pool_image(encoded, torch.tensor([2])).shape == (1, TINY["hidden_size"])
    plain = tiny_unimo(heads=["words"])
    with pytest.raises(VlscaleError, match="no head 'features'"):
        plain.predict_features(encoded, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(VlscaleError, match="no head 'matching'"):
        plain.match_pooled(torch.zeros(1, 32), torch.zeros(1, 32))


def test_a_folder_keeps_the_model(tmp_path):
    model, batch = tiny_unimo().eval(), unimo_batch([*KINDS])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vlscale-unimo"
    again = UnimoForPretraining.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again.encode(batch).hidden, model.encode(batch).hidden)


def test_folders_of_the_other_model_are_refused(tmp_path):
    tiny_unimo().save_pretrained(tmp_path / "unimo")
    tiny_model().save_pretrained(tmp_path / "uniter")
    with pytest.raises(VlscaleError, match="model_type is 'vlscale-unimo', expected 'vlscale-uniter'"):
        UniterForPretraining.from_pretrained(tmp_path / "unimo")
    with pytest.raises(VlscaleError, match="model_type is 'vlscale-uniter', expected 'vlscale-unimo'"):
        UnimoForPretraining.from_pretrained(tmp_path / "uniter")
