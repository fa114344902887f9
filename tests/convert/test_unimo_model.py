"""UNIMO's key maps: both published layouts to ours and back, read from real files, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.golden_batches import golden_folder
from tests.models.unimo_batches import tiny_unimo
from tests.unimo_goldens import load, official_model, paddlenlp_model, read
from vlscale.convert import fluid, paddle_params
from vlscale.convert.mapped import Mapped
from vlscale.convert.text_encoders import MODELS
from vlscale.convert.unimo_model import (
    config_from_official,
    config_from_paddlenlp,
    export_plans,
    from_official,
    import_plans,
    to_official,
)
from vlscale.errors import VlscaleError

WITH_TABLES = {"role_vocab_size": 3, "turn_vocab_size": 4}
PUBLISHED_HEADS = ["words", "matching", "text_pooler", "image_pooler"]


@pytest.mark.golden
@pytest.mark.parametrize(("layout", "file"), [("unimo", "official/params"), ("unimo-text", "paddlenlp/expected_state")])
def test_there_and_back_is_exact(layout, file):
    folder, name = file.split("/")
    published = {key: t for key, t in load(name, folder).items() if not key.startswith("cls_out_")}
    again = to_official(from_official(published, layout), layout)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[key], published[key]) for key in published)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("layout", "open_source", "file"),
    [
        ("unimo", fluid.open_source, "official/unimo_tiny_en.tar.gz"),
        ("unimo", fluid.open_source, "official/fluid_ckpt"),
        ("unimo-text", paddle_params.open_source, "paddlenlp/model_state.pdparams"),
        ("unimo-text", paddle_params.open_source, "paddlenlp/model_state_protocol2.pdparams"),
        ("unimo-text", paddle_params.open_source, "paddlenlp/base_only.pdparams"),
    ],
)
def test_files_are_read_tensor_by_tensor(layout, open_source, file):
    model = official_model(roles=True) if layout == "unimo" else paddlenlp_model()
    with open_source(golden_folder("unimo") / file) as source:
        first, second = import_plans(source.tensors, layout)
        assert not first.unexpected
        assert not first.missing
        mapped = Mapped(Mapped(source, first), second)
        read_state = {name: mapped.read(name) for name in mapped.tensors}
    expected = model.state_dict()
    if file.endswith("base_only.pdparams"):
        expected = {name: t for name, t in expected.items() if not name.startswith("word_head.")}
    assert read_state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(read_state[name], tensor, rtol=0, atol=0)


def test_a_model_of_ours_goes_out_and_comes_back():
    model = tiny_unimo(heads=PUBLISHED_HEADS, **WITH_TABLES)
    published = to_official(model.state_dict())
    assert published["encoder_layer_0_ffn_fc_0.w_0"].shape == (32, 64)  # [in, out]
    back = from_official(published)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_region_heads_have_no_published_names():
    first, _ = export_plans(tiny_unimo().state_dict())
    heads = ("feature_head", "region_classifier")
    assert {*first.unexpected} == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}


def test_text_encoders_begin_a_unimo_under_names_that_the_map_knows():
    targets = {rule.target for rule in MODELS["unimo"].rules}
    names = {name.format(i=0, part=part) for name in targets for part in ("query", "key", "value")}
    first, _ = import_plans(names)
    assert not first.unexpected
    assert not first.missing  # images and poolers are absent as a whole


def _published() -> dict[str, torch.Tensor]:
    return to_official(tiny_unimo(heads=PUBLISHED_HEADS).state_dict())


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("pos_embedding", "1 missing: pos_embedding"),
        ("image_loc.w_0", "1 missing: image_loc.w_0"),
        ("match_fc.b_0", "1 missing: match_fc.b_0"),
        ("encoder_layer_1_ffn_fc_0.w_0", "1 missing: encoder_layer_1_ffn_fc_0.w_0"),
        ("encoder_layer_1_multi_head_att_key_fc.w_0", "attention.qkv.weight needs .*attention.key.weight too"),
    ],
)
def test_what_is_missing_is_named(dropped, message):
    state = _published()
    del state[dropped]
    with pytest.raises(VlscaleError, match=message):
        from_official(state)


def test_what_is_unknown_is_named_and_task_heads_are_not():
    state = _published()
    first, _ = import_plans([*state, "cls_out_3_w", "mystery_fc.w_0"])
    assert first.unexpected == ("mystery_fc.w_0",)
    assert first.ignored == {"cls_out_3_w": "a task's head"}
    with pytest.raises(VlscaleError, match="1 unexpected: mystery_fc"):
        from_official(state | {"mystery_fc.w_0": torch.zeros(1)})


@pytest.mark.golden
def test_tied_tables_must_be_equal():
    state = load("expected_state", "paddlenlp")
    state["lm_head.decoder_weight"] = state["lm_head.decoder_weight"] + 1
    with pytest.raises(VlscaleError, match=r"lm_head\.decoder_weight differs .* tied"):
        from_official(state, "unimo-text")


@pytest.mark.golden
def test_configurations_are_read():
    raw, names = read("config.json"), [*load("params")]
    config = config_from_official(raw, names)
    assert config.heads == ("words", "matching", "text_pooler", "image_pooler")
    assert (config.role_vocab_size, config.turn_vocab_size) == (raw["role_type_size"], raw["turn_type_size"])
    assert config.intermediate_size == 4 * raw["hidden_size"]
    assert not config_from_official(
        raw, [n for n in names if not n.startswith(("image_", "v_pre", "match", "pooled"))]
    ).images
    with pytest.raises(VlscaleError, match="hidden_size missing"):
        config_from_official({k: v for k, v in raw.items() if k != "hidden_size"}, names)
    text, state = read("config.json", "paddlenlp"), load("expected_state", "paddlenlp")
    assert config_from_paddlenlp(text, state).activation == "relu"
    with pytest.raises(VlscaleError, match="normalize_before"):
        config_from_paddlenlp(text | {"normalize_before": True}, state)


def test_a_parameter_under_two_names_is_refused():
    """PaddleNLP's bare models have no prefix, others do; which tensor wins must not depend on the file's order."""
    for names in (("", "unimo."), ("unimo.", "")):
        given = [f"{prefix}embeddings.word_embeddings.weight" for prefix in names]
        with pytest.raises(VlscaleError, match=r"^unimo-text checkpoint: .* are one parameter under two names"):
            import_plans(given, "unimo-text", partial=True)
