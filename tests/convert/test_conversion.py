"""Converting for real: published checkpoints in and out again bit by bit, what is refused, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden_batches import golden_folder, golden_model
from vlscale.cli import main
from vlscale.convert import placing
from vlscale.convert.conversion import RefusedError, Wish, convert
from vlscale.convert.initial import load_initial_weights
from vlscale.convert.safetensors_files import write_safetensors
from vlscale.convert.source import TensorInfo
from vlscale.convert.verification import verify
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, describe
from vlscale.models.uniter import UniterForPretraining

CONFIG = golden_folder() / "config.json"
TASKS = ("itm_rank", "nlvr2_paired", "nlvr2_paired_attn", "nlvr2_triplet", "re_cls_mlp1", "re_cls_mlp2", "re_rank_hard",
         "vcr", "ve", "vqa")  # fmt: skip
LEGACY = {"_use_new_zipfile_serialization": False}


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def golden_state(task: str = "pretrain") -> dict[str, Tensor]:
    """A complete published state dict; those of tasks are stored as what they change (the goldens' README)."""
    whole = load(golden_folder() / "pretrain.pt")
    if task == "pretrain":
        return whole
    kept = {name: tensor for name, tensor in whole.items() if name.startswith("uniter.")}
    kept |= {name: whole[name] for name in whole if task == "itm_rank" and name.startswith("itm_output.")}
    return (whole if task == "pretrain_vcr" else kept) | load(golden_folder() / f"{task}.pt")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def published(tmp_path):
    """A published checkpoint with its configuration beside it."""
    (tmp_path / CONFIG_FILE).write_bytes(CONFIG.read_bytes())
    torch.save(golden_state(), tmp_path / "uniter.pt")
    return tmp_path / "uniter.pt"


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
    convert(Wish(golden_folder("unimo") / "paddlenlp/model_state.pdparams", tmp_path / "chinese.safetensors"))
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
    with pytest.raises(VlscaleError, match=r"does not name \.safetensors files of this folder"):
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


def test_what_is_missing_or_unknown_is_refused_and_reported(published, tmp_path, capsys):
    state = golden_state()
    del state["uniter.pooler.dense.bias"]
    state["surprise"] = torch.zeros(3)
    torch.save(state, published)
    command = ["convert", str(published), str(tmp_path / "ours"), "--report", str(tmp_path / "report.json")]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1 missing: pooler.dense.bias; 1 unexpected: surprise; allow them with --allow-missing and" in error
    assert not (tmp_path / "ours").exists()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["missing"], report["unexpected"]) == (["pooler.dense.bias"], ["surprise"])
    assert main([*command, "--allow-missing", "pooler.*", "--allow-unexpected", "surp*"]) == 0
    assert "1 left out: surprise" in capsys.readouterr().out
    assert UniterForPretraining.from_pretrained(tmp_path / "ours").pooler.dense.bias.eq(0).all()


def test_values_that_are_no_numbers_are_told_and_too_large_ones_refused(published, tmp_path, capsys):
    state = golden_state()
    state["itm_output.bias"] = torch.tensor([float("nan"), 7e4])
    torch.save(state, published)
    assert main(["convert", str(published), str(tmp_path / "ours")]) == 0
    assert "1 WITH NaN OR INFINITY: itm_head.bias (1 values)" in capsys.readouterr().out
    with pytest.raises(VlscaleError, match=r"itm_head.bias has values beyond torch.float16's range \(6.55e\+04\)"):
        convert(Wish(published, tmp_path / "half", dtype="fp16"))
    assert not (tmp_path / "half").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_tied_tensors_that_differ_are_refused(published, tmp_path):
    state = golden_state()
    state["feat_regress.weight"] = state["feat_regress.weight"] + 1
    torch.save(state, published)
    with pytest.raises(VlscaleError, match=r"feat_regress\.weight differs from uniter\.img_embed"):
        convert(Wish(published, tmp_path / "ours"))


