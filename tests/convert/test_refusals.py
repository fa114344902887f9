"""What a conversion refuses: missing, unknown, untrue or hostile things, in one line, with nothing written."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.convert.published import CONFIG, LEGACY, golden_state, load
from tests.golden_batches import golden_folder
from vlscale.cli import main
from vlscale.convert.conversion import RefusedError, Wish, convert
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE
from vlscale.models.uniter import UniterForPretraining


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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--to", "unitr"], r"--to 'unitr' is unknown.*did you mean 'uniter'"),
        (["--from", "vilbrt"], r"no layout 'vilbrt'.*did you mean 'vilbert'"),
        (["--from", "vilbert"], "its names are those of uniter, not of 'vilbert'; drop --from"),
        (["--to", "unimo"], r"uniter cannot become 'unimo'; it can become vlscale, hub, uniter, state-dict"),
        (["--dtype", "fp8"], r"--dtype 'fp8': expected fp32, fp16, bf16 or keep"),
        (["--model", "uniter-base"], "hidden_size is 64, uniter-base says 768; give its own with --model"),
        (["--model", "nowhere"], r"--model nowhere: no preset \(.*uniter-base, uniter-large\) and no file"),
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
