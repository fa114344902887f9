"""What a UNIMO starts from: a RoBERTa, the authors' variables, PaddleNLP's files, a vlscale folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.golden_batches import golden_folder
from tests.models.batches import tiny_model
from tests.models.unimo_batches import tiny_unimo, unimo_batch
from tests.unimo_goldens import official_model, paddlenlp_model
from vlscale.convert.initial import initial_state, load_initial_weights
from vlscale.errors import VlscaleError
from vlscale.models.unimo import UnimoForPretraining

NEW = {"image_embedder", "text_pooler", "image_pooler", "feature_head", "region_classifier", "match_head"}


def of_roberta(shape, seed: int = 3, **config) -> UnimoForPretraining:
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {key: getattr(shape, key) for key in (*keys, "max_position_embeddings")}
    return tiny_unimo(seed, **{**sizes, "type_vocab_size": 0, **config})


def test_a_roberta(tmp_path):
    pytest.importorskip("transformers")
    from tests.convert.bert_folders import roberta, saved, texts

    theirs = roberta()
    folder, model = saved(theirs, tmp_path / "roberta"), of_roberta(theirs.config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, folder)
    assert {name.split(".")[0] for name in report.fresh} == NEW
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.fresh)
    ids = texts(theirs.config, 7)
    batch = unimo_batch(["text"] * len(ids))
    batch.input_ids = ids.flatten()
    batch.cu_text = torch.arange(len(ids) + 1, dtype=torch.int32) * 7
    batch.prefix_len, batch.text_types = None, None
    with torch.no_grad():
        hidden = model.eval()(batch).hidden
        expected = theirs.roberta(ids).last_hidden_state.flatten(0, 1)
        assert_close(hidden, expected, rtol=0, atol=2e-5)
        ours = model.mlm_logits(model(batch), torch.arange(ids.numel())).log_softmax(1)
        assert_close(ours, theirs(ids).logits.flatten(0, 1).log_softmax(1), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_attention_heads": 2},
            "num_attention_heads is 4, the model's is 2; set model.config.num_attention_heads=4",
        ),
        ({"vocab_size": 61}, "vocab_size is 60, the model's is 61; .* or use this folder's vocabulary for the texts"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-05, the model's is 1e-12"),
        ({"max_position_embeddings": 24}, r"text_embedder.position.weight is \[20, 32\], the model's is \[24, 32\]"),
        ({"first_position": 0}, "begin at position 2, the model's at 0; set model.config.first_position=2"),
        ({"norm": "pre"}, "weights are for norm: post, the model has norm: pre"),
        ({"activation": "relu"}, "weights are for activation: gelu, the model has activation: relu"),
    ],
)
def test_a_roberta_that_does_not_fit_is_told(config, message, tmp_path):
    pytest.importorskip("transformers")
    from tests.convert.bert_folders import roberta, saved

    theirs = roberta()
    folder = saved(theirs, tmp_path / "roberta")
    with pytest.raises(VlscaleError, match=message) as caught:
        initial_state(folder, of_roberta(theirs.config, **config).config)
    assert "\n" not in str(caught.value)


@pytest.mark.golden
@pytest.mark.parametrize("form", ["fluid_ckpt", "unimo_tiny_en.tar.gz", "fluid_combined.params"])
def test_the_authors_variables(form):
    expected = official_model().state_dict()
    config = official_model().config
    model = UnimoForPretraining(config.model_copy(update={"heads": (*config.heads, "features", "classes")}))
    report = load_initial_weights(model, golden_folder("unimo") / "official" / form)
    assert {name.split(".")[0] for name in report.fresh} == {"feature_head", "region_classifier"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert {"text_embedder.roles.weight", "text_embedder.turns.weight"} <= {*report.ignored}
    assert any(name.startswith("task_head.cls_out_") for name in report.ignored)


@pytest.mark.golden
def test_paddlenlps_file_and_an_image_side_of_its_own():
    theirs = paddlenlp_model()
    sizes = {"images": True, "feature_dim": 6, "num_classes": 5, "heads": ("words", "features", "classes")}
    config = theirs.config.model_copy(update=sizes)
    model = UnimoForPretraining(config)
    report = load_initial_weights(model, golden_folder("unimo") / "paddlenlp" / "model_state.pdparams")
    assert {name.split(".")[0] for name in report.fresh} == {"image_embedder", "feature_head", "region_classifier"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_folder_of_vlscale(tmp_path):
    saved = tiny_unimo(5)
    saved.save_pretrained(tmp_path / "whole")
    model = tiny_unimo(6)
    report = load_initial_weights(model, tmp_path / "whole")
    assert not report.fresh
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())
    text_only = tiny_unimo(7, images=False, heads=("words",))
    text_only.save_pretrained(tmp_path / "texts")
    report = load_initial_weights(model, tmp_path / "texts")
    assert {name.split(".")[0] for name in report.fresh} == NEW
    grown = tiny_unimo(8, vocab_size=saved.config.vocab_size + 3)
    with pytest.raises(VlscaleError, match=r"set model\.init_tables=grow"):
        load_initial_weights(grown, tmp_path / "whole")
    load_initial_weights(grown, tmp_path / "whole", "grow")
    words = saved.text_embedder.word.weight
    assert torch.equal(grown.text_embedder.word.weight[: len(words)], words)


@pytest.mark.parametrize("what", ["other model", "nothing", "some file", "state dict", "positions"])
def test_what_is_no_beginning_is_told(what, tmp_path):
    config = tiny_unimo().config
    path = tmp_path / "folder"
    if what == "other model":
        tiny_model().save_pretrained(path)
    elif what == "some file":
        path.write_text("words")
    elif what == "state dict":
        torch.save({"weight": torch.zeros(3)}, path)
    elif what == "positions":
        tiny_unimo(first_position=1).save_pretrained(path)
    message = {
        "other model": "holds a uniter, model.name is unimo",
        "nothing": "no such folder .*RoBERTa",
        "some file": "no checkpoint is recognised in it",
        "state dict": "holds state-dict; give a RoBERTa, a UNIMO, or a vlscale folder of one",
        "positions": "for first_position: 1, the model has first_position: 2",
    }[what]
    with pytest.raises(VlscaleError, match=message) as caught:
        initial_state(path, config)
    assert "\n" not in str(caught.value)
    if what == "other model":
        tiny_unimo().save_pretrained(tmp_path / "unimo")
        with pytest.raises(VlscaleError, match=r"holds a unimo, model\.name is uniter"):
            initial_state(tmp_path / "unimo", tiny_model().config)


def test_a_folder_without_the_encoder_is_told(tmp_path: Path):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    from tests.convert.bert_folders import roberta, saved

    theirs = roberta()
    folder = saved(theirs, tmp_path / "roberta")
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: t for name, t in state.items() if "layer.1.output.dense" not in name}, folder / "model.safetensors"
    )
    with pytest.raises(VlscaleError, match=r"encoder\.layer\.1\.output\.dense\.weight, .* missing; give a whole"):
        initial_state(folder, of_roberta(theirs.config).config)


@pytest.mark.golden
def test_variables_without_the_whole_encoder_are_told(tmp_path: Path):
    shutil.copytree(golden_folder("unimo") / "official" / "fluid_ckpt", tmp_path / "part")
    for name in ("encoder_layer_0_ffn_fc_0.b_0", "image_emb.w_0", "mask_lm_out_fc.b_0"):
        (tmp_path / "part" / name).unlink()
    config = official_model().config
    with pytest.raises(VlscaleError, match=r"1 weights of the text encoder are missing: encoder\.layers\.0\.ffn\.up\."):
        initial_state(tmp_path / "part", config)
