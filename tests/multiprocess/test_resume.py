"""Going on from a checkpoint equals never having stopped: bit by bit, after every step, dropout on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.multiprocess.launcher import all_well, run_many
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 12
FP16 = {"enabled": True, "initial_scale_power": 16, "hysteresis": 1, "loss_scale_window": 2}
CASES: dict[str, tuple[int, dict[str, Any], range]] = {
    "zero2": (2, {}, range(1, STEPS)),
    "zero0": (0, {}, range(5, STEPS, 5)),
    "zero3": (3, {}, range(3, STEPS, 4)),
    "zero1_bf16": (1, {"bf16": {"enabled": True}}, range(5, STEPS, 5)),
    "zero2_fp16": (2, {"fp16": FP16}, range(2, STEPS, 3)),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case, run 12 steps with a checkpoint after each, and go on from the chosen ones in new folders."""
    root = tmp_path_factory.mktemp("resume")
    write_data(root)
    schedule = {"warmup_steps": 2, "total_steps": STEPS}
    content = recipe(root, schedule=schedule, checkpoint={"every": 1, "keep": 100})
    paths = ["--recipe", str(write_recipe(root / "small.yaml", content))]
    lines = []
    for name, (stage, more, stops) in CASES.items():
        case = [*paths, "--ds_config", str(write_ds_config(root / f"small_{name}.json", stage, **more))]
        lines.append([*case, "--run_dir", str(root / name)])
        for stop in stops:
            source = root / name / "checkpoints" / f"step-{stop}"
            again = ["--run_dir", str(root / f"{name}-{stop}"), "--resume", str(source), "--set", "checkpoint.every=0"]
            lines.append([*case, *again])
    all_well(run_many(lines, root / "todo.json", 2, VLSCALE_TEST_FP16="1"))
    return root


