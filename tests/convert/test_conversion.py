"""Converting for real: published checkpoints in and out again, bit by bit, in the memory of one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.published import CONFIG, LEGACY, golden_state, load, same
from tests.golden_batches import golden_folder, golden_model
from vlscale.cli import main
from vlscale.convert.conversion import RefusedError, Wish, convert
from vlscale.convert.initial import load_initial_weights
from vlscale.convert.safetensors_files import write_safetensors
from vlscale.convert.source import TensorInfo
from vlscale.convert.verification import verify
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, describe
from vlscale.models.uniter import UniterForPretraining

TASKS = ("itm_rank", "nlvr2_paired", "nlvr2_paired_attn", "nlvr2_triplet", "re_cls_mlp1", "re_cls_mlp2", "re_rank_hard",
         "vcr", "ve", "vqa")  # fmt: skip


@pytest.mark.golden
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("task", ["pretrain", "pretrain_vcr", *TASKS])
def test_uniter_there_and_back_is_bit_exact(task, legacy, tmp_path):
    state = golden_state(task)
    (tmp_path / CONFIG_FILE).write_bytes(CONFIG.read_bytes())
    torch.save(state, tmp_path / "in.pt", **(LEGACY if legacy else {}))
    report = convert(Wish(tmp_path / "in.pt", tmp_path / "ours"))
    assert report.layout == "uniter"
    assert not report.missing
    assert not report.unexpected
    model = UniterForPretraining.from_pretrained(tmp_path / "ours")
    assert model.config.num_attention_heads == json.loads(CONFIG.read_text())["num_attention_heads"]
    assert ("words" in model.config.heads) is any(name.startswith("cls.") for name in state)
    convert(Wish(tmp_path / "ours", tmp_path / "out.pt", to="uniter"))
    assert same(load(tmp_path / "out.pt"), state)
    assert verify(tmp_path / "out.pt", tmp_path / "in.pt").same


@pytest.mark.golden
def test_the_converted_model_is_the_one_that_reproduces_the_goldens(published, tmp_path):
    convert(Wish(published, tmp_path / "ours"))
    assert same(UniterForPretraining.from_pretrained(tmp_path / "ours").state_dict(), golden_model().state_dict())


def test_half_precision_and_old_names_of_norms(tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(CONFIG.read_bytes())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor.half()
        for name, tensor in golden_state().items()
    }
    torch.save(old, tmp_path / "in.pt", **LEGACY)
    convert(Wish(tmp_path / "in.pt", tmp_path / "ours"))
    convert(Wish(tmp_path / "ours", tmp_path / "out.pt", to="uniter"))
    rounded = {name: tensor.half().float() for name, tensor in golden_state().items()}
    assert same(load(tmp_path / "out.pt"), rounded)
    convert(Wish(tmp_path / "ours", tmp_path / "half.pt", to="uniter", dtype="bf16"))
    assert {tensor.dtype for tensor in load(tmp_path / "half.pt").values()} == {torch.bfloat16}


@pytest.mark.golden
def test_others_keep_their_published_names(tmp_path):
    """ViLBERT, UniT (aliases stay aliases) and UNIMO in each form of Paddle's, bit by bit."""
    for folder, file, layout in (("vilbert", "pretrain.pt", "vilbert"), ("unit", "shared_dec/model.pt", "unit")):
        source = golden_folder(folder) / file
        report = convert(Wish(source, tmp_path / f"{folder}.pt", to=layout))
        assert report.layout == layout
        assert same(load(tmp_path / f"{folder}.pt"), load(source))
        convert(Wish(source, tmp_path / f"{folder}.safetensors", to="state-dict"))
        convert(Wish(tmp_path / f"{folder}.safetensors", tmp_path / f"{folder}-again.pt"))
        assert verify(tmp_path / f"{folder}-again.pt", source).same
    unimo = golden_folder("unimo") / "official"
    for number, form in enumerate(("fluid_ckpt", "unimo_tiny_en.tar.gz", "fluid_combined.params")):
        report = convert(Wish(unimo / form, tmp_path / f"unimo-{number}", to="unimo"))
        for file in (unimo / "fluid_ckpt").iterdir():
            assert (tmp_path / f"unimo-{number}" / file.name).read_bytes() == file.read_bytes()
    report = convert(Wish(unimo / "fluid_after_optim.tar.gz", tmp_path / "tuned", to="unimo"))
    assert set(report.ignored.values()) == {"the optimiser's"}
    chinese = golden_folder("unimo") / "paddlenlp/model_state.pdparams"
    convert(Wish(chinese, tmp_path / "chinese.safetensors", to="state-dict"))
    expected = load_file(golden_folder("unimo") / "paddlenlp/expected_state.safetensors")
    assert same(load_file(tmp_path / "chinese.safetensors"), expected)


