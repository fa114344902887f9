"""Bad input ends in one clear line and a non-zero status; so does training that has gone wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.damage import patch
from tests.helpers import make_dataset
from tests.multiprocess.launcher import launch, run_many
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe
from vlscale.data.dataset import open_dataset

pytestmark = pytest.mark.multiprocess


def overwrite_feature(root: Path, number: float) -> None:
    """Put a number into the last feature of one image; sizes and hashes agree with it."""
    reader = open_dataset("toy", root).images._reader
    patch(root / "images", reader, len(reader) // 2, "features", -2, np.float16(number).tobytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def escape(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["shards"][0]["raw_data"]["basename"] = "../../secret.mds"
    path.write_text(json.dumps(raw), encoding="utf-8")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.mds"))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing_store": (lambda root: shutil.rmtree(root / "images"), "images is no folder"),
    "missing_shard": (lambda root: first_shard(root / "texts").unlink(), "shard.00000.mds"),
    "renamed_shard": (lambda root: first_shard(root / "texts").rename(root / "texts" / "a.mds"), "shard.00000.mds"),
    "truncated_shard": (lambda root: cut(first_shard(root / "texts")), "shard.00000.mds"),
    "truncated_index": (lambda root: cut(root / "images" / "index.json"), "index.json"),
    "truncated_lengths": (lambda root: cut(root / "images" / "lengths.npy"), "lengths.npy"),
    "escaping_index": (lambda root: escape(root / "texts" / "index.json"), "index.json"),
    "nan_features": (lambda root: overwrite_feature(root, float("nan")), "features contain NaN"),
    "no_classes": (lambda root: shutil.rmtree(root / "classes"), "class probabilities"),
}
SETTINGS: dict[str, tuple[list[str], str]] = {
    "misspelt_key": (["--set", "optimiser.lr=1"], "unknown key 'optimiser'; did you mean 'optimizer'"),
    "ceiling": (["--set", "batch.micro_batch_tokens=20"], "micro_batch_tokens 20 is smaller than one"),
    "width": (["--set", "model.config.feature_dim=16"], "feature_dim"),
    "model_key": (["--set", "model.config.hiden_size=32"], "did you mean 'hidden_size'"),
    "gpu": (["--device", "gpu"], "a GPU is asked for"),
    "missing_recipe": (["--recipe", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    "init_from": (["--set", "model.init_from=nowhere"], "model.init_from: no such folder nowhere"),
    "exploding": (["--set", "optimizer.lr=1e30"], "the gradient of objective"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "json_key": ({"zero_optimization": {"stge": 1}}, "did you mean 'stage'"),
    "json_number": ({"gradient_accumulation_steps": 77}, "contradicts the plan"),
    "json_fp16": ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "this runs on a CPU"),
    "exploding_bf16": ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "the gradient of objective"),
    "json_optimizer": ({"optimizer": {"type": "Adam"}}, "the recipe owns it"),
}
CASES = [*DAMAGED, *SETTINGS, *CONFIGS, "no_recipe"]
EXPECTED = {name: text for table in (DAMAGED, SETTINGS, CONFIGS) for name, (_, text) in table.items()} | {
    "no_recipe": "no recipe belongs to this name"
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad_input")
    write_data(root)
    content = recipe(root, schedule={"warmup_steps": 0, "total_steps": 12})
    write_recipe(root / "small.yaml", content)
    write_ds_config(root / "small_cpu.json", 2)
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, dict[str, Any]]:
    """What became of each case, all run in one process."""
    lines = {}
    good = ["--ds_config", str(root / "small_cpu.json"), "--recipe", str(root / "small.yaml")]
    for name, (damage, _) in DAMAGED.items():
        data = root / "damaged" / name
        shutil.copytree(root / "train", data)
        damage(data)
        lines[name] = [*good, "--set", f"data.datasets.0.root={data}"]
    for name, (more, _) in SETTINGS.items():
        lines[name] = [*good, *more]
    for name, (raw, _) in CONFIGS.items():
        path = root / f"small_{name}.json"
        path.write_text(json.dumps(raw), encoding="utf-8")
        lines[name] = ["--ds_config", str(path), *good[2:], "--set", "optimizer.lr=1e30"]
    lines["no_recipe"] = good[:2]
    words = [[*line, "--run_dir", str(root / f"run_{name}")] for name, line in lines.items()]
    (found,) = run_many(words, root / "todo.json", 1)
    return dict(zip(lines, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_is_wrong(results: dict[str, dict[str, Any]], case: str) -> None:
    found = results[case]
    assert found["status"] == 2, found["err"]
    assert EXPECTED[case] in found["err"]
    assert found["err"].startswith("pretrain: error: ")
    assert found["err"].count("\n") == 1


def test_the_diagnosis_names_objective_layer_rank_and_cure(results: dict[str, dict[str, Any]]) -> None:
    text = results["exploding"]["err"]
    assert "rank 0: loss term" in text
    assert "parameters, first" in text
    assert "lower optimizer.lr" in text


def test_a_collapsed_loss_scale_names_the_skipped_steps(root: Path) -> None:
    scale = {"enabled": True, "initial_scale_power": 1, "hysteresis": 1}
    config = write_ds_config(root / "small_fp16.json", 2, fp16=scale)
    words = ["--ds_config", config, "--recipe", root / "small.yaml", "--run_dir", root / "run_fp16"]
    line = [*map(str, words), "--set", "optimizer.lr=1e30"]
    ((found,),) = run_many([line], root / "fp16.json", 1, VLSCALE_TEST_FP16="1")
    assert found["status"] == 2
    for text in ("loss scale 1 cannot go lower; steps skipped so far: ", "the gradient of objective", "first"):
        assert text in found["err"]


def test_under_the_launcher_too(root: Path, tmp_path: Path) -> None:
    """More processes than examples, found by both; printed once, and no traceback anywhere."""
    words = ["--ds_config", root / "small_cpu.json", "--recipe", root / "small.yaml", "--run_dir", tmp_path / "run"]
    changes = ["--set", "batch.global_batch_examples=4"]
    done = launch("launch/pretrain.py", *words, *changes)
    assert done.status != 0
    text = done.out + done.err
    assert text.count("pretrain: error: ") == 1
    assert "more processes than examples in a step: 2 processes" in text
    assert "Traceback" not in text


def test_a_bad_row_that_one_process_meets_stops_both(root: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", images=40, texts_per_image=3, seed=0)
    overwrite_feature(tmp_path / "data", float("inf"))
    words = ["--ds_config", root / "small_cpu.json", "--recipe", root / "small.yaml", "--run_dir", tmp_path / "run"]
    changes = ["--set", f"data.datasets.0.root={tmp_path / 'data'}", "--set", "data.workers=1"]
    done = launch("launch/pretrain.py", *words, *changes)
    assert done.status != 0
    text = done.out + done.err
    assert text.count("pretrain: error: ") == 1
    assert "features contain NaN or infinity" in text
    assert "Traceback" not in text