def rows(run: Path) -> dict[int, dict[str, float]]:
    """step -> losses, norms and loss scales of a training step."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    changing = ("time", "speed/", "memory/", "batch/")
    return {
        row["step"]: {key: value for key, value in row.items() if not key.startswith(changing)}
        for row in found
        if "lr" in row
    }


@pytest.mark.parametrize(("case", "stop"), [(case, stop) for case, (*_, stops) in CASES.items() for stop in stops])
def test_losses_and_weights_are_bit_equal(root: Path, case: str, stop: int) -> None:
    first, second = rows(root / case), rows(root / f"{case}-{stop}")
    assert list(second) == [step for step in first if step > stop]
    assert second == {step: row for step, row in first.items() if step > stop}
    weights, again = (load_file(root / run / "model" / "model.safetensors") for run in (case, f"{case}-{stop}"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


def test_dropout_was_on_and_tasks_alternated(root: Path) -> None:
    saved = json.loads((root / "zero2" / "model" / "config.json").read_text(encoding="utf-8"))
    assert saved["hidden_dropout"] > 0
    tasks = [row["task"] for row in rows(root / "zero2").values()]
    assert len(tasks) == STEPS
    assert len(set(tasks)) >= 3


def test_fp16_skipped_steps_and_kept_a_scale_per_task(root: Path) -> None:
    found = rows(root / "zero2_fp16")
    assert max(found) > STEPS, "no step was skipped: the test no longer covers what it is for"
    assert max(row["taken"] for row in found.values()) == STEPS
    last = {row["task"]: row[f"{row['task']}/loss_scale"] for row in found.values()}
    assert len(set(last.values())) > 1, last
    rates = [row["lr"] for row in found.values() if row["taken"] == 1]
    assert len(set(rates)) <= 2, "a skipped step moved the schedule"


def test_auto_takes_the_newest_valid_and_refuses_what_does_not_fit(root: Path) -> None:
    damaged, other = root / "damaged", root / "zero2-3"
    (damaged / "checkpoints").mkdir(parents=True)
    for step in (6, 7, 8):
        shutil.copytree(root / "zero2" / "checkpoints" / f"step-{step}", damaged / "checkpoints" / f"step-{step}")
    flip(next((damaged / "checkpoints" / "step-8").glob("*rank_1*optim_states.pt")))
    (damaged / "checkpoints" / "step-7" / "manifest.json").write_text("{", encoding="utf-8")
    paths = ["--recipe", str(root / "small.yaml"), "--ds_config", str(root / "small_zero2.json")]
    zero1 = ["--recipe", str(root / "small.yaml"), "--ds_config", str(root / "small_zero0.json")]
    step_6 = str(root / "zero2" / "checkpoints" / "step-6")
    lines = [
        [*paths, "--run_dir", str(damaged), "--resume", "none"],
        [*paths, "--run_dir", str(other), "--resume", step_6],
        [*zero1, "--run_dir", str(root / "stage"), "--resume", step_6],
        [*paths, "--run_dir", str(root / "wide"), "--resume", step_6, "--set", "model.config.hidden_size=64"],
        [*paths, "--run_dir", str(root / "seed"), "--resume", step_6, "--set", "seed=4"],
        [*paths, "--run_dir", str(root / "data"), "--resume", step_6, "--set", f"data.datasets.0.root={root / 'val'}"],
        [*paths, "--run_dir", str(root / "program"), "--resume", str(hostile(root))],
        [*paths, "--run_dir", str(damaged), "--resume", "auto", "--set", "checkpoint.every=0"],
        [*paths, "--run_dir", str(root / "zero2"), "--resume", "auto"],
    ]
    (root / "zero2" / "model" / "model.safetensors").rename(root / "taken_away.safetensors")
    results = run_many(lines, root / "refused.json", 2)
    expected = [
        "holds checkpoints (newest: step-8); go on from them with --resume auto",
        "holds checkpoints of another run",
        "written with ZeRO stage 2, this run has 0",
        "the model has hidden_size 32, the recipe says 64",
        "a changed recipe (seed)",
        "a changed data set on resume",
        "DeepSpeed cannot load it: Weights only load failed",
    ]
    for line, text in enumerate(expected):
        assert [results[rank][line]["status"] for rank in (0, 1)] == [2, 2]
        assert text in results[0][line]["err"]
        assert results[0][line]["err"].count("\n") == 1
        assert results[1][line]["err"] == "", "only the main process speaks"
    all_well([results[rank][len(expected) :] for rank in (0, 1)])
    log = (damaged / "train.log").read_text(encoding="utf-8")
    assert "step-8" in log
    assert "its sha256 is not the manifest's" in log
    assert "resumed from" in log
    assert "step-6: 6 steps taken" in log
    assert rows(damaged) == {step: row for step, row in rows(root / "zero2").items() if step > 6}
    assert not (root / "executed").exists(), "a checkpoint ran code"
    log = (root / "zero2" / "train.log").read_text(encoding="utf-8")
    assert "all 12 steps have been taken" in log
    exported, before = (
        load_file(root / "zero2" / "model" / "model.safetensors"),
        load_file(root / "taken_away.safetensors"),
    )
    assert all(torch.equal(exported[name], tensor) for name, tensor in before.items())


def test_another_number_of_processes_is_refused(root: Path) -> None:
    paths = ["--recipe", str(root / "small.yaml"), "--ds_config", str(root / "small_zero2.json")]
    step_6 = str(root / "zero2" / "checkpoints" / "step-6")
    ((result,),) = run_many([[*paths, "--run_dir", str(root / "alone"), "--resume", step_6]], root / "alone.json", 1)
    assert result["status"] == 2
    assert "written with processes 2, this run has 1" in result["err"]


def hostile(root: Path) -> Path:
    """A checkpoint whose hashes are right, and that would create a file when it is unpickled."""

    class Program:
        def __reduce__(self) -> Any:
            return Path.touch, (root / "executed",)

    folder = root / "hostile" / "step-6"
    shutil.copytree(root / "zero2" / "checkpoints" / "step-6", folder)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": Program()}, path)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][path.name] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
