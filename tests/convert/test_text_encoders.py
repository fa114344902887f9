"""Key maps for BERT and RoBERTa: what comes out computes what ``transformers`` computes, under the published names."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import BertForSequenceClassification, BertModel, RobertaForQuestionAnswering, RobertaModel

from tests.convert.bert_folders import SIZES, bert, bert_of, hidden, roberta, saved, texts
from tests.golden_batches import golden_folder
from tests.models.batches import TINY, random_batch, tiny_model
from vlscale.convert.fluid import open_source as open_fluid
from vlscale.convert.huggingface import open_source
from vlscale.convert.initial import load_initial_weights
from vlscale.convert.text_encoders import MODELS, TextWeights, text_weights
from vlscale.convert.torch_files import open_source as open_torch
from vlscale.errors import VlscaleError

SMALL = {"max_examples": 12, "deadline": None, "suppress_health_check": list(HealthCheck)}
BERT_NAMED = {"uniter": "uniter.", "vilbert": "bert.", "unit": "bert_model.module."}
shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(8, 40),
        "num_hidden_layers": st.integers(1, 3),
        "num_attention_heads": st.sampled_from([1, 2, 4]),
        "hidden_size": st.sampled_from([8, 16, 24]),
        "intermediate_size": st.integers(1, 40),
        "max_position_embeddings": st.integers(12, 20),
    }
)


def everything(weights: TextWeights) -> dict[str, Tensor]:
    """All tensors, checked against what was told of them."""
    state = {name: weights.read(name) for name in weights.entries}
    for name, info in weights.tensors.items():
        assert (state[name].dtype, tuple(state[name].shape)) == (info.dtype, info.shape), name
    return state


def imported(folder, model: str) -> dict[str, Tensor]:
    with open_source(folder) as source:
        weights = text_weights(source, model)
        assert not weights.missing
        assert not weights.unexpected
        taken = {stored for entry in weights.entries.values() for stored in entry.sources}
        assert taken | set(weights.ignored) | set(weights.tied) == set(source.tensors)
        return everything(weights)


def unimo(state: dict[str, Tensor], input_ids: Tensor, layers: int, heads: int, eps: float) -> Tensor:
    """UNIMO's text side as it was published: no token types, positions from row 2, matrices [in, out]; [B, L, H]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}_scale"], state[f"{name}_bias"], eps)

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.w_0"] + state[f"{name}.b_0"]

    length = input_ids.shape[1]
    embedded = state["word_embedding"][input_ids] + state["pos_embedding"][2 : 2 + length]
    x = norm(embedded, "pre_encoder_layer_norm")
    for i in range(layers):
        name = f"encoder_layer_{i}"
        query, key, value = (
            dense(x, f"{name}_multi_head_att_{part}_fc").unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = (query / math.sqrt(query.shape[-1]) @ key.transpose(-1, -2)).softmax(-1)
        attended = dense((scores @ value).transpose(1, 2).flatten(2), f"{name}_multi_head_att_output_fc")
        x = norm(x + attended, f"{name}_post_att_layer_norm")
        x = norm(x + dense(F.gelu(dense(x, f"{name}_ffn_fc_0")), f"{name}_ffn_fc_1"), f"{name}_post_ffn_layer_norm")
    return x


def unimo_words(state: dict[str, Tensor], hidden_BLH: Tensor, eps: float) -> Tensor:
    """Log-probabilities of words, [B, L, V]."""
    x = F.gelu(hidden_BLH @ state["mask_lm_trans_fc.w_0"] + state["mask_lm_trans_fc.b_0"])
    scale, bias = state["mask_lm_trans_layer_norm_scale"], state["mask_lm_trans_layer_norm_bias"]
    x = F.layer_norm(x, x.shape[-1:], scale, bias, eps)
    return (x @ state["word_embedding"].t() + state["mask_lm_out_fc.b_0"]).log_softmax(-1)


@settings(**SMALL)
@given(sizes=shapes, seed=st.integers(0, 99))
def test_folded_types_leave_roberta_as_it_was(tmp_path_factory, sizes, seed):
    """In double precision, where rounding hides nothing."""
    model = roberta(seed, **sizes).double()
    config = model.config
    state = imported(saved(model, tmp_path_factory.mktemp("roberta")), "unimo")
    assert state["word_embedding"].dtype is torch.float64
    input_ids = texts(config, 10, seed)
    found = unimo(state, input_ids, config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps)
    assert_close(found, hidden(model, input_ids), rtol=0, atol=1e-10)
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits.log_softmax(-1)
    assert_close(unimo_words(state, found, config.layer_norm_eps), expected, rtol=0, atol=1e-10)


def test_without_the_fold_it_is_another_model(tmp_path):
    model = roberta(3)
    folder = saved(model, tmp_path / "roberta")
    state, input_ids = imported(folder, "unimo"), texts(model.config, 12)
    assert_close(unimo(state, input_ids, 2, 4, 1e-5), hidden(model, input_ids), rtol=0, atol=5e-6)
    types = load_file(folder / "model.safetensors")["roberta.embeddings.token_type_embeddings.weight"]
    without = {**state, "word_embedding": state["word_embedding"] - types[0]}
    assert (unimo(without, input_ids, 2, 4, 1e-5) - hidden(model, input_ids)).abs().max() > 0.1


def test_unimo_also_begins_as_bert(tmp_path):
    model = bert(4)
    state, input_ids = imported(saved(model, tmp_path / "bert"), "unimo"), texts(model.config, 20)
    assert len(state["pos_embedding"]) == 22
    assert state["pos_embedding"][:2].eq(0).all()
    assert_close(unimo(state, input_ids, 2, 4, 1e-12), hidden(model, input_ids), rtol=0, atol=1e-5)


@settings(**SMALL)
@given(sizes=shapes, seed=st.integers(0, 99), name=st.sampled_from(sorted(BERT_NAMED)))
def test_models_with_berts_names_compute_what_bert_does(tmp_path_factory, sizes, seed, name):
    model = bert(seed, **sizes)
    state = imported(saved(model, tmp_path_factory.mktemp("bert")), name)
    prefix = BERT_NAMED[name]
    inner = {key.removeprefix(prefix): each for key, each in state.items() if key.startswith(prefix)}
    encoder = {key: each for key, each in inner.items() if not key.startswith("pooler.")}
    input_ids = texts(model.config, 12, seed)
    assert torch.equal(hidden(bert_of(encoder, model.config), input_ids), hidden(model, input_ids))
    if name != "vilbert":
        assert torch.equal(inner["pooler.dense.weight"], model.bert.pooler.dense.weight)
    if name != "unit":
        head = model.cls.predictions
        assert torch.equal(state["cls.predictions.transform.LayerNorm.bias"], head.transform.LayerNorm.bias)
        assert torch.equal(state["cls.predictions.transform.dense.weight"], head.transform.dense.weight)
        assert torch.equal(state["cls.predictions.bias"], head.bias)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("name", sorted(BERT_NAMED))
def test_roberta_in_berts_layout(tmp_path, name, padding):
    """Positions lose their offset, the one token type serves both segments."""
    model = roberta(5, pad_token_id=padding).double()
    state = imported(saved(model, tmp_path / "roberta"), name)
    prefix = BERT_NAMED[name]
    inner = {key.removeprefix(prefix): each for key, each in state.items() if key.startswith(prefix)}
    assert inner["embeddings.token_type_embeddings.weight"].shape == (2, 32)
    copy = bert_of(inner, model.config)
    input_ids = texts(model.config, 20 - padding - 1)
    input_ids[input_ids == padding] = 7  # RoBERTa counts no padding
    assert_close(hidden(copy, input_ids), hidden(model, input_ids), rtol=0, atol=1e-12)
    second = copy(input_ids=input_ids, token_type_ids=torch.ones_like(input_ids)).last_hidden_state
    assert_close(second.detach(), hidden(model, input_ids), rtol=0, atol=1e-12)


@settings(**SMALL)
@given(seed=st.integers(0, 99), heads=st.sampled_from([1, 2, 8]), layers=st.integers(1, 4))
def test_uniter_computes_what_bert_does(tmp_path_factory, seed, heads, layers):
    same = {"num_attention_heads": heads, "num_hidden_layers": layers}
    ours = tiny_model(**same).eval()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    model = bert(seed, **{key: TINY[key] for key in keys}, **same)
    report = load_initial_weights(ours, saved(model, tmp_path_factory.mktemp("bert")))
    assert {name.split(".")[0] for name in report.fresh} == {
        *("image_embedder", "feature_head", "region_classifier", "itm_head")
    }
    batch = random_batch([5, 16, 1], [0, 0, 0], seed)
    with torch.no_grad():
        found = ours.encode(batch)
        words = ours.mlm_logits(found, torch.arange(batch.input_ids.numel()))
        expected = [
            model(input_ids=each[None], output_hidden_states=True) for each in batch.input_ids.split([5, 16, 1])
        ]
    assert_close(found.hidden, torch.cat([each.hidden_states[-1][0] for each in expected]), rtol=0, atol=1e-5)
    assert_close(words, torch.cat([each.prediction_logits[0] for each in expected]), rtol=0, atol=2e-5)


def test_half_precision_is_summed_in_single(tmp_path):
    model = roberta(6).half()
    state = imported(saved(model, tmp_path / "roberta"), "unimo")
    embeddings = model.roberta.embeddings
    expected = embeddings.word_embeddings.weight.float() + embeddings.token_type_embeddings.weight[0].float()
    assert state["word_embedding"].dtype is torch.float32
    assert torch.equal(state["word_embedding"], expected)
    assert state["pos_embedding"].dtype is torch.float16


def golden(model: str) -> tuple[dict, set[str]]:
    """name -> (dtype, shape) of a published state dict, and which of them are a text encoder's."""
    if model == "unimo":
        with open_fluid(golden_folder("unimo") / "official/fluid_ckpt") as source:
            others = ("image_", "v_pre", "pooled_", "match_", "cls_out", "role_", "turn_")
            return dict(source.tensors), {name for name in source.tensors if not name.startswith(others)}
    file, start = {
        "vilbert": ("pretrain.pt", ("bert.embeddings.", "bert.encoder.layer.", "cls.predictions.")),
        "unit": ("shared_dec/model.pt", ("bert_model.module.",)),
        "uniter": ("pretrain.pt", ("uniter.embeddings.", "uniter.encoder.", "uniter.pooler.", "cls.")),
    }[model]
    with open_torch(golden_folder(model) / file) as source:
        return dict(source.tensors), {name for name in source.tensors if name.startswith(start)}


@pytest.mark.golden
@pytest.mark.parametrize("model", sorted(MODELS))
def test_names_and_shapes_are_the_published_ones(tmp_path, model):
    """A BERT of the golden model's sizes fills exactly the text encoder of the authors' own state dict."""
    known, text = golden(model)
    inside = {"unit": "shared_dec", "unimo": "official"}.get(model, ".")
    config = json.loads((golden_folder(model) / inside / "config.json").read_text())
    config = config.get("bert", config)
    sizes = {"intermediate_size": 4 * config["hidden_size"], **{key: config[key] for key in SIZES if key in config}}
    folder = saved((roberta if model == "unimo" else bert)(**sizes), tmp_path / "hf")
    with open_source(folder) as source:
        weights = text_weights(source, model)
        for name, info in weights.tensors.items():
            assert known[name].shape == info.shape, name
    assert text - set(weights.tensors) <= {"cls.predictions.decoder.weight"}  # tied


def test_heads_of_other_tasks_are_told(tmp_path):
    for model, heads in (
        (bert(kind=BertForSequenceClassification), {"classifier.weight", "classifier.bias"}),
        (roberta(kind=RobertaForQuestionAnswering), {"qa_outputs.weight", "qa_outputs.bias"}),
    ):
        with open_source(saved(model, tmp_path / model.config.model_type)) as source:
            weights = text_weights(source, "uniter")
        assert set(weights.ignored) == heads
        assert set(weights.ignored.values()) == {"the head of another task"}
        assert "head.bias" in weights.absent
        assert not weights.missing


def test_what_a_model_has_no_place_for_is_told(tmp_path):
    with open_source(saved(bert(), tmp_path / "bert")) as source:
        for model, names in (
            ("vilbert", {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
            ("unimo", {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
            ("unit", {name for name in source.tensors if name.startswith("cls.predictions.")}),
        ):
            weights = text_weights(source, model)
            names = names | {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
            assert {*weights.ignored, *weights.tied} - {"bert.embeddings.token_type_embeddings.weight"} == names
            assert not weights.missing


@pytest.fixture
def folder(tmp_path):
    """A BERT without heads whose tensors tests change."""
    return saved(bert(kind=BertModel), tmp_path / "bert")


def changed(folder, change) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)


def test_old_and_new_names_are_one(folder):
    expected = imported(folder, "vilbert")

    def rename(state):
        for name in list(state):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            state["bert." + old] = state.pop(name)
        state["bert.embeddings.position_ids"] = torch.arange(20)[None]

    changed(folder, rename)
    with open_source(folder) as source:
        weights = text_weights(source, "vilbert")
        assert weights.ignored["bert.embeddings.position_ids"] == "an index table, not a weight"
        state = everything(weights)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_missing_and_unknown_names_are_told(folder):
    def change(state):
        del state["encoder.layer.1.output.dense.weight"]
        del state["embeddings.token_type_embeddings.weight"]
        for name in ("encoder.layer.2.output.dense.bias", "head.bias", "roberta.pooler.dense.bias", "adapter"):
            state[name] = torch.zeros(32)

    changed(folder, change)
    with open_source(folder) as source:
        weights = text_weights(source, "unimo")
    assert set(weights.missing) == {
        "encoder.layer.1.output.dense.weight",
        "embeddings.token_type_embeddings.weight",
    }
    assert "word_embedding" not in weights.entries
    assert set(weights.unexpected) == {
        *("encoder.layer.2.output.dense.bias", "head.bias", "roberta.pooler.dense.bias", "adapter"),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"bert.pooler.dense.bias": torch.zeros(32)}), "pooler.dense.bias' stands twice"),
        (lambda s: s.update({"embeddings.LayerNorm.gamma": torch.zeros(32)}), "stands twice"),
        (lambda s: s.update({"pooler.dense.bias": torch.zeros(33)}), r"pooler\.dense\.bias is \[33\], expected \[32\]"),
        (lambda s: s.update({"pooler.dense.bias": torch.zeros(32).int()}), "int32, expected floating point"),
        (lambda s: s.update({"cls.predictions.decoder.weight": torch.zeros(60, 32)}), "differs from"),
        (
            lambda s: s.update(
                {"cls.predictions.bias": torch.zeros(60), "cls.predictions.decoder.bias": torch.ones(60)}
            ),
            "differs from 'cls.predictions.bias'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folder, change, message):
    changed(folder, change)
    with open_source(folder) as source, pytest.raises(VlscaleError, match=message) as error:
        text_weights(source, "uniter")
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_second_name_of_a_tied_tensor_serves_alone(folder):
    def change(state):
        state["cls.predictions.decoder.weight"] = state.pop("embeddings.word_embeddings.weight")
        state["cls.predictions.decoder.bias"] = torch.arange(60.0)

    words = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    changed(folder, change)
    with open_source(folder) as source:
        weights = text_weights(source, "vilbert")
        assert torch.equal(weights.read("bert.embeddings.word_embeddings.weight"), words)
        assert torch.equal(weights.read("cls.predictions.bias"), torch.arange(60.0))
        with pytest.raises(VlscaleError, match="no text encoder 'lxmert'; known: uniter, vilbert, unit, unimo"):
            text_weights(source, "lxmert")


def test_opening_reads_no_tensor_and_reading_only_one(folder, monkeypatch):
    with open_source(folder) as source:
        asked = []
        read = source.read
        monkeypatch.setattr(source, "read", lambda name: asked.append(name) or read(name))
        weights = text_weights(source, "unimo")
        assert asked == []
        weights.read("encoder_layer_1_ffn_fc_0.w_0")
        weights.read("word_embedding")
    assert asked == [
        *("encoder.layer.1.intermediate.dense.weight", "embeddings.word_embeddings.weight"),
        "embeddings.token_type_embeddings.weight",
    ]


def test_roberta_without_heads(tmp_path):
    state = imported(saved(roberta(kind=RobertaModel), tmp_path / "roberta"), "unimo")
    assert "mask_lm_out_fc.b_0" not in state
    assert len(state["pos_embedding"]) == 20
