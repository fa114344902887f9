"""A prediction is consistent with itself and moves the way it should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vlscale.config import load_recipe
from vlscale.errors import VlscaleError
from vlscale.plan.gpus import load_gpu
from vlscale.plan.memory import Zero
from vlscale.plan.predict import Assumptions, Job, predict
from vlscale.plan.sweep import best, scaling, sweep
from vlscale.plan.workload import Planner, read_source

ROOT = Path(__file__).resolve().parents[2]
RECIPE = load_recipe(ROOT / "launch/recipes/uniter_large.yaml")
SOURCE = read_source(RECIPE)
PLANNER = Planner(RECIPE, SOURCE)
JOB = Job(RECIPE, Zero(2, "fp16", 4, 2, overlap=True), load_gpu("v100-32"), "v100-32", 16)


def test_faster_gpus_and_more_of_them_take_less_time() -> None:
    v100 = predict(JOB, PLANNER)
    a100 = predict(replace(JOB, gpu=load_gpu("a100-80")), PLANNER)
    h100 = predict(replace(JOB, gpu=load_gpu("h100")), PLANNER)
    half = predict(replace(JOB, gpus=8), PLANNER)
    assert h100.step_s < a100.step_s < v100.step_s < half.step_s
    assert half.gpu_hours < v100.gpu_hours  # what communication costs
    assert v100.memory.states.optimizer == half.memory.states.optimizer / 2


def test_perfect_efficiency_without_anything_else_is_an_mfu_of_one() -> None:
    ideal = Assumptions(
        matmul_efficiency=1.0, elementwise_passes=0.0, kernels_per_layer=0, optimizer_bytes=0.0,
        transport_efficiency=1e12,  # not among the model's FLOPs
    )  # fmt: skip
    made = predict(replace(JOB, gpus=1), PLANNER, ideal)
    assert made.mfu == pytest.approx(1.0)


def test_small_shares_are_bound_by_kernel_launches() -> None:
    made = predict(replace(JOB, gpus=1024), PLANNER)
    assumed = Assumptions()
    launches = assumed.kernels_per_layer * assumed.kernel_launch_s * 24
    assert made.workload.accumulation == 1
    assert made.compute_s == pytest.approx(launches, rel=0.5)
    assert made.mfu < 0.1
    assert made.straggler_s < made.compute_s * (made.workload.straggler_micro - 1)


def test_stage_1_sends_less_than_stage_2_when_accumulating() -> None:
    job = replace(JOB, gpus=4)
    second, first = predict(job, PLANNER), predict(replace(job, zero=replace(JOB.zero, stage=1)), PLANNER)
    assert second.workload.accumulation == 4
    assert second.traffic.reduce_bytes == 4 * first.traffic.reduce_bytes
    assert first.memory.states.gradients == 4 * second.memory.states.gradients


def test_every_sweep_row_is_what_the_plan_of_that_setting_says() -> None:
    points = sweep(JOB, SOURCE, [8])
    row = next(p for p in points if (p.stage, p.policy, p.micro_batch_tokens) == (2, "none", 8211))
    assert row.prediction is not None
    assert row.prediction.step_s == predict(replace(JOB, gpus=8), PLANNER).step_s
    fastest = best(points)[8]
    assert fastest.prediction is not None
    fitting = [p.prediction.step_s for p in points if p.prediction is not None and p.prediction.memory.fits]
    assert fastest.prediction.step_s == min(fitting)


def test_scaling_keeps_the_global_batch() -> None:
    points = scaling(JOB, PLANNER, [1, 16, 256])
    tokens = {p.prediction.workload.mean("tokens") for p in points if p.prediction is not None}
    assert len(tokens) == 1


def test_the_published_batches_can_be_planned() -> None:
    """Mode reference: 16 GPUs x 4 micro-batches of the published sampler, a third full."""
    overrides = ("batch.mode=reference", "batch.reference_batches=64", "batch.global_batch_tokens=null",
                 "batch.micro_batch_tokens=6144")  # fmt: skip
    recipe = load_recipe(ROOT / "launch/recipes/uniter_large.yaml", overrides)
    made = predict(replace(JOB, recipe=recipe), Planner(recipe, SOURCE))
    assert made.workload.accumulation == 4
    assert 0.2 < made.workload.fill < 0.5
    assert made.gpu_hours < 3645  # a bound from peaks cannot exceed what was paid


def test_a_missing_precision_is_refused() -> None:
    with pytest.raises(VlscaleError, match="has no bf16"):
        predict(replace(JOB, zero=replace(JOB.zero, precision="bf16")), PLANNER)


def test_optimal_transport_takes_time_by_its_iterations() -> None:
    without = load_recipe(ROOT / "launch/recipes/uniter_large.yaml", ("objectives.wra.loss=off",))
    more = load_recipe(ROOT / "launch/recipes/uniter_large.yaml", ("objectives.wra.iterations=5000",))
    off, on, long = (
        predict(replace(JOB, recipe=recipe), Planner(recipe, SOURCE)) for recipe in (without, RECIPE, more)
    )
    assert off.compute_s < on.compute_s < long.compute_s
    assert on.compute_s < 1.02 * off.compute_s
    transport = long.compute_s - on.compute_s
    itm = next(task for task in PLANNER.tasks if task.task == "itm")
    cells = itm.share * itm.load(itm.tokens).cells / JOB.gpus
    assert transport == pytest.approx(cells * 7 * (5000 - 50) / (15.7e12 * 0.1), rel=1e-6)
