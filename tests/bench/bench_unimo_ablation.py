"""UNIMO's parts, each left out of the demo's training: held-out retrieval, captions and masked words with and without.

Every variant starts from the same weights, sees the same number of pairs in each of the same number of steps, and is
asked the same questions. One seed each: the intervals tell how sure a figure is about the questions, not about the
training. Where a part does not help at this size, the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.multiprocess.launcher import free_port
from vlscale.config import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE, DS_CONFIG = ROOT / "launch/recipes/demo_unimo.yaml", ROOT / "ds_configs/demo_unimo_cpu.json"
COLUMNS = {
    "i2t_r1": "i>t R@1",
    "i2t_r10": "R@10",
    "t2i_r1": "t>i R@1",
    "t2i_r10": "R@10",
    "caption_bleu4": "BLEU-4",
    "caption_cider": "CIDEr",
    "text_accuracy": "words",
}
CONTRAST = "objectives.unified.contrast"


@dataclass(frozen=True)
class Setting:
    """Size of the measurement.

    Attributes:
        data: what ``data_tools.build_demo_unimo`` has written.
        steps: of each variant's training.
        processes: that train it.
        overrides: of the demo's recipe, for all variants.
    """

    data: str = "runs/demo_unimo/data"
    steps: int = 500
    processes: int = 2
    overrides: tuple[str, ...] = ()


def variants(setting: Setting) -> dict[str, list[str]]:
    """Overrides of the demo's recipe by the name of the variant; ``full`` has none."""
    recipe = load_recipe(RECIPE, setting.overrides)
    units = recipe.batch.global_batch_examples
    shares = {dataset.name: dataset.mix["unified"] for dataset in recipe.data.datasets}
    assert units is not None
    pairs = round(units * shares["pairs"] / sum(shares.values()))
    only = f"[{{name: pairs, root: {setting.data}/pairs, mix: {{unified: 1}}}}]"
    return {
        "full": [],
        "without rewrites": [f"{CONTRAST}.positives=0", f"{CONTRAST}.negatives=0"],
        "without retrieved": [f"{CONTRAST}.images=0", f"{CONTRAST}.texts=0"],
        # what is retrieved are rows of the two datasets that this one leaves out
        "without texts and images": [
            f"data.datasets={only}",
            f"batch.global_batch_examples={pairs}",
            f"{CONTRAST}.images=0",
            f"{CONTRAST}.texts=0",
        ],
    }


def common(setting: Setting) -> list[str]:
    """Overrides of every variant."""
    recipe = load_recipe(RECIPE, setting.overrides)
    warmup = min(recipe.schedule.warmup_steps, setting.steps // 5)
    datasets = ", ".join(
        f"{{name: {each.name}, root: {setting.data}/{each.name}, mix: {{unified: {each.mix['unified']}}}}}"
        for each in recipe.data.datasets
    )
    validation = ", ".join(f"{{name: {name}, root: {setting.data}/{name}}}" for name in ("val_pairs", "val_texts"))
    return [
        f"data.datasets=[{datasets}]",
        f"data.validation=[{validation}]",
        f"schedule={{warmup_steps: {warmup}, total_steps: {setting.steps}}}",
        "checkpoint.every=0",
        "evaluation.every=0",
        *setting.overrides,
    ]


def train(run: Path, overrides: Sequence[str], processes: int) -> float:
    """Train and evaluate in new processes; return the seconds that training took.

    Raises:
        RuntimeError: a command failed; its last lines are in the message.
    """
    told = [word for override in overrides for word in ("--set", override)]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes)]
    launcher += ["--master_port", str(free_port())]
    script = [str(ROOT / "launch/pretrain.py"), "--ds_config", str(DS_CONFIG), "--run_dir", str(run)]
    began = time.perf_counter()
    _call([*launcher, *script, *told])
    seconds = time.perf_counter() - began
    _call([sys.executable, str(ROOT / "launch/evaluate.py"), "--run", str(run)])
    return seconds


def _call(command: Sequence[str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")


def run(setting: Setting) -> list[dict[str, Any]]:
    """Train all variants one after the other; one row each, and one of the untrained model."""
    if not (ROOT / setting.data / "manifest.json").is_file():
        raise SystemExit(f"{setting.data}: is missing; make demo-unimo builds it")
    rows: list[dict[str, Any]] = []
    for name, overrides in variants(setting).items():
        with tempfile.TemporaryDirectory(prefix="vlscale-ablation-") as folder:
            seconds = train(Path(folder), [*common(setting), *overrides], setting.processes)
            metrics = json.loads((Path(folder) / "summary.json").read_text())["metrics"]
        if not rows:
            rows.append(_row("untrained", metrics, "untrained", 0, 0.0))
        rows.append(_row(name, metrics, "trained", setting.steps, seconds))
        print(_line(rows[-1], COLUMNS), flush=True)
    return rows


def _row(name: str, metrics: Mapping[str, Any], which: str, steps: int, seconds: float) -> dict[str, Any]:
    figures = {
        metric: {"value": told[which], "interval": told["interval"][which] if "interval" in told else None}
        for metric, told in metrics.items()
    }
    return {"variant": name, "steps": steps, "seconds": round(seconds), "metrics": figures}


def _line(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    cells = "".join(f"{row['metrics'][metric]['value']:9.3f}" for metric in columns)
    return f"{row['variant']:<26}{cells}"


def main(arguments: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Print the table; without arguments, of the demo's whole data."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_unimo_ablation")
    parser.add_argument("--smoke", action="store_true", help="four steps each: does it run?")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of each variant (%(default)s)")
    chosen = parser.parse_args(arguments)
    setting = Setting(steps=4 if chosen.smoke else chosen.steps)
    rows = run(setting)
    print(f"\n{setting.steps} steps each, on {setting.processes} processes")
    print(f"{'':<26}" + "".join(f"{name:>9}" for name in COLUMNS.values()))
    for row in rows:
        print(_line(row, COLUMNS))
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
