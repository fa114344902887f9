"""What the run folder says of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.multiprocess.recipes import recipe
from vlscale.config import load_recipe, parse_recipe
from vlscale.errors import VlscaleError
from vlscale.train.run_folder import RunFolder, hide_secrets, provenance


def test_both_configurations_and_every_start_are_kept(tmp_path: Path) -> None:
    settings = parse_recipe(recipe(tmp_path), "test")
    folder = RunFolder(tmp_path / "run")
    folder.describe(settings, {"train_batch_size": 4}, {"world_size": 2})
    folder.describe(settings, {"train_batch_size": 4}, {"world_size": 3})
    assert load_recipe(folder.path / "recipe.yaml") == settings
    assert json.loads((folder.path / "ds_config.json").read_text(encoding="utf-8")) == {"train_batch_size": 4}
    starts = json.loads((folder.path / "provenance.json").read_text(encoding="utf-8"))["starts"]
    assert [start["world_size"] for start in starts] == [2, 3]
    assert starts[0]["packages"]["torch"]
    assert not list(folder.path.glob(".*"))


def test_a_damaged_provenance_is_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "provenance.json").write_text("{", encoding="utf-8")
    folder.describe(parse_recipe(recipe(tmp_path), "test"), {}, {})
    assert len(json.loads((folder.path / "provenance.json").read_text(encoding="utf-8"))["starts"]) == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VlscaleError, match=r"run folder .*file/run: cannot be created"):
        RunFolder(tmp_path / "file" / "run")


def test_secrets_are_not_written_down() -> None:
    command = ["pretrain.py", "--set", "hub.token=abc", "--api_key", "xyz", "--hf-token=abc", "--set", "optimizer.lr=1"]
    shown = hide_secrets(command)
    assert "abc" not in " ".join(shown)
    assert "xyz" not in shown
    assert "optimizer.lr=1" in shown
    assert "data.max_text_tokens=60" in hide_secrets(["data.max_text_tokens=60"])


def test_provenance_is_json() -> None:
    found = json.loads(json.dumps(provenance(["x"])))
    assert found["command"] == ["x"]
    assert found["commit"] is None or len(found["commit"].removesuffix("+changes")) == 40
