"""``vlscale plan``: what it prints and writes, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from vlscale import cli

ROOT = Path(__file__).resolve().parents[2]
Capture = pytest.CaptureFixture[str]
BASE = {
    "--recipe": ROOT / "launch/recipes/uniter_base.yaml",
    "--ds_config": ROOT / "ds_configs/uniter_base_v100.json",
    "--gpu": "v100-32",
    "--gpus": 8,
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "plan", ("vlscale.plan.command", "memory, time and cost before a run"))


def plan(*more: object, **changes: object) -> int:
    options = BASE | {f"--{name}": value for name, value in changes.items()}
    words = [str(word) for pair in options.items() for word in pair]
    return cli.main(["plan", *words, *map(str, more)])


def plan_json(capsys: Capture, *more: object, status: int = 0, **changes: object) -> Any:
    assert plan("--json", *more, **changes) == status
    return json.loads(capsys.readouterr().out)


def complaint(capsys: Capture, *more: object, **changes: object) -> str:
    with pytest.raises(SystemExit) as caught:
        plan(*more, **changes)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vlscale plan: error: ")
    assert err.count("\n") == 1, err
    return err


def test_json_adds_up(capsys: Capture) -> None:
    found = plan_json(capsys)
    memory, time, batch, flops = found["memory"], found["time"], found["batch"], found["flops"]
    assert found["parameters"] > 110e6
    parts = ("weights", "gradients", "step_copy", "optimizer")
    assert memory["model_states"] == sum(memory[part] for part in parts)
    assert memory["fits"]
    assert memory["peak"] < memory["capacity"] == 31.74 * 2**30
    assert batch["accumulation"] == 2
    assert flops["per_step"] == pytest.approx(flops["per_token"] * batch["tokens_per_step"])
    total = time["compute_s"] + time["straggler_s"] + time["optimizer_s"] + found["traffic"]["exposed_s"]
    assert time["step_s"] == pytest.approx(total)
    assert time["mfu"] == pytest.approx(flops["per_step"] / (time["step_s"] * 8 * 125e12))
    assert 0 < time["mfu"] < 0.6
    assert time["gpu_hours"] == pytest.approx(time["step_s"] * 200_000 * 8 / 3600)
    assert time["days"] == pytest.approx(time["gpu_hours"] / 8 / 24)
    assert found["published"] == {"gpu": "V100", "hours": 882.0, "days": 4.5}
    assert any("60% of the peak" in line for line in found["assumptions"])
    assert any("recipe's data are not here" in line for line in found["assumptions"])
    assert "NVIDIA V100 data sheet" in found["gpu_sources"]["memory_gb_s"]


def test_a_table_says_what_is_assumed(capsys: Capture) -> None:
    assert plan() == 0
    out = capsys.readouterr().out
    for words in ("optimiser states", "logits and loss", "days for 200,000 steps", "Assumed, not measured:", "fits"):
        assert words in out
    assert "change:" not in out


@pytest.mark.parametrize(
    ("name", "gpus", "words", "hours"),
    [("base", 8, "882 V100-hours, about 4.5 days", 882.0), ("large", 16, "3,645 V100-hours, about 10 days", 3645.0)],
)
def test_the_published_costs_stand_beside(capsys: Capture, name: str, gpus: int, words: str, hours: float) -> None:
    ours = {"recipe": f"launch/recipes/uniter_{name}.yaml", "ds_config": f"ds_configs/uniter_{name}_v100.json"}
    options: dict[str, object] = {key: ROOT / path for key, path in ours.items()}
    reference = [
        word
        for value in ("mode=reference", f"reference_batches={4 * gpus}", "global_batch_tokens=null")
        for word in ("--set", f"batch.{value}")
    ]
    assert plan(*reference, gpus=gpus, **options) == 0
    assert words in " ".join(capsys.readouterr().out.split())
    found = plan_json(capsys, *reference, gpus=gpus, **options)
    assert found["published"]["hours"] == hours
    assert found["time"]["gpu_hours"] < hours  # a bound from what the hardware allows


def test_checkpointing_and_efficiency_change_what_they_should(capsys: Capture) -> None:
    plain = plan_json(capsys)
    again = plan_json(capsys, "--set", "activation_checkpointing=full")
    assert again["memory"]["peak"] < 0.6 * plain["memory"]["peak"]
    assert again["time"]["recompute_s"] == pytest.approx(again["time"]["compute_s"] / 4, rel=0.02)
    assert again["flops"] == plain["flops"]
    fast = plan_json(capsys, "--matmul-efficiency", 0.9)
    assert fast["time"]["step_s"] < plain["time"]["step_s"]
    assert any("90% of the peak" in line for line in fast["assumptions"])


def test_what_does_not_fit_is_status_1_with_cures(capsys: Capture, tmp_path: Path) -> None:
    own = tmp_path / "small.yaml"
    own.write_text(
        "{memory_gib: 4, fp16_tflops: 65, bf16_tflops: null, fp32_tflops: 8.1, memory_gb_s: 300, link_gb_s: 12, "
        "gpus_per_node: 4, network_gb_s: 3}"
    )
    found = plan_json(capsys, status=1, gpu=own)
    assert not found["memory"]["fits"]
    assert found["cures"][0].startswith("batch.micro_batch_tokens ")
    tokens = found["cures"][0].split()[1]
    assert plan_json(capsys, "--set", f"batch.micro_batch_tokens={tokens}", gpu=own)["memory"]["fits"]
    assert plan(gpu=own) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "change: activation_checkpointing: full" in out


def test_sweep_and_plot(capsys: Capture, tmp_path: Path) -> None:
    picture = tmp_path / "scaling.png"
    found = plan_json(capsys, "--sweep", "--plot", picture, gpus="4,8")
    settings = {
        (row["gpus"], row["stage"], row["activation_checkpointing"], row["micro_batch_tokens"])
        for row in found["sweep"]
    }
    assert len(settings) == len(found["sweep"]) == 2 * 3 * 2 * 3
    assert {row["accumulation"] for row in found["sweep"]} >= {2, 4}
    assert [row["gpus"] for row in found["scaling"]] == [2**power for power in range(12)]
    speeds = [row["tokens_per_s"] for row in found["scaling"][:4]]
    assert speeds == sorted(speeds)
    assert found["scaling"][10]["mfu"] < found["scaling"][0]["mfu"]
    assert imread(picture).shape[1] > 600
    assert plan("--sweep") == 0
    out = capsys.readouterr().out
    assert out.count("*") >= 2
    assert "exposed s" in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "v100-23"}, "did you mean 'v100-32'"),
        ({"gpu": "no.yaml"}, "cannot be read"),
        ({"gpus": 0}, "expected a whole number from 1"),
        ({"gpus": -3}, "--gpus -3: expected a whole number"),
        ({"gpus": "eight"}, "expected a whole number from 1"),
        ({"gpus": 10**7}, "expected a whole number from 1"),
        ({"gpus": "2,4"}, "several numbers need --sweep"),
        ({"gpus": 20000}, "more processes than examples in a step"),
        ({"recipe": "no/such.yaml"}, "cannot be read"),
        ({"recipe": ROOT / "ds_configs/README.md"}, "recipe"),
        ({"ds_config": "no/such.json"}, "cannot be read"),
        ({"ds_config": ROOT / "launch/recipes/demo.yaml"}, "not valid JSON"),
        ({"plot": "a.pdf"}, "ends in .png"),
        ({"plot": "no/such/a.png"}, "is no folder"),
        ({"set": "model.preset=uniter-bose"}, "did you mean 'uniter-base'"),
        ({"set": "batch.micro_batch_tokens=20"}, "micro_batch_tokens 20 is smaller than one example"),
        ({"matmul-efficiency": 1.5}, "above 0, up to 1"),
        ({"matmul-efficiency": "nan"}, "above 0, up to 1"),
        ({"write": "a.yaml"}, "with --probe only"),
        ({"gpu": "here"}, "needs --calibration"),
        ({"calibration": "costs.json", "matmul-efficiency": 0.5}, "--matmul-efficiency is not read beside"),
        ({"gpu": "here", "calibration": "costs.json"}, "--gpus 8: --gpu here plans one process"),
        ({"gpu": "here", "gpus": 1, "calibration": "costs.json", "plot": "a.png"}, "--plot: --gpu here plans one"),
        ({"calibration": "no/such.json"}, "cannot be read"),
        ({"calibration": ROOT / "launch/recipes/demo.yaml"}, "not JSON"),
    ],
)
def test_mistakes_are_one_line(capsys: Capture, changes: dict[str, object], said: str) -> None:
    assert said in complaint(capsys, **changes)


def test_bf16_on_a_v100_is_refused(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "bf16.json"
    path.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 1}}')
    assert "has no bf16" in complaint(capsys, ds_config=path)
    assert plan_json(capsys, ds_config=path, gpu="a100-40")["memory"]["fits"]


def test_a_sweep_tells_what_cannot_be_run(capsys: Capture) -> None:
    assert plan("--sweep", gpus="8,20000") == 0
    assert "more processes than examples in a step" in " ".join(capsys.readouterr().out.split())
