"""Published UNIMO checkpoints through ``vlscale convert``: to a model of this library and back, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.golden_batches import golden_folder
from tests.unimo_goldens import OUTPUT, load, official_batch, official_model, paddlenlp_batch, paddlenlp_model
from vlscale.cli import main
from vlscale.convert import fluid, paddle_params
from vlscale.convert.conversion import RefusedError, Wish, convert
from vlscale.convert.verification import verify
from vlscale.errors import VlscaleError
from vlscale.models.folder import TASK_HEAD_FILE
from vlscale.models.unimo import UnimoForPretraining

pytestmark = pytest.mark.golden

OFFICIAL = ("fluid_ckpt", "unimo_tiny_en.tar.gz", "fluid_combined.params")
CHINESE = ("model_state.pdparams", "model_state_protocol2.pdparams", "base_only.pdparams")


def official() -> Path:
    return golden_folder("unimo") / "official"


def chinese() -> Path:
    return golden_folder("unimo") / "paddlenlp"


@pytest.mark.parametrize("form", OFFICIAL)
def test_every_form_becomes_the_model_and_goes_back_bit_by_bit(form, tmp_path):
    config = str(official() / "config.json")
    report = convert(Wish(official() / form, tmp_path / "ours", model=config))
    assert (report.to, report.unexpected, report.missing) == ("vlscale", [], [])
    assert report.operations.keys() == {"transpose", "concatenate"}
    fused = report.tensors["encoder.layers.0.attention.qkv.weight"]
    assert fused["operation"] == "transpose, concatenate"
    assert [name.split("att_")[1] for name in fused["sources"]] == ["query_fc.w_0", "key_fc.w_0", "value_fc.w_0"]
    model = UnimoForPretraining.from_pretrained(tmp_path / "ours")
    expected = official_model(roles=True).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    heads = load_file(tmp_path / "ours" / TASK_HEAD_FILE)
    assert all(name.startswith("task_head.cls_out_") for name in heads)
    assert verify(tmp_path / "ours", official() / form).same
    convert(Wish(tmp_path / "ours", tmp_path / "back", to="unimo"))
    for file in (official() / "fluid_ckpt").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len([*(tmp_path / "back").iterdir()]) == len([*(official() / "fluid_ckpt").iterdir()])
    assert verify(tmp_path / "back", tmp_path / "ours").same


@pytest.mark.parametrize(("file", "states"), [("text_nlu", "out.seq"), ("pair_vl", "out.enc_vl")])
def test_the_converted_model_computes_the_golden_states(file, states, tmp_path):
    # The configuration lies beside the archive.
    convert(Wish(official() / "unimo_tiny_en.tar.gz", tmp_path / "ours"))
    golden = load(file)
    batch, real = official_batch(golden)
    model = UnimoForPretraining.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        hidden = model(batch).hidden
    assert_close(hidden, golden[states][real], **OUTPUT)


@pytest.mark.parametrize("file", CHINESE)
def test_paddlenlps_models_too(file, tmp_path):
    report = convert(Wish(chinese() / file, tmp_path / "ours", model=str(chinese() / "config.json")))
    assert report.layout == "unimo-text"
    model = UnimoForPretraining.from_pretrained(tmp_path / "ours")
    assert (model.config.images, model.config.first_position, model.config.activation) == (False, 0, "relu")
    expected = paddlenlp_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert ("words" in model.config.heads) == (file != "base_only.pdparams")
    assert verify(tmp_path / "ours", chinese() / file).same
    convert(Wish(tmp_path / "ours", tmp_path / "back.pdparams", to="unimo-text"))
    with (
        paddle_params.open_source(chinese() / file) as before,
        paddle_params.open_source(tmp_path / "back.pdparams") as now,
    ):
        assert {*now.tensors} == {*before.tensors}
        assert all(torch.equal(now.read(name), before.read(name)) for name in now.tensors)


def test_the_converted_text_model_computes_the_golden_logits(tmp_path):
    convert(Wish(chinese() / "model_state.pdparams", tmp_path / "ours"))
    golden = load("paddlenlp_io", "paddlenlp")
    batch, real = paddlenlp_batch(golden, generated=False)
    model = UnimoForPretraining.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        encoded = model(batch)
        logits = model.mlm_logits(encoded, torch.arange(batch.input_ids.numel()))
    assert_close(logits, golden["out.logits_default_mask"][real], **OUTPUT)


def test_an_optimisers_state_is_left_out_and_told(tmp_path):
    report = convert(Wish(official() / "fluid_after_optim.tar.gz", tmp_path / "tuned"))
    assert set(report.ignored.values()) == {"the optimiser's"}
    assert UnimoForPretraining.from_pretrained(tmp_path / "tuned").config.role_vocab_size == 0


def test_what_is_missing_or_unexpected_is_told(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(official() / "fluid_ckpt", broken)
    for path in broken.iterdir():
        path.chmod(0o644)
    (broken / "encoder_layer_1_ffn_fc_0.w_0").unlink()
    shutil.copy(official() / "fluid_ckpt" / "match_fc.b_0", broken / "visual_head.b_0")
    wish = {"source": broken, "target": tmp_path / "ours", "model": str(official() / "config.json")}
    with pytest.raises(
        RefusedError, match=r"1 missing: encoder\.layers\.1\.ffn\.up\.weight; 1 unexpected: visual_head"
    ):
        convert(Wish(**wish))
    assert not (tmp_path / "ours").exists()
    report = convert(Wish(**wish, allow_missing=["*.ffn.*"], allow_unexpected=["visual_head*"]))
    assert (report.fresh, report.left_out) == (["encoder.layers.1.ffn.up.weight"], ["visual_head.b_0"])
    (broken / "encoder_layer_0_multi_head_att_key_fc.b_0").unlink()
    with pytest.raises(VlscaleError, match=r"qkv\.bias needs encoder\.layers\.0\.attention\.key\.bias too"):
        convert(Wish(**wish, overwrite=True))


def test_a_norm_that_is_missing_starts_at_zero(tmp_path):
    """Paddle's code would start the bias of the word head's norm at 1."""
    lacking = tmp_path / "lacking"
    shutil.copytree(official() / "fluid_ckpt", lacking)
    (lacking / "mask_lm_trans_layer_norm_bias").unlink()
    convert(Wish(lacking, tmp_path / "ours", model=str(official() / "config.json"), allow_missing=["*.norm.bias"]))
    model = UnimoForPretraining.from_pretrained(tmp_path / "ours")
    assert not model.word_head.transform.norm.bias.any()


def test_heads_without_a_published_name_are_told(tmp_path):
    config = official_model().config.model_copy(update={"heads": ("words", "features")})
    UnimoForPretraining(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(RefusedError, match=r"2 unexpected: feature_head\.bias, feature_head\.weight; allow"):
        convert(Wish(tmp_path / "ours", tmp_path / "back", to="unimo"))
    report = convert(Wish(tmp_path / "ours", tmp_path / "back", to="unimo", allow_unexpected=["feature_head.*"]))
    assert report.left_out == ["feature_head.bias", "feature_head.weight"]
    with fluid.open_source(tmp_path / "back") as source:
        assert "word_embedding" in source.tensors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "uniter-base"], r"holds a model of another kind, unimo; give its preset"),
        (["--model", "unimo-base"], r"hidden_size is \d+, unimo-base says 768"),
        (["--to", "uniter"], r"unimo cannot become 'uniter'; it can become vlscale, hub, unimo, state-dict"),
        ([], r"attention heads of a model \d+ wide are not known; give --model CONFIG.json"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(official() / "fluid_ckpt"), str(tmp_path / "ours"), *arguments])
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert re.search(message, line)


def test_a_text_model_cannot_be_an_english_one(tmp_path):
    paddlenlp_model().save_pretrained(tmp_path / "chinese")
    official_model().save_pretrained(tmp_path / "english")
    with pytest.raises(VlscaleError, match="first_position: 0, which unimo has not"):
        convert(Wish(tmp_path / "chinese", tmp_path / "back", to="unimo"))
    with pytest.raises(VlscaleError, match="first_position: 2, which unimo-text has not"):
        convert(Wish(tmp_path / "english", tmp_path / "back.pdparams", to="unimo-text"))


def test_a_folder_for_the_hub_says_what_it_is(tmp_path):
    convert(Wish(official() / "unimo_tiny_en.tar.gz", tmp_path / "hub", to="hub"))
    assert '"UnimoForPretraining"' in (tmp_path / "hub/config.json").read_text()
    card = (tmp_path / "hub/README.md").read_text()
    assert "- unimo\n" in card
    assert re.search(r"UNIMO \(\d+ layers, \d+ wide", card)


def test_weights_alone_show_which_model_they_are_of(tmp_path):
    official_model().save_pretrained(tmp_path / "folder")
    shutil.copy(tmp_path / "folder/model.safetensors", tmp_path / "weights.safetensors")
    report = convert(
        Wish(tmp_path / "weights.safetensors", tmp_path / "back", to="unimo", model=str(official() / "config.json"))
    )
    assert report.layout == "vlscale"
    assert "word_embedding" in report.tensors
