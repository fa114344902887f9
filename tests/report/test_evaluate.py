from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from tests.report.scenes import GuessingModel, OracleModel, make_scenes, open_scenes
from vlscale.config import ObjectivesSection, parse_recipe, resolved
from vlscale.errors import VlscaleError
from vlscale.models.registry import build_model
from vlscale.report.evaluate import evaluate, evaluate_run, load_models
from vlscale.report.heldout import HeldOut
from vlscale.report.table import METRICS, REPORTED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as training leaves it, of a model that learnt nothing, with val and val_unseen."""
    base = tmp_path_factory.mktemp("run")
    for name, seed in (("val", 0), ("val_unseen", 1)):
        make_scenes(base / "data" / name, 30, seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dataset = {"name": "val", "root": str(base / "data" / "val")}
    raw = {
        "name": "tiny",
        "seed": 5,
        "model": {"config": {**sizes, "hidden_dropout": 0.5}},
        "data": {"datasets": [{**dataset, "mix": {"mlm": 1}}], "validation": [dataset]},
        "batch": {"global_batch_examples": 4},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 0, "total_steps": 1},
    }
    recipe = parse_recipe(raw, "test")
    data = open_scenes(base / "data" / "val")
    torch.manual_seed(99)
    facts = {"vocab_size": data.vocabulary.size, "feature_dim": data.feature_dim, "num_classes": data.num_classes}
    build_model(recipe.model, **facts).save_pretrained(base / "model")
    (base / "recipe.yaml").write_text(yaml.safe_dump(resolved(recipe)))
    return base


def test_every_metric_is_measured_and_tells_the_models_apart(scenes: HeldOut) -> None:
    knows, guesses = (evaluate(model, scenes, ObjectivesSection()) for model in (OracleModel(), GuessingModel()))
    assert set(knows.outcomes) == {*METRICS, *REPORTED}
    assert not knows.left_out
    for name in ("mrc_accuracy", "itm_accuracy", "alignment_accuracy", "i2t_r1", "t2i_r5", "grounding"):
        assert knows.outcomes[name].interval(0)[0] > guesses.outcomes[name].interval(0)[1] + 0.3


def test_metrics_without_ground_truth_are_named(bare: HeldOut) -> None:
    found = evaluate(GuessingModel(), bare, ObjectivesSection())
    assert set(found.outcomes) == {"itm_accuracy", "i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"}
    assert set(found.left_out) == {*METRICS, *REPORTED} - set(found.outcomes)
    assert "spans" in found.left_out["alignment_accuracy"]


def test_a_run_from_its_folder_to_its_summary(run: Path) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        path = evaluate_run(run, (), console)
    found = json.loads(path.read_text())
    assert tuple(found["metrics"]) == tuple(found["unseen_pictures"]) == METRICS
    for row in found["metrics"].values():
        assert 0 <= row["trained"] <= 1
    assert found["metrics"]["i2t_r1"]["candidates"] == 30
    assert found["datasets"]["unseen_pictures"]["name"] == "val_unseen"
    assert found["metrics"]["itm_accuracy"]["trained"] == pytest.approx(0.5, abs=0.2)
    assert (run / "grounding.png").stat().st_size > 10_000
    text = captured.get()
    assert "summary.json" in text
    assert "grounding.png" in text
    with console.capture():
        evaluate_run(run, (), console)
    assert json.loads(path.read_text()) == found


def test_the_untrained_model_is_what_the_seed_gives(run: Path) -> None:
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()), "x")
    trained, untrained = load_models(run, recipe)
    torch.manual_seed(5)
    again = type(trained)(trained.config)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(again.parameters(), untrained.parameters(), strict=True))
    assert not torch.equal(trained.pooler.dense.weight, untrained.pooler.dense.weight)
    assert not trained.training
    assert not untrained.training


def test_unseen_pictures_may_stand_in_the_recipe_or_be_absent(run: Path, tmp_path: Path) -> None:
    console = Console(quiet=True)
    alone = tmp_path / "alone"
    shutil.copytree(run / "data" / "val", alone)
    name_root = f"{{name: v, root: {alone}}}"
    found = json.loads(evaluate_run(run, (f"data.validation=[{name_root}]",), console).read_text())
    assert "unseen_pictures" not in found
    listed = f"data.validation=[{name_root}, {{name: u, root: {run / 'data' / 'val_unseen'}}}]"
    found = json.loads(evaluate_run(run, (listed,), console).read_text())
    assert found["datasets"]["unseen_pictures"]["name"] == "u"


def test_mistakes_are_one_line(run: Path, tmp_path: Path) -> None:
    def message(folder: Path, *overrides: str) -> str:
        with pytest.raises(VlscaleError) as caught:
            evaluate_run(folder, overrides, Console(quiet=True))
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "none")
    assert "no recipe.yaml" in message(tmp_path)
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    assert "no model yet" in message(tmp_path)
    assert "data.validation is empty" in message(run, "data.validation=[]")
    assert "unknown key" in message(run, "data.validatoin=[]")
    other = make_scenes(tmp_path / "other", 4, classes=False)
    assert "is no folder" in message(run, f"data.validation=[{{name: v, root: {other / 'x'}}}]")
    shutil.copytree(run / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nonsense")
    assert "model.safetensors" in message(tmp_path)
    recipe = parse_recipe(yaml.safe_load((run / "recipe.yaml").read_text()), "x")
    facts = {"vocab_size": config["vocab_size"], "feature_dim": 17, "num_classes": config["num_classes"]}
    build_model(recipe.model, **facts).save_pretrained(tmp_path / "model")
    assert "feature width 16, but the model" in message(tmp_path)
    facts = {**facts, "feature_dim": config["feature_dim"], "vocab_fingerprint": "a" * 64}
    build_model(recipe.model, **facts).save_pretrained(tmp_path / "model")
    assert "was trained with aaaaaaaaaaaa; import the texts with the tokenizer" in message(tmp_path)


def test_command_line(run: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *arguments]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    good = call("--run", str(run), "--set", "seed=7")
    assert good.returncode == 0, good.stderr
    assert "word -> region, by plan" in good.stdout
    assert json.loads((run / "summary.json").read_text())["seed"] == 7
    bad = call("--run", str(tmp_path))
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("evaluate: error: ")
