"""Shipped recipes train under the DeepSpeed JSONs that are shipped for them: a small model, two processes on a CPU.

The pairs have every ZeRO setting, every kind of recipe, and JSONs that do not clip. The other JSONs differ from these
in the clip alone, as ``tests/launch/test_recipes.py`` makes sure.

Recipes and JSONs are the files as they are; only what the machine and the data decide is set: paths, the model's size,
the batch, the number of steps. fp16 runs too: DeepSpeed is told that this CPU can do it (see runs_worker).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.launch.clusters import DS_CONFIGS, RECIPES, recipe_of
from tests.multiprocess.launcher import all_well, run_many
from tests.multiprocess.recipes import write_data
from tests.unified_data import write_unified
from vlscale.train.ds_config import read_ds_config

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 3
SMALL = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64"
PAIRS = {
    "uniter_base_indomain_v100": "uniter_base_indomain",
    "uniter_large_vcr_v100": "uniter_large_vcr",
    "uniter_base_vcr_a100_h100": "uniter_base_vcr",
    "uniter_large_a100_h100": "uniter_large",
    "unimo_base_v100": "unimo_base",
    "unimo_large_a100_h100": "unimo_large",
}
"""DeepSpeed JSON -> recipe."""


def overrides(name: str, root: Path) -> list[str]:
    """What the machine and the data decide."""
    data, unimo = recipe_of(name).data, name.startswith("unimo")
    roots = [root / (dataset.kind or "train") for dataset in data.datasets]
    settings = {
        "model.preset": "null",
        "model.init_from": "null",
        "model.config": f"{{{SMALL}{'' if unimo else ', type_vocab_size: 4'}}}",
        **{f"data.datasets.{number}.root": folder for number, folder in enumerate(roots)},
        "data.validation": "[]",
        "data.workers": 0,
        "batch.global_batch_tokens": 3600 if unimo else 900,
        "batch.micro_batch_tokens": 1200 if unimo else 320,
        "schedule.warmup_steps": 1,
        "schedule.total_steps": STEPS,
        "logging.tensorboard": "false",
        "logging.every": 1,
    }
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the pairs in one group of processes."""
    root = tmp_path_factory.mktemp("shipped")
    write_data(root)
    write_unified(root)
    lines = []
    for stem, name in PAIRS.items():
        files = ["--ds_config", str(DS_CONFIGS / f"{stem}.json"), "--recipe", str(RECIPES / f"{name}.yaml")]
        lines.append([*files, "--run_dir", str(root / stem), *overrides(name, root)])
    all_well(run_many(lines, root / "lines.json", 2, VLSCALE_TEST_FP16="1"))
    return root


@pytest.mark.parametrize("stem", PAIRS)
def test_a_shipped_pair_trains(root: Path, stem: str) -> None:
    lines = (root / stem / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "speed/tokens_per_s" in row]
    assert steps[-1]["taken"] == STEPS
    losses, norms = (
        [value for row in steps for key, value in row.items() if key.endswith(end)] for end in ("/loss", "/grad_norm")
    )
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    # A first loss scale that is too large skips a step; it is then halved.
    assert sum(math.isfinite(norm) and norm > 0 for norm in norms) == STEPS
    used = json.loads((root / stem / "ds_config.json").read_text(encoding="utf-8"))
    settings = read_ds_config(DS_CONFIGS / f"{stem}.json")
    assert used["zero_optimization"] == settings.raw["zero_optimization"]
    assert used["gradient_accumulation_steps"] > 1, "accumulation is what the stages differ in"
