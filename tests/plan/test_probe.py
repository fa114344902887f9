"""The probe on a CPU: budgets that fit, times that are predicted, files that are written whole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vlscale import cli
from vlscale.config import Recipe, load_recipe
from vlscale.errors import VlscaleError
from vlscale.plan.calibrate import Calibrator
from vlscale.plan.calibration import Calibration
from vlscale.plan.ladder import Ladder
from vlscale.plan.memory import FRAGMENTATION, GIB, NCCL_GIB, Withheld, Zero, state_bytes, withheld_bytes
from vlscale.plan.model import model_sizes
from vlscale.plan.predict import Assumptions, Job, predict
from vlscale.plan.probe import Allowance, Probe
from vlscale.plan.probe_command import gpu_here
from vlscale.plan.sample import Sampler
from vlscale.plan.trial import Trial, ran_out
from vlscale.plan.workload import Planner, read_source, shape_of
from vlscale.ragged import RaggedBatch

ROOT = Path(__file__).resolve().parents[2]
DEMO, DS_CONFIG = ROOT / "launch/recipes/demo.yaml", ROOT / "ds_configs/demo_cpu.json"
FIXTURE = f"data.datasets.0.root={ROOT / 'tests/fixtures/demo/train'}"
CPU, ZERO = torch.device("cpu"), Zero(1, "fp32", 4, 4)
Capture = pytest.CaptureFixture[str]
TOLERANCE = 0.15
LONGEST_S, STEPS_PER_CALIBRATION = 180, 3
"""Seconds after which no further turn begins. Whole steps are measured more often than the operations that they are
made of: these are short, and reach their least time sooner where something else runs."""
CONFIGURATIONS = {
    "as probed": (),
    "other budget and accumulation": ("batch.micro_batch_tokens=900",),
    "checkpointing": ("activation_checkpointing=full",),
    "other model": (
        "model.config.hidden_size=256", "model.config.intermediate_size=1024", "model.config.num_hidden_layers=2",
    ),
    "other tasks": ("data.datasets.0.mix={mrfr: 1, mrc: 1}",),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def demo(*overrides: str) -> Recipe:
    return load_recipe(DEMO, (FIXTURE, *overrides))


def probe_of(recipe: Recipe, limit: float = 4 * GIB, gpus: int = 1) -> Probe:
    return Probe(recipe, read_source(recipe), ZERO, gpus, CPU, limit, Allowance(20.0, 20.0))


def predicted_s(recipe: Recipe, calibration: Calibration) -> float:
    job = Job(recipe, ZERO, gpu_here(calibration, 4 * GIB), "here", 1)
    made = predict(job, Planner(recipe, read_source(recipe)), Assumptions(measured=calibration))
    return made.step_s


@pytest.mark.alone
def test_step_time_is_within_15_percent_of_measured() -> None:
    """Calibrated on the demo; other work on the machine can only add, so the least times of some turns count."""
    calibrator = Calibrator(demo(), read_source(demo()), ZERO, CPU)
    recipes = {name: demo(*overrides) for name, overrides in CONFIGURATIONS.items()}
    probes = {name: probe_of(recipe) for name, recipe in recipes.items()}
    measured = dict.fromkeys(recipes, float("inf"))
    began = time.monotonic()
    while True:
        calibration = calibrator.measure()
        for _ in range(STEPS_PER_CALIBRATION):
            for name, probe in probes.items():
                took = probe.measure(recipes[name].batch.micro_batch_tokens).step_s
                measured[name] = min(measured[name], took)
        errors = {name: predicted_s(recipe, calibration) / measured[name] - 1 for name, recipe in recipes.items()}
        if max(map(abs, errors.values())) < TOLERANCE or time.monotonic() - began > LONGEST_S:
            break
    assert max(map(abs, errors.values())) < TOLERANCE, errors
    assert measured["checkpointing"] > 1.1 * measured["as probed"]  # the configurations do differ


@pytest.mark.parametrize("task", ["mlm", "mrfr", "mrc", "itm"])
def test_a_sample_is_composed_like_the_recipes_steps(task: str) -> None:
    recipe = demo()
    planner = Planner(recipe, read_source(recipe))
    dataset, step = planner.example_step(task)
    _, load = shape_of(step, planner.source.lengths[dataset], recipe, planner.source.config)
    batch = Sampler(planner).batch(task, load.tokens)
    assert batch.tokens == load.tokens
    assert (float(batch.input_ids.numel()), float(batch.boxes.shape[0])) == (load.text, load.regions)
    positions = batch.targets.get("token_positions", batch.targets.get("region_positions"))
    targets = len(batch) if positions is None else len(positions)
    assert targets == pytest.approx(load.targets, rel=0.15)
    assert Sampler(planner).batch(task, 1).tokens < load.tokens


def test_the_budget_is_the_largest_that_fits() -> None:
    recipe = demo("batch.global_batch_examples=512")
    roomy = probe_of(recipe).search()
    assert roomy.bounded == "step"
    tokens, peak = max((tokens, peak) for tokens, peak in roomy.tried if peak is not None)
    tight = probe_of(recipe, 0.6 * peak).search()
    assert tight.bounded == "memory"
    assert tight.tokens < tokens
    largest, room = max(peak for _, peak in tight.tried if peak is not None), tight.limit - tight.withheld.total
    assert 0.9 * room < largest <= room
    assert tight.withheld.buckets == 4 * model_sizes(read_source(recipe).config)[0]  # less than a bucket of DeepSpeed's


@pytest.mark.parametrize("own", [50, 4096])
def test_where_a_whole_step_fits_a_larger_budget_of_the_recipe_stays(own: int) -> None:
    found = probe_of(demo(f"batch.micro_batch_tokens={own}")).search()
    assert found.bounded == "step"
    assert 1000 < found.largest < 2000
    assert found.tokens == max(found.largest, own)
    assert found.kept == (own == 4096)


def test_a_trial_leaves_what_a_run_needs_beside() -> None:
    """A peak that fills the room is, with all that a process of DeepSpeed adds, the limit."""
    zero, sizes, gpus, limit = Zero(1, "bf16", 4, 2), (110_000_000, 20_000_000), 8, 16.0 * GIB
    found = withheld_bytes(zero, sizes, gpus, limit, cpu=False)
    assert found.gradients == 2 * sizes[0]  # beside the float32 ones
    zero = Zero(2, "fp16", 4, 2, bucket=30_000_000, overlap=True)
    found, states = withheld_bytes(zero, sizes, gpus, limit, cpu=False), state_bytes(zero, *sizes, gpus)
    assert found.buckets == states.buckets == 2 * 2 * 30_000_000
    activations = limit - found.total - states.model_states
    whole = states.model_states + states.buckets + NCCL_GIB * GIB + (1 + FRAGMENTATION) * activations
    assert whole == pytest.approx(limit)
    assert withheld_bytes(zero, sizes, 1, limit, cpu=False).nccl == 0
    assert withheld_bytes(zero, sizes, gpus, limit, cpu=True) == Withheld(buckets=found.buckets)


def test_memory_that_runs_out_inside_a_library_only_bounds_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS says it in a plain RuntimeError; anything else is not hidden."""
    words, whole = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Trial.micro_step

    def micro_step(self: Trial, batch: RaggedBatch) -> None:
        if batch.tokens > 1200:
            raise RuntimeError(words)
        whole(self, batch)

    monkeypatch.setattr(Trial, "micro_step", micro_step)
    found = probe_of(demo()).search()
    assert 1000 < found.tokens < 1300  # batches end with whole groups of examples
    assert found.bounded == "memory"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert ran_out(caught.value)
    words = "expected scalar type Half"
    with pytest.raises(RuntimeError, match="scalar type"):
        probe_of(demo()).search()


