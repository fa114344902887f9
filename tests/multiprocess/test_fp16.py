"""fp16 from a loss scale that is far too large: steps are skipped and told, the scale falls, and training learns.

On a GPU it is DeepSpeed's fp16 itself, in one process; on a CPU fp16 is emulated.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.multiprocess.launcher import all_well, launch, run_many
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe

STEPS = 60
FP16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 1000}


def _command(root: Path) -> list[str]:
    write_data(root)
    content = recipe(
        root, schedule={"warmup_steps": 2, "total_steps": STEPS}, evaluation={"examples": 16, "every": STEPS}
    )
    content["data"]["datasets"][0]["mix"] = {"mlm": 1, "mrfr": 1}
    return [
        "--recipe", str(write_recipe(root / "small.yaml", content)),
        "--ds_config", str(write_ds_config(root / "small_fp16.json", 2, fp16=FP16)),
        "--run_dir", str(root / "run"),
    ]  # fmt: skip


def _check(run: Path) -> None:
    """Skips happen at the start only, at the largest scales; lr and step follow the steps that were taken."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for task in ("mlm", "mrfr"):
        mine = [row for row in rows if f"{task}/loss_scale" in row]
        scales = [row[f"{task}/loss_scale"] for row in mine]
        assert scales[0] >= 2.0**29
        assert 1 < scales[-1] < 2.0**24
        assert mine[-1][f"{task}/skipped"] >= 6
        assert mine[-1][f"{task}/skipped"] == mine[len(mine) // 2][f"{task}/skipped"]  # none late
    losses = [row["mlm/mlm"] for row in rows if "mlm/mlm" in row]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.multiprocess
def test_emulated_on_a_cpu(tmp_path):
    all_well(run_many([_command(tmp_path)], tmp_path / "todo.json", 1, VLSCALE_TEST_FP16="1"))
    _check(tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    done = launch("launch/pretrain.py", *_command(tmp_path), processes=1, timeout=500, DS_ACCELERATOR="cuda")
    assert done.status == 0, done.tail
    _check(tmp_path / "run")
