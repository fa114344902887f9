"""From the recipe's model section to a model."""

from __future__ import annotations

import pytest
import torch

from vlscale.config import MODEL_TASKS, ModelSection
from vlscale.errors import VlscaleError
from vlscale.models.registry import MODELS, build_model, expected_shapes, model_of, preset_names, resolve_config

# Published totals (tied weights counted once). The published mask table has a second row, of feature width, that is
# always zero and is not kept here.
PUBLISHED = {"uniter-base": 112_938_887, "uniter-large": 340_524_935}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_size(preset):
    with torch.device("meta"):
        model = build_model(ModelSection(preset=preset))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PUBLISHED[preset] - model.config.feature_dim
    backbone = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith(("type_embedding", "text_embedder", "image_embedder", "encoder", "pooler"))
    )
    published = {"uniter-base": 109_898_752, "uniter-large": 335_695_872}[preset]
    assert backbone == published - model.config.feature_dim
    layers = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert layers == {"uniter-base": 85_054_464, "uniter-large": 302_309_376}[preset]


def test_every_preset_resolves():
    assert preset_names() == ["unimo-base", "unimo-large", "uniter-base", "uniter-large"]
    for name in preset_names():
        model = name.partition("-")[0]
        config = resolve_config(ModelSection(name=model, preset=name))
        assert config.norm == "post"
        assert type(config) is MODELS[model].config_type


def test_models_are_those_of_recipes_and_a_configuration_makes_its_own():
    assert [*MODELS] == [*MODEL_TASKS]
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    facts = {"vocab_size": 20, "feature_dim": 8, "num_classes": 3, "max_text_tokens": 30}
    for name, kind in MODELS.items():
        section = ModelSection(name=name, config=shape)
        assert type(build_model(section, **facts)) is kind
        assert type(model_of(resolve_config(section, **facts))) is kind
        assert (
            expected_shapes(resolve_config(section, **facts)).keys()
            == build_model(section, **facts).state_dict().keys()
        )
        with pytest.raises(VlscaleError, match="vocab_size is 9, but the texts' vocabulary has 20"):
            resolve_config(ModelSection(name=name, config={**shape, "vocab_size": 9}), **facts)
        with pytest.raises(VlscaleError, match=r"max_position_embeddings"):
            resolve_config(section, **(facts | {"max_text_tokens": 600}))


def test_overrides_lie_over_the_preset_and_data_fill_the_rest():
    config = resolve_config(ModelSection(preset="uniter-large", config={"num_hidden_layers": 3}))
    assert (config.num_hidden_layers, config.hidden_size) == (3, 1024)
    config = resolve_config(ModelSection(), vocab_size=50, feature_dim=1280, num_classes=1000)
    assert (config.vocab_size, config.feature_dim, config.num_classes) == (50, 1280, 1000)
    assert resolve_config(ModelSection(config={"num_classes": 9}), num_classes=None).num_classes == 9
    assert [resolve_config(ModelSection(), num_types=types).type_vocab_size for types in (None, 1, 2, 4)] == [
        2,
        2,
        2,
        4,
    ]
    assert resolve_config(ModelSection(config={"type_vocab_size": 9}), num_types=4).type_vocab_size == 9


@pytest.mark.parametrize(
    ("section", "facts", "message"),
    [
        ({"preset": "uniter-bse"}, {}, "did you mean 'uniter-base'"),
        ({"preset": "unimo-base"}, {}, "model.preset 'unimo-base' is of 'unimo', model.name is 'uniter'"),
        ({"name": "unitr"}, {}, "did you mean 'uniter'"),
        ({"config": {"hiden_size": 8}}, {}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"config": {"hidden_dropout": 1.5}}, {}, "hidden_dropout: .* found 1.5"),
        ({"config": {"attention_backend": "paded"}}, {}, "attention_backend: .* found 'paded'"),
        (
            {"config": {"feature_dim": 2048}},
            {"feature_dim": 1280},
            "feature_dim is 2048, but .* 1280; set model.config",
        ),
        ({"preset": "uniter-base"}, {"feature_dim": 1280}, "preset uniter-base: feature_dim is 2048"),
        ({"preset": "uniter-base"}, {"vocab_size": 30522}, "vocab_size is 28996, but the texts' vocabulary has 30522"),
        ({"preset": "uniter-base"}, {"num_classes": 1000}, "num_classes is 1601"),
        (
            {"config": {"vocab_fingerprint": "a" * 64}},
            {"vocab_fingerprint": "b" * 64},
            "vocab_fingerprint is aaaa.*, but the texts' vocabulary has bbbb",
        ),
        ({"config": {"vocab_fingerprint": "x"}}, {}, "vocab_fingerprint: .* found 'x'"),
        ({"config": {"max_position_embeddings": 64}}, {"max_text_tokens": 63}, "needs 65"),
        (
            {"preset": "uniter-base"},
            {"num_types": 4},
            "segments of the types 0 to 3; set model.config.type_vocab_size=4",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(section, facts, message):
    with pytest.raises(VlscaleError, match=message) as caught:
        resolve_config(ModelSection(**section), **facts)
    assert "\n" not in str(caught.value)


def test_the_models_folder_keeps_the_vocabularys_fingerprint(tmp_path):
    section = ModelSection(config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1})
    model = build_model(section, vocab_size=20, vocab_fingerprint="c" * 64)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.vocab_fingerprint == "c" * 64


def test_build_model_draws_from_torch():
    section = ModelSection(config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1})
    facts = {"vocab_size": 20, "feature_dim": 8, "num_classes": 3}
    torch.manual_seed(0)
    first = build_model(section, **facts)
    torch.manual_seed(0)
    again = build_model(section, **facts)
    assert torch.equal(first.itm_head.weight, again.itm_head.weight)
    assert first.config.vocab_size == 20