@pytest.mark.parametrize(
    ("peaks", "said"),
    [
        ([(1024, 100.0)], "from one peak, of 1024 tokens, and the bytes per token that are predicted"),
        ([(1024, 100.0), (9000, None), (4096, 300.0)], "from a line through the peaks of 1024 and 4096 tokens"),
    ],
)
def test_what_an_extrapolated_budget_follows_from_is_said(peaks: list[tuple[int, float | None]], said: str) -> None:
    ladder = Ladder(100, 100_000, 1000.0, slope=0.05)
    for tokens, peak in peaks:
        ladder.add(tokens, peak)
    found = ladder.found(5000, True)
    assert found.tokens > found.largest
    assert said in found.origin


@pytest.mark.parametrize(("withheld", "least", "most"), [(0.0, 16_500, 18_500), (200.0, 12_800, 14_100)])
def test_a_search_closes_in_on_a_cliff(withheld: float, least: int, most: int) -> None:
    """Peaks as an allocator reports them: not quite proportional, and nothing above the limit."""
    ladder, tokens = Ladder(100, 100_000, 1000.0, Withheld(nccl=withheld)), 40_000
    for _ in range(20):
        peak = 200 + 0.04 * tokens * (1 + 0.1 * tokens / 20_000)
        ladder.add(tokens, peak if peak <= 1000.0 else None)
        following = ladder.following()
        if following is None:
            break
        tokens = following
    found = ladder.found(40_000, False)
    assert least < found.tokens < most
    assert len(found.tried) < 12


def run(*more: object) -> int:
    words = ["--probe", "--recipe", DEMO, "--ds_config", DS_CONFIG, "--set", FIXTURE, *more]
    return cli.main(["plan", *map(str, words)])