def test_unit_under_its_old_prefixes(tmp_path):
    state = load(golden_folder("unit") / "shared_dec/model.pt")
    old = {"module." + name.replace("unit_base_model.", "detr_model."): tensor for name, tensor in state.items()}
    old["module.bert_model.embeddings.position_ids"] = torch.arange(4)
    torch.save({"model": old, "best_update": 3}, tmp_path / "unit.ckpt")
    report = convert(Wish(tmp_path / "unit.ckpt", tmp_path / "unit.pt", to="unit"))
    assert same(load(tmp_path / "unit.pt"), state)
    assert [*report.ignored] == ["module.bert_model.embeddings.position_ids"]


def test_a_bert_becomes_a_uniter_with_new_image_parts(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.convert.bert_folders import SIZES, filled

    bert = filled(transformers.BertForPreTraining(transformers.BertConfig(**SIZES)))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(RefusedError, match=r"missing: .*image_embedder.*--allow-missing PATTERN"):
        convert(Wish(tmp_path / "bert", tmp_path / "ours"))
    allowed = ["image_embedder.*", "feature_head.*", "region_classifier.*", "itm_head.*"]
    report = convert(Wish(tmp_path / "bert", tmp_path / "ours", allow_missing=allowed))
    model = UniterForPretraining.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.text_embedder.word.weight, bert.bert.embeddings.word_embeddings.weight)
    assert "image_embedder.projection.weight" in report.fresh
    assert not any(name.startswith("encoder") for name in report.fresh)
    assert any("seq_relationship" in name for name in report.ignored)
    again = convert(Wish(tmp_path / "bert", tmp_path / "again", allow_missing=allowed))
    assert again.target_files["model.safetensors"] == report.target_files["model.safetensors"]


def test_a_bert_a_roberta_and_a_backbone_start_the_other_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tests.convert.bert_folders import SIZES, filled

    bert = filled(transformers.BertForPreTraining(transformers.BertConfig(**SIZES)))
    bert.save_pretrained(tmp_path / "bert")
    words = bert.bert.embeddings.word_embeddings.weight
    convert(Wish(tmp_path / "bert", tmp_path / "vilbert.pt", to="vilbert"))
    convert(Wish(tmp_path / "bert", tmp_path / "unit.pt", to="unit"))
    assert torch.equal(load(tmp_path / "vilbert.pt")["bert.embeddings.word_embeddings.weight"], words)
    assert torch.equal(load(tmp_path / "unit.pt")["bert_model.module.embeddings.word_embeddings.weight"], words)
    roberta = filled(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, type_vocab_size=1)))
    roberta.save_pretrained(tmp_path / "roberta")
    convert(Wish(tmp_path / "roberta", tmp_path / "unimo", to="unimo"))
    convert(Wish(tmp_path / "unimo", tmp_path / "unimo.pt", to="state-dict"))
    found, embeddings = load(tmp_path / "unimo.pt"), roberta.roberta.embeddings
    folded = embeddings.word_embeddings.weight + embeddings.token_type_embeddings.weight
    torch.testing.assert_close(found["word_embedding"], folded.detach())
    told = convert(Wish(tmp_path / "roberta", tmp_path / "told", to="unimo")).tensors
    assert told["word_embedding"]["operation"] == "fold"
    assert told["encoder_layer_1_multi_head_att_query_fc.w_0"]["operation"] == "transpose"
    query = roberta.roberta.encoder.layer[1].attention.self.query.weight
    assert torch.equal(found["encoder_layer_1_multi_head_att_query_fc.w_0"], query.T)
    body = {
        "conv1.weight": torch.randn(4, 3, 7, 7), "bn1.running_mean": torch.randn(4), "fc.weight": torch.randn(5, 4),
        "layer1.0.conv1.weight": torch.randn(4, 4, 1, 1), "bn1.num_batches_tracked": torch.tensor(3),
    }  # fmt: skip
    torch.save(body, tmp_path / "resnet.pth")
    report = convert(Wish(tmp_path / "resnet.pth", tmp_path / "start.pt", to="unit"))
    start = load(tmp_path / "start.pt")
    assert [*start] == [
        f"unit_base_model.backbone.0.body.{n}" for n in ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight")
    ]
    assert {*report.ignored} == {"fc.weight", "bn1.num_batches_tracked"}


