"""Checkpoints are whole or not there; what is loaded has been verified. The engine is a stand-in that writes files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlscale.errors import VlscaleError
from vlscale.train.checkpoint import Checkpoints, read_manifest, recipe_changes
from vlscale.train.processes import Processes

FACTS: dict[str, Any] = {
    "precision": "fp32",
    "fingerprint": "seed=1",
    "trainer": {"taken": 3},
    "recipe": {"name": "x"},
    "model": {"hidden_size": 8},
}


class Alone(Processes):
    """A run of one process, without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"))

    def gather(self, item: Any) -> list[Any]:
        return [item]

    def total(self, values: Any) -> list[float]:
        return list(values)


class FakeEngine:
    """Writes two files as DeepSpeed would."""

    stage = 2

    def __init__(self, content: bytes = b"state") -> None:
        self.content = content
        self.loaded: list[Path] = []

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        (folder / tag / "mp_rank_00_model_states.pt").write_bytes(self.content)
        (folder / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(self.content * 2)

    def load(self, folder: Path, tag: str) -> None:
        self.loaded.append(folder / tag)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, said: list[str]) -> Checkpoints:
    (tmp_path / "checkpoints").mkdir()
    return Checkpoints(tmp_path / "checkpoints", Alone(), 2, said.append)


def save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(FakeEngine(f"state {step}".encode()), step, FACTS)  # type: ignore[arg-type]


def test_a_saved_checkpoint_is_found_and_says_what_was_saved(checkpoints: Checkpoints) -> None:
    folder = save(checkpoints, 3)
    found = checkpoints.find("auto")
    assert found is not None
    assert found[0] == folder
    manifest = found[1]
    assert manifest.step == 3
    assert manifest.trainer == {"taken": 3}
    assert manifest.world_size == 1
    assert manifest.zero_stage == 2
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert (checkpoints.folder / "latest").read_text(encoding="utf-8") == "step-3\n"


def test_only_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    (checkpoints.folder / "step-7.tmp").mkdir()
    for step in (2, 9, 10):
        save(checkpoints, step)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["latest", "step-10", "step-9"]


def test_saving_a_step_again_replaces_it(checkpoints: Checkpoints) -> None:
    save(checkpoints, 4)
    checkpoints.save(FakeEngine(b"new"), 4, FACTS)  # type: ignore[arg-type]
    assert (checkpoints.folder / "step-4" / "mp_rank_00_model_states.pt").read_bytes() == b"new"
    assert checkpoints.find("auto") is not None


def test_without_checkpoints_a_run_starts_afresh(checkpoints: Checkpoints) -> None:
    assert checkpoints.find("none") is None
    assert checkpoints.find("auto") is None
    (checkpoints.folder / "step-7.tmp").mkdir()
    assert checkpoints.find("none") is None, "an unfinished checkpoint is none"


def test_a_folder_with_checkpoints_is_not_started_afresh(checkpoints: Checkpoints) -> None:
    save(checkpoints, 4)
    with pytest.raises(VlscaleError, match=r"holds checkpoints \(newest: step-4\).*--resume auto"):
        checkpoints.find("none")


def damage_flip(folder: Path) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    path.write_bytes(b"S" + path.read_bytes()[1:])


def damage_cut(folder: Path) -> None:
    path = folder / "mp_rank_00_model_states.pt"
    path.write_bytes(path.read_bytes()[:-1])


def damage_remove(folder: Path) -> None:
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()


def damage_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


DAMAGE = [damage_flip, damage_cut, damage_remove, damage_manifest, damage_no_manifest]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over(checkpoints: Checkpoints, said: list[str], damage: Any) -> None:
    save(checkpoints, 4)
    damage(save(checkpoints, 5))
    found = checkpoints.find("auto")
    assert found is not None
    assert found[0].name == "step-4"
    assert len(said) == 1
    assert "step-5" in said[0]