def complaint(capsys: Capture, *more: object) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*more)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_command_writes_the_budget_and_a_calibration_that_plan_reads(capsys: Capture, tmp_path: Path) -> None:
    recipe, costs = tmp_path / "mine.yaml", tmp_path / "costs.json"
    tight = ("--gpu", "here", "--memory-gib", 0.06)  # the probe is here, whatever it is told
    assert run("--json", "--write", recipe, "--calibration", costs, *tight) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = found["budget"]["tokens"]
    old, new = DEMO.read_text().splitlines(), recipe.read_text().splitlines()
    assert found["budget"]["bounded"] == "memory"
    changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    assert changed == [("  micro_batch_tokens: 4096", f"  micro_batch_tokens: {tokens}")]
    assert found["measured"]["mfu"] is None
    assert found["measured"]["step_s"] == found["measured"]["passes_s"] + found["measured"]["update_s"]
    plan = ["plan", "--recipe", recipe, "--ds_config", DS_CONFIG, "--set", FIXTURE, "--gpus", 1]
    assert cli.main([*map(str, plan), "--gpu", "here", "--calibration", str(costs), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["time"]["compute_s"] + made["time"]["optimizer_s"] == pytest.approx(found["predicted_step_s"])
    assert any("recipe demo at" in line for line in made["measured"])
    assert not any("of the peak" in line or "CUDA" in line or "NVLink" in line for line in made["assumptions"])
    _plan_here(capsys, made, [*map(str, plan), "--gpu", "here", "--calibration", str(costs)])
    assert "exists; name another file" in complaint(capsys, "--write", recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "mine.yaml"]
    _refusals(capsys, tmp_path, costs, [str(word) for word in plan])


def _plan_here(capsys: Capture, made: Any, words: list[str]) -> None:
    """On a CPU nothing is reserved for CUDA, and the MFU says what it is a share of."""
    assert made["memory"]["reserve"] == 0
    assert made["memory"]["peak"] < 0.06 * GIB  # what the budget was searched for
    assert "fastest product" in made["gpu_sources"]["fp32_tflops"]
    assert made["time"]["mfu"] * made["time"]["peak_flops"] * made["time"]["step_s"] == pytest.approx(
        made["flops"]["per_step"]
    )
    assert cli.main(words) == 0
    assert f"MFU, of the fastest product measured ({made['time']['peak_flops'] / 1e9:,.0f}" in capsys.readouterr().out


def _refusals(capsys: Capture, folder: Path, costs: Path, plan: list[str]) -> None:
    content = json.loads(costs.read_text())
    for change, said in (
        ({"machine": content["machine"] | {"device": "TPU"}}, "measured with device 'TPU'"),
        ({"machine": content["machine"] | {"precision": "bf16"}}, "measured with precision 'bf16'"),
        ({"machine": content["machine"] | {"torch": "1.0"}}, "measured with torch '1.0'"),
        ({"version": 9}, "its version is 9"),
        ({"table": {"sizes": [1, 2], "seconds": [1]}}, "table"),
        ({"tensor_s": -1}, "tensor_s"),
        ({"optimizer": {"sizes": [2, 1], "seconds": [1, 1]}}, "sizes do not rise"),
    ):
        damaged = folder / "damaged.json"
        damaged.write_text(json.dumps(content | change))
        with pytest.raises(SystemExit):
            cli.main([*plan, "--gpu", "here", "--calibration", str(damaged)])
        err = capsys.readouterr().err
        assert said in err, err
        assert err.count("\n") == 1
    damaged.write_text("{")
    for gpu, file, said in (("here", damaged, "not JSON"), ("v100-32", costs, "this plan is for --gpu v100-32")):
        with pytest.raises(SystemExit):
            cli.main([*plan, "--gpu", gpu, "--calibration", str(file)])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--write", "no/such/folder/a.yaml"), "is no folder"),
        (("--write", "a.json"), "ends in .yaml"),
        (("--calibration", "no/such/a.json"), "is no folder"),
        (("--memory-gib", "0"), "above 0"),
        (("--write", "a.yaml", "--set", "batch.global_batch_examples=8"), "which the file does not say"),
        (("--gpus", "2,4"), "takes one number"),
        (("--sweep",), "has no effect with --probe"),
        (("--memory-gib", "0.01"), "does not fit"),
        (("--set", "batch.mode=reference", "--set", "batch.reference_batches=2", "--set",
          "batch.global_batch_examples=null"), "decides what is learnt"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys: Capture, options: tuple[str, ...], said: str) -> None:
    assert said in complaint(capsys, *options)


def test_what_does_not_fit_names_what_to_change() -> None:
    with pytest.raises(VlscaleError, match=r"does not fit: .*activation_checkpointing: full"):
        probe_of(demo(), 0.02 * GIB).search()