def test_an_existing_target_stays_unless_it_is_a_result_and_may_be_replaced(published, tmp_path):
    target = tmp_path / "ours"
    convert(Wish(published, target))
    with pytest.raises(VlscaleError, match="exists already; give another name, or --overwrite"):
        convert(Wish(published, target))
    (target / "mine").write_text("kept")
    with pytest.raises(VlscaleError, match="holds mine, which no conversion wrote"):
        convert(Wish(published, target, overwrite=True))
    (target / "mine").unlink()
    torch.save({**golden_state(), "surprise": torch.zeros(1)}, published)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(RefusedError):
        convert(Wish(published, target, overwrite=True))
    assert (target / "model.safetensors").read_bytes() == before
    torch.save(golden_state(), published)
    convert(Wish(published, target, dtype="bf16", overwrite=True))
    assert (target / "model.safetensors").stat().st_size < len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "ours", "uniter.pt"]


def test_the_source_is_never_the_target(published, tmp_path):
    convert(Wish(published, tmp_path / "ours"))
    for target in (published, tmp_path / "ours/config.json", tmp_path / "ours", tmp_path / "ours/model.safetensors"):
        source = published if target == published else tmp_path / "ours"
        with pytest.raises(
            VlscaleError, match=r"is, holds or lies in the source|holds config\.json, which|is a folder"
        ):
            convert(Wish(source, target, to="uniter", overwrite=True))
    with pytest.raises(VlscaleError, match=r"is, holds or lies in|which no conversion wrote"):
        convert(Wish(published, tmp_path, overwrite=True))
    assert verify(tmp_path / "ours", published).same


@pytest.mark.parametrize("name", [".", "x" * 256, "x" * 300, "missing/x"])
def test_names_that_are_none_for_a_result(name, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VlscaleError, match=r"is no name for a result|is no folder; make it first"):
        convert(Wish(published, Path(name), overwrite=True))


def test_a_device_is_not_replaced(published, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VlscaleError, match="is neither a file nor a folder"):
        convert(Wish(published, tmp_path / "pipe", overwrite=True))
    assert (tmp_path / "pipe").is_fifo()


def test_what_comes_into_being_meanwhile_is_kept(published, tmp_path, monkeypatch):
    target = tmp_path / "ours"
    honest = placing._sync

    def slow(path):
        honest(path)
        target.mkdir()
        (target / "somebody else's").write_text("kept")

    monkeypatch.setattr(placing, "_sync", slow)
    with pytest.raises(VlscaleError, match="has come into being meanwhile"):
        convert(Wish(published, target))
    assert (target / "somebody else's").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_exchange_leaves_the_old_result(error, published, tmp_path, monkeypatch):
    target = tmp_path / "ours"
    convert(Wish(published, target))
    before = (target / "model.safetensors").read_bytes()
    honest, calls = os.rename, []

    def failing(one, other):
        calls.append(other)
        if len(calls) == 2:
            raise error
        honest(one, other)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((KeyboardInterrupt, VlscaleError)):
        convert(Wish(published, target, dtype="bf16", overwrite=True))
    monkeypatch.undo()
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "ours", "uniter.pt"]


def test_a_hub_folder_is_a_source_too(published, tmp_path):
    convert(Wish(published, tmp_path / "hub", to="hub"))
    convert(Wish(tmp_path / "hub", tmp_path / "out.pt", to="uniter"))
    convert(Wish(tmp_path / "hub", tmp_path / "again", to="hub"))
    assert same(load(tmp_path / "out.pt"), golden_state())


def test_a_task_head_file_cannot_replace_weights(published, tmp_path):
    convert(Wish(published, tmp_path / "ours"))
    for name in ("task_head.uniter.pooler.dense.bias", "itm_head.bias", "task_head.itm_output.weight"):
        save_file({name: torch.zeros(64)}, tmp_path / "ours/task_head.safetensors")
        with pytest.raises(VlscaleError, match=r"task_head\.safetensors: holds .* which is no part of a task's head"):
            convert(Wish(tmp_path / "ours", tmp_path / "out.pt", to="uniter"))


@pytest.mark.parametrize("said", [{"max_position_embeddings": 10**19}, {"num_hidden_layers": 10**7}, {"vocab_size": 7}])
def test_a_configuration_that_lies_is_refused_before_a_model_is_made(said, published, tmp_path):
    convert(Wish(published, tmp_path / "ours"))
    path = tmp_path / "ours/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    with pytest.raises(VlscaleError, match=r"config\.json says .*; give the file|less than or equal to"):
        convert(Wish(tmp_path / "ours", tmp_path / "out.pt", to="uniter"))