@pytest.mark.parametrize("damage", DAMAGE)
def test_if_none_is_valid_nothing_is_started(checkpoints: Checkpoints, damage: Any) -> None:
    folder = save(checkpoints, 5)
    damage(folder)
    with pytest.raises(VlscaleError, match=r"none of the 1 checkpoints is valid"):
        checkpoints.find("auto")
    with pytest.raises(VlscaleError, match=r"step-5"):
        checkpoints.find(str(folder))


def test_one_that_is_named_is_taken(checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, 4)
    save(checkpoints, 5)
    found = checkpoints.find(str(checkpoints.folder / "step-4"))
    assert found is not None
    assert found[1].step == 4
    other = Checkpoints(tmp_path / "other", Alone(), 2, print)
    assert other.find(str(checkpoints.folder / "step-4")) is not None
    with pytest.raises(VlscaleError, match=r"cannot be read"):
        other.find(str(tmp_path / "nothing"))
    shutil.copytree(checkpoints.folder / "step-5", tmp_path / "other" / "step-5")
    with pytest.raises(VlscaleError, match=r"holds checkpoints of another run"):
        other.find(str(checkpoints.folder / "step-4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 2}, r"written with processes 2, this run has 1"),
        ({"zero_stage": 3}, r"written with ZeRO stage 3, this run has 2"),
        ({"precision": "bf16"}, r"written with precision bf16, this run has fp32"),
        ({"model": {"hidden_size": 16}}, r"the model has hidden_size 16, the recipe says 8"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoints: Checkpoints, change: dict[str, Any], message: str) -> None:
    folder = save(checkpoints, 4)
    path, engine = folder / "manifest.json", FakeEngine()
    raw = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(VlscaleError, match=message):
        checkpoints.load(engine, folder, read_manifest(folder), "fp32", FACTS["model"])  # type: ignore[arg-type]
    assert not engine.loaded


def test_what_fits_is_loaded(checkpoints: Checkpoints) -> None:
    folder, engine = save(checkpoints, 4), FakeEngine()
    checkpoints.load(engine, folder, read_manifest(folder), "fp32", FACTS["model"])  # type: ignore[arg-type]
    assert engine.loaded == [folder]


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "a/b.pt", "..", ".hidden", "nul\0", "x" * 300])
def test_a_manifest_cannot_name_files_elsewhere(checkpoints: Checkpoints, name: str) -> None:
    folder = save(checkpoints, 4)
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["files"][name] = [1, "0" * 64]
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(VlscaleError, match=r"outside its folder"):
        read_manifest(folder)


def test_a_link_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = save(checkpoints, 4)
    target = folder / "mp_rank_00_model_states.pt"
    os.rename(target, tmp_path / "away.pt")
    target.symlink_to(tmp_path / "away.pt")
    with pytest.raises(VlscaleError, match=r"outside its folder"):
        read_manifest(folder)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from(["version", "step", "files", "trainer", "recipe", "model", "world_size", "precision"]),
)
def test_a_manifest_of_nonsense_is_one_error(tmp_path_factory: pytest.TempPathFactory, value: Any, key: str) -> None:
    folder = tmp_path_factory.mktemp("nonsense")
    raw = {"version": 1, "step": 1, "world_size": 1, "zero_stage": 1, "files": {"a.pt": [1, "00"]}, **FACTS, key: value}
    (folder / "manifest.json").write_text(json.dumps(raw), encoding="utf-8")
    with contextlib.suppress(VlscaleError):
        read_manifest(folder)


def test_changes_of_the_recipe_are_named() -> None:
    old = {"seed": 1, "optimizer": {"lr": 0.1, "eps": 1}, "gone": 2}
    new = {"seed": 1, "optimizer": {"lr": 0.2, "eps": 1}}
    assert recipe_changes(old, new) == ["gone: 2 -> None", "optimizer.lr: 0.1 -> 0.2"]
