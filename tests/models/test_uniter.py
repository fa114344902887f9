"""UNITER on packed batches: what an example may and may not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.models.batches import all_head_loss, random_batch, tiny_model
from tests.objectives.batches import take
from vlscale.errors import VlscaleError
from vlscale.models.uniter import UniterConfig, UniterForPretraining, box_vectors

TEXTS, REGIONS = [4, 7, 3, 5], [3, 1, 6, 2]


@pytest.fixture(scope="module", params=["post", "pre"])
def model(request):
    return tiny_model(norm=request.param).eval()


@pytest.fixture
def batch():
    return random_batch(TEXTS, REGIONS)


def test_joint_order_is_text_then_regions_of_each_example(model, batch):
    encoded = model.encode(batch, all_layers=True)
    text, regions = model.embed_text(batch).split(TEXTS), model.embed_regions(batch).split(REGIONS)
    joint = torch.cat([torch.cat(pair) for pair in zip(text, regions, strict=True)])
    assert_close(encoded.layers[0], joint)
    assert encoded.cu.tolist() == [0, 7, 15, 24, 31]
    assert torch.equal(encoded.text, encoded.hidden[encoded.text_index])
    assert torch.equal(encoded.regions, encoded.hidden[encoded.region_index])
    assert sorted([*encoded.text_index.tolist(), *encoded.region_index.tolist()]) == list(range(batch.tokens))
    assert len(encoded.layers) == model.config.num_hidden_layers + 1


@torch.no_grad()
@pytest.mark.parametrize("backend", ["padded", "packed"])
def test_an_example_does_not_depend_on_its_neighbours(backend, batch):
    model = tiny_model(attention_backend=backend).eval()
    encoded = model.encode(batch)
    changed = replace(batch, input_ids=batch.input_ids.clone(), features=batch.features.clone())
    changed.input_ids[4:11] = 9
    changed.features[3:4] += 5.0
    assert_close(model.encode(changed).hidden[:7], encoded.hidden[:7], rtol=0, atol=1e-6)
    assert_close(model.encode(changed).hidden[15:], encoded.hidden[15:], rtol=0, atol=1e-6)
    assert (model.encode(changed).hidden[7:15] - encoded.hidden[7:15]).abs().min() > 0
    alone = model.encode(take(batch, [2]))
    assert_close(alone.hidden, encoded.hidden[15:24], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_order_of_examples_does_not_matter(model, batch):
    order = [2, 0, 3, 1]
    pieces = model.encode(batch).hidden.split([t + r for t, r in zip(TEXTS, REGIONS, strict=True)])
    permuted = model.encode(take(batch, order))
    assert_close(permuted.hidden, torch.cat([pieces[i] for i in order]), rtol=1e-5, atol=1e-6)
    assert_close(model.itm_logits(permuted), model.itm_logits(model.encode(batch))[order], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_regions_are_a_set(model, batch):
    order = torch.cat([torch.tensor([2, 0, 1]), torch.arange(3, 12)])
    shuffled = replace(
        batch, features=batch.features[order], boxes=batch.boxes[order], region_mask=batch.region_mask[order]
    )
    before, after = model.encode(batch), model.encode(shuffled)
    assert_close(after.regions, before.regions[order], rtol=1e-5, atol=1e-6)
    assert_close(after.text, before.text, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_words_have_an_order(model, batch):
    reversed_ids = batch.input_ids.clone()
    reversed_ids[:4] = reversed_ids[:4].flip(0)
    changed = model.encode(replace(batch, input_ids=reversed_ids)).text[:4]
    assert (changed.flip(0) - model.encode(batch).text[:4]).abs().max() > 1e-3


@pytest.mark.parametrize(("texts", "regions"), [([3, 5], [0, 0]), ([0, 0], [4, 2]), ([3, 0, 2], [0, 4, 1])])
def test_a_modality_may_be_absent(texts, regions):
    model, batch = tiny_model().eval(), random_batch(texts, regions)
    encoded = model.encode(batch)
    assert encoded.hidden.shape == (sum(texts) + sum(regions), 32)
    assert encoded.hidden.isfinite().all()
    assert model.itm_logits(encoded).shape == (len(texts), 2)
    for i in range(len(texts)):
        alone = model.encode(take(batch, [i])).hidden
        assert_close(alone, encoded.hidden[encoded.cu[i] : encoded.cu[i + 1]], rtol=1e-5, atol=1e-6)
    encoded.hidden.sum().backward()


def test_box_vector():
    found = box_vectors(torch.tensor([[0.1, 0.2, 0.5, 0.9]]))
    assert_close(found, torch.tensor([[0.1, 0.2, 0.5, 0.9, 0.4, 0.7, 0.28]]))


@torch.no_grad()
def test_a_masked_region_reads_the_learned_vector(model, batch):
    base = model.embed_regions(replace(batch, region_mask=None))
    masked = model.embed_regions(batch)
    changed = (masked - base).abs().amax(1) > 0
    assert torch.equal(changed, batch.region_mask)
    shown = replace(
        batch,
        region_mask=None,
        features=batch.features + batch.region_mask[:, None] * model.image_embedder.mask_embedding,
    )
    assert_close(model.embed_regions(shown), masked)


@torch.no_grad()
def test_type_vectors_come_from_one_table(model, batch):
    given = replace(batch, text_types=torch.zeros_like(batch.input_ids), region_types=torch.ones(12, dtype=torch.int64))
    assert torch.equal(model.encode(given).hidden, model.encode(batch).hidden)
    swapped = replace(given, region_types=torch.zeros(12, dtype=torch.int64))
    assert (model.encode(swapped).hidden - model.encode(batch).hidden).abs().max() > 1e-3


@torch.no_grad()
def test_segments_of_a_text_have_their_own_type_vectors(batch):
    model = tiny_model(type_vocab_size=4).eval()
    types = torch.arange(batch.input_ids.numel()) % 2 * 3
    found = model.embed_text(replace(batch, text_types=types))
    owner = batch.text_owner()
    positions = torch.arange(len(owner)) - batch.cu_text.long()[owner]
    words = model.text_embedder
    expected = (
        words.word.weight[batch.input_ids] + words.position.weight[positions] + model.type_embedding.weight[types]
    )
    assert_close(found, words.norm(expected))
    with pytest.raises(VlscaleError, match=r"segments of type 4, the model has 4 types; set model\.config"):
        model.encode(replace(batch, text_types=types + 1))


def test_heads_have_the_documented_shapes_and_take_no_positions(model, batch):
    encoded = model.encode(batch)
    for count in (0, 2):
        positions = torch.arange(count)
        assert model.mlm_logits(encoded, positions).shape == (count, 50)
        assert model.predict_features(encoded, positions).shape == (count, 12)
        assert model.classify_regions(encoded, positions).shape == (count, 7)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = model.mlm_logits(encoded, nothing).sum() + model.predict_features(encoded, nothing).sum()
    gradients = torch.autograd.grad(loss, list(model.word_head.parameters()) + list(model.feature_head.parameters()))
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_positions_index_the_packed_order(model, batch):
    encoded = model.encode(batch)
    assert_close(model.mlm_logits(encoded, torch.tensor([5])), model.word_head(encoded.text[5:6]))
    assert_close(model.classify_regions(encoded, torch.tensor([7])), model.region_classifier(encoded.regions[7:8]))


def test_tied_weights_stand_once_and_learn_from_both_uses(model, batch):
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len(model.state_dict())
    storages = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert len(set(storages)) == len(storages)
    logits = model.word_head(torch.randn(2, 32))
    (gradient,) = torch.autograd.grad(logits.sum(), model.text_embedder.word.weight)
    assert gradient.abs().sum() > 0
    features = model.feature_head(torch.randn(2, 32))
    (gradient,) = torch.autograd.grad(features.sum(), model.image_embedder.projection.weight)
    assert gradient.abs().sum() > 0
    owned = {id(parameter) for parameter in model.parameters()}
    for module, parameter in model.external_parameters():
        assert id(parameter) in owned
        assert id(parameter) not in {id(own) for own in module.parameters()}


def test_every_parameter_gets_a_gradient(model, batch):
    model.zero_grad()
    all_head_loss(model, batch).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    model.zero_grad()


@pytest.mark.parametrize("policy", ["full", "every 1", "every 2", "every 9"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_changes_no_gradient(policy, dropout, batch):
    model = tiny_model(hidden_dropout=dropout, attention_dropout=dropout).train()

    def gradients(chosen: str):
        model.set_activation_checkpointing(chosen)
        model.zero_grad()
        torch.manual_seed(3)
        loss = all_head_loss(model, batch)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    for plain, recomputed in zip(gradients("none"), gradients(policy), strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_recomputes_the_layers_it_says(batch):
    model, calls = tiny_model().train(), [0, 0, 0]

    def count(index: int):
        def hook(*_):
            calls[index] += 1

        return hook

    for index, layer in enumerate(model.encoder.layers):
        layer.ffn.register_forward_hook(count(index))
    for policy, expected in {"none": [1, 1, 1], "full": [2, 2, 2], "every 2": [2, 1, 2]}.items():
        calls[:] = [0, 0, 0]
        model.set_activation_checkpointing(policy)
        all_head_loss(model, batch).backward()
        assert calls == expected, policy
    with pytest.raises(VlscaleError, match="every N"):
        model.set_activation_checkpointing("every 0")


def test_dropout_is_on_in_training_only(batch):
    model = tiny_model(hidden_dropout=0.1, attention_dropout=0.0)
    assert not torch.equal(model.train().encode(batch).hidden, model.encode(batch).hidden)
    assert torch.equal(model.eval().encode(batch).hidden, model.encode(batch).hidden)
    only_attention = tiny_model(hidden_dropout=0.0, attention_dropout=0.3).train()
    assert not torch.equal(only_attention.encode(batch).hidden, only_attention.encode(batch).hidden)


def test_construction_is_deterministic_and_follows_the_initializer():
    first, again, other = tiny_model(1), tiny_model(1), tiny_model(2)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.pooler.dense.weight, other.pooler.dense.weight)
    wide = {"hidden_size": 256, "num_attention_heads": 4, "vocab_size": 500}
    normal = tiny_model(initializer="normal", initializer_range=0.05, **wide)
    fan_in = tiny_model(initializer="fan_in", **wide)
    for layer in ("encoder.layers.0.ffn.up", "text_embedder.word"):
        assert normal.get_submodule(layer).weight.std().item() == pytest.approx(0.05, rel=0.05)
        assert fan_in.get_submodule(layer).weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert fan_in.encoder.layers[0].ffn.down.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    for name, parameter in normal.named_parameters():
        if name.endswith("bias"):
            assert parameter.eq(0).all(), name


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_bfloat16_stays_near_float32(norm, batch):
    model = tiny_model(norm=norm).eval()
    exact = model.encode(batch).hidden
    half = model.bfloat16().encode(batch).hidden
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.15


def test_the_longest_example_is_noted_before_a_batch_leaves_the_cpu(batch):
    """Afterwards, reading it from the lengths would make the host wait for the device."""
    moved = batch.to("meta")
    assert moved.cu_text.is_meta
    assert moved.longest == batch.longest == 9
    model = tiny_model().to("meta")
    assert model.encode(moved).hidden.shape == (31, 32)


def test_wrong_widths_and_lengths_are_named(batch):
    model = tiny_model()
    with pytest.raises(VlscaleError, match="features are 5 wide, the model expects 12"):
        model.encode(replace(batch, features=batch.features[:, :5]))
    with pytest.raises(VlscaleError, match=r"17 tokens .* 16 positions"):
        model.encode(random_batch([17], [2]))
    with pytest.raises(VlscaleError, match="unknown key 'hiden_size'; did you mean 'hidden_size'"):
        UniterForPretraining({"hiden_size": 3})
    with pytest.raises(VlscaleError, match="not a multiple of num_attention_heads"):
        UniterForPretraining({"hidden_size": 30, "num_attention_heads": 4})
    assert UniterConfig().hidden_size == 768