def test_shards_load(tmp_path):
    model = golden_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    infos = [(name, TensorInfo(tensor.dtype, tuple(tensor.shape))) for name, tensor in state.items()]
    written = write_safetensors(tmp_path / "sharded", infos, state.__getitem__, max_shard_bytes=50_000)
    assert len(written) > 3
    (tmp_path / "sharded" / CONFIG_FILE).write_text(describe(model.config))
    assert same(UniterForPretraining.from_pretrained(tmp_path / "sharded").state_dict(), state)
    assert verify(tmp_path / "sharded", golden_folder() / "pretrain.pt").same
    index = tmp_path / "sharded/model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(VlscaleError, match=r"expected a \.safetensors file of this folder"):
        UniterForPretraining.from_pretrained(tmp_path / "sharded")


def test_a_hub_folder_loads_with_transformers_torch_and_vlscale_alone(published, tmp_path):
    pytest.importorskip("transformers")
    convert(Wish(published, tmp_path / "hub", to="hub"))
    card = (tmp_path / "hub/README.md").read_text()
    assert f"sha256 `{convert(Wish(published, tmp_path / 'x')).source_files['uniter.pt'][1]}`" in card
    assert "license: other" in card
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'streaming', 'data_tools')))\n"
        "import vlscale.hf\nfrom transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('hub')\nprint(sum(p.double().sum().item() for p in model.parameters()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = sum(parameter.double().sum().item() for parameter in golden_model().parameters())
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, rel=1e-9)


def test_a_hub_folder_is_a_source_too(published, tmp_path):
    convert(Wish(published, tmp_path / "hub", to="hub"))
    convert(Wish(tmp_path / "hub", tmp_path / "out.pt", to="uniter"))
    convert(Wish(tmp_path / "hub", tmp_path / "again", to="hub"))
    assert same(load(tmp_path / "out.pt"), golden_state())


def test_training_starts_from_a_folder_with_more_heads_than_the_model(published, tmp_path):
    convert(Wish(published, tmp_path / "ours"))
    whole = UniterForPretraining.from_pretrained(tmp_path / "ours")
    model = UniterForPretraining(whole.config.model_copy(update={"heads": ("words",)}))
    report = load_initial_weights(model, tmp_path / "ours")
    assert "itm_head.bias" in report.ignored
    assert not report.fresh
    assert torch.equal(model.pooler.dense.weight, whole.pooler.dense.weight)


def test_a_difference_is_found(published, tmp_path, capsys):
    convert(Wish(published, tmp_path / "ours"))
    command = ["convert", "--verify", str(tmp_path / "ours"), "--against", str(published)]
    assert main(command) == 0
    state = golden_state()
    state["uniter.pooler.dense.bias"][3] += 0.5
    torch.save(state, published)
    assert main(command) == 1
    assert "1 DIFFER: pooler.dense.bias (1 of 64 values, by up to 0.5)" in capsys.readouterr().out


@pytest.mark.parametrize(("form", "most"), [("safetensors", 1.3), ("pt", 1.3 * 3)])
def test_memory_stays_at_one_tensor(form, most, tmp_path):
    """Peak growth of a conversion, against the largest tensor (of three as large) for either kind of file."""
    code = f"""
import torch
from pathlib import Path
from vlscale.convert.conversion import Wish, convert
from vlscale.convert.torch_files import open_source
import vlscale.convert.command
def peak():  # ru_maxrss would be the parent's
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.isfinite(torch.ones(1 << 20)).sum()
before = peak()
convert(Wish(Path("in.{form}"), Path("out.safetensors"), to="state-dict"))
print(peak() - before)
"""
    rows = 1 << 12
    state = {name: torch.randn(rows, 1 << 12) for name in "abc"}
    if form == "pt":
        torch.save(state, tmp_path / "in.pt")
    else:
        save_file(state, tmp_path / "in.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    largest = state["a"].nbytes
    bookkeeping = 24 << 20
    assert int(done.stdout) <= most * largest + bookkeeping, int(done.stdout) / largest