def test_what_a_pickle_says_of_its_licence_or_run_is_not_believed(tmp_path):
    (tmp_path / CONFIG_FILE).write_bytes(CONFIG.read_bytes())
    lies = {"model": golden_state(), "manifest": "x", "vocabulary": "x", "licence": "mit\n---\n# PWNED"}
    torch.save(lies, tmp_path / "in.pt")
    convert(Wish(tmp_path / "in.pt", tmp_path / "hub", to="hub"))
    assert "PWNED" not in (tmp_path / "hub/README.md").read_text()


def test_reports_replace_nothing_but_reports(published, tmp_path, capsys):
    command = ["convert", str(published), str(tmp_path / "ours"), "--overwrite", "--report"]
    for wrong, says in ((published, "lies in the source"), (tmp_path / "no/r.json", "is no folder"),
                        (tmp_path / "text", "exists and is no report")):  # fmt: skip
        (tmp_path / "text").write_text("hello")
        with pytest.raises(SystemExit):
            main([*command, str(wrong)])
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert not (tmp_path / "ours").exists()
    assert main([*command, str(tmp_path / "r.json")]) == 0
    assert main([*command, str(tmp_path / "r.json")]) == 0
    check = ["convert", "--verify", str(tmp_path / "ours"), "--against", str(published)]
    assert main([*check, "--report", str(tmp_path / "r.json")]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["equal"]) == 60
    with pytest.raises(SystemExit):
        main([*check, "--overwrite"])


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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--to", "unitr"], r"--to 'unitr' is unknown.*did you mean 'uniter'"),
        (["--from", "vilbrt"], r"no layout 'vilbrt'.*did you mean 'vilbert'"),
        (["--from", "vilbert"], "its names are those of uniter, not of 'vilbert'; drop --from"),
        (["--to", "unimo"], r"uniter cannot become 'unimo'; it can become vlscale, hub, uniter, state-dict"),
        (["--dtype", "fp8"], r"--dtype 'fp8': expected fp32, fp16, bf16 or keep"),
        (["--model", "uniter-base"], "hidden_size is 64, uniter-base says 768; give its own with --model"),
        (["--model", "nowhere"], r"--model nowhere: no preset \(uniter-base, uniter-large\) and no file"),
        (["--verify", "x"], "--verify DST --against SRC go together"),
    ],
)
def test_mistakes(more, says, published, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(published), str(tmp_path / "ours"), *more])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(says, error), error
    assert not (tmp_path / "ours").exists()


def test_sources_that_are_none_or_two(published, tmp_path):
    with pytest.raises(VlscaleError, match="no such file or folder"):
        convert(Wish(tmp_path / "nothing", tmp_path / "ours"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(VlscaleError, match="no checkpoint is recognised in it"):
        convert(Wish(tmp_path / "text.pt", tmp_path / "ours"))
    vilbert = load(golden_folder("vilbert") / "pretrain.pt")
    both = {**golden_state(), **{name: tensor for name, tensor in vilbert.items() if name.startswith("bert.")}}
    torch.save(both, published)
    with pytest.raises(VlscaleError, match="may be uniter or vilbert; say which with --from"):
        convert(Wish(published, tmp_path / "ours"))
    with pytest.raises(RefusedError, match=r"unexpected: bert\."):
        convert(Wish(published, tmp_path / "ours", layout="uniter"))
    report = convert(
        Wish(published, tmp_path / "ours.pt", layout="uniter", to="uniter", allow_unexpected=["bert.*", "cls.*"])
    )
    assert report.layout == "uniter"
    convert(Wish(golden_folder() / "pretrain.pt", tmp_path / "ours"))
    with pytest.raises(VlscaleError, match="is a vlscale folder already; say with --to"):
        convert(Wish(tmp_path / "ours", tmp_path / "more"))


def test_a_wider_model_needs_its_configuration(tmp_path):
    torch.save(golden_state(), tmp_path / "alone.pt")
    with pytest.raises(VlscaleError, match="attention heads of a model 64 wide are not known; give --model"):
        convert(Wish(tmp_path / "alone.pt", tmp_path / "ours"))
    convert(Wish(tmp_path / "alone.pt", tmp_path / "ours", model=str(CONFIG)))
    assert UniterForPretraining.from_pretrained(tmp_path / "ours").config.num_attention_heads == 4


class _Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_file_runs_nothing_and_leaves_nothing(legacy, tmp_path, capsys):
    torch.save({**golden_state(), "x": _Payload(tmp_path / "ran")}, tmp_path / "in.pt", **(LEGACY if legacy else {}))
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


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
