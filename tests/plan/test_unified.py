"""Unified steps: predicted memory, FLOPs and rows against what the real model, objective and plan do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.plan.unified_loads import measure_unified, planner_of, small_unimo, unified_recipe
from vlscale.config import load_recipe
from vlscale.data.deal import accumulation
from vlscale.data.views import Role
from vlscale.models.registry import model_of
from vlscale.objectives.unified import UnifiedLearning, share_window
from vlscale.plan.activations import activation_bytes
from vlscale.plan.assumed import assumed_datasets
from vlscale.plan.costs import first_passes
from vlscale.plan.gpus import load_gpu
from vlscale.plan.memory import Zero
from vlscale.plan.predict import Job, predict
from vlscale.plan.sample import Sampler
from vlscale.plan.trial import Trial
from vlscale.plan.unified import RowLengths, load_of
from vlscale.plan.workload import Planner, least_ceiling, read_source
from vlscale.train.ds_config import read_ds_config
from vlscale.train.flops import model_flops

ROOT = Path(__file__).resolve().parents[2]
PLAIN: dict[str, Any] = {"contrast": {"weight": 0}}
NARROW: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kinds", "unified", "sizes"),
    [
        (None, {}, {}),
        (None, {"contrast": {"window": True}}, {"hidden_size": 192, "num_attention_heads": 6}),
        ({"texts": 1}, {**PLAIN, "language": {"seq2seq_share": 0}}, {"vocab_size": 12000}),
        ({"texts": 1}, {**PLAIN, "language": {"seq2seq_share": 1}}, {"vocab_size": 12000}),
        ({"images": 1}, PLAIN, {}),
        ({"images": 1}, PLAIN, {**NARROW, "num_classes": 9000}),
        ({"pairs": 1}, PLAIN, {**NARROW, "feature_dim": 4096}),
    ],
)
def test_peak_is_within_a_tenth_of_the_measured_one(kinds: Any, unified: Any, sizes: dict[str, Any]) -> None:
    config = small_unimo(**sizes)
    measured = measure_unified(unified_recipe(kinds, **unified), config, 1500)
    found = activation_bytes(config, measured.load, "fp32", cpu=True)
    assert found.embeddings + found.layers == pytest.approx(measured.saved, rel=0.03)
    assert found.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("policy", ["full", "every 2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing(policy: str, precision: str) -> None:
    config = small_unimo(num_hidden_layers=4)
    measured = measure_unified(unified_recipe(), config, 1500, precision, policy)
    found = activation_bytes(config, measured.load, precision, policy, cpu=True)
    assert found.embeddings + found.layers == pytest.approx(measured.saved, rel=0.02)
    assert found.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kinds", [None, {"texts": 1}, {"images": 1}])
def test_flops_are_within_a_hundredth_of_what_pytorch_counts(kinds: Any, window: bool) -> None:
    """Attention with dropout: on a CPU it runs as matrix products, which PyTorch's counter knows."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "attention_dropout": 0.1}
    config = small_unimo(**sizes, attention_backend="packed")
    sampler = Sampler(planner_of(unified_recipe(kinds, contrast={"window": window}), config))
    batch, objective, model = sampler.batch("unified", 2000), sampler.objectives["unified"], model_of(config)
    assert isinstance(objective, UnifiedLearning)
    made = share_window(objective, model, [batch])[0] if window else batch
    with FlopCounterMode(display=False) as counter:
        terms = objective.terms(model, made)
        sum((term.sum * term.weight for term in terms.values()), torch.zeros(())).backward()
    assert model_flops(config, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_steps_rows_are_those_of_the_prepared_batch() -> None:
    config, recipe = small_unimo(), unified_recipe()
    planner = planner_of(recipe, config)
    _, step = planner.example_step("unified")
    rows = RowLengths.of(step, planner.source.lengths, recipe.data.max_regions)
    assert step.views is not None
    slots, generated = (rows.regions > 0), rows.of_roles(Role.SEQ2SEQ)
    least = rows.text + rows.regions + slots
    assert np.array_equal(least[~generated], step.costs[~generated])  # the plan's bound has room for fragments
    assert (least[generated] < step.costs[generated]).all()
    sampler = Sampler(planner)
    batch = sampler.batch("unified", step.tokens)
    assert len(batch) == len(step)
    assert batch.tokens <= step.tokens
    load, (work,) = load_of(batch), planner.tasks
    expected = work.load(load.tokens)
    assert expected.text == pytest.approx(load.text, rel=0.1)
    assert expected.slots == pytest.approx(load.slots, rel=0.1)
    assert expected.pooled == pytest.approx(load.pooled, rel=0.1)
    assert expected.targets == pytest.approx(load.targets, rel=0.3)
    assert work.flops == pytest.approx(model_flops(config, batch), rel=0.1)


def test_the_steps_mix_what_the_recipe_says_and_are_dealt_as_training_deals_them() -> None:
    config, recipe = small_unimo(), unified_recipe()
    planner = planner_of(recipe, config)
    assert least_ceiling(planner.plan) < recipe.batch.micro_batch_tokens
    for gpus in (1, 2, 4):
        work = planner.deal(gpus)
        assert work.accumulation == accumulation(planner.plan, gpus)
        assert work.most <= recipe.batch.micro_batch_tokens
        assert work.straggler_step >= 1
    kinds = {name: lengths.kind for name, lengths in assumed_datasets(recipe).items()}
    assert kinds == {"pairs": "pairs", "images": "images", "texts": "texts"}


def test_a_window_costs_a_second_forward_and_no_memory() -> None:
    config = small_unimo()
    made = {}
    for window in (False, True):
        recipe = unified_recipe(contrast={"window": window})
        job = Job(recipe, ZERO, load_gpu("v100-32"), "v100-32", 8)
        made[window] = predict(job, planner_of(recipe, config))
    assert first_passes(unified_recipe(), config) == 0
    assert made[True].recompute_s > made[False].recompute_s == 0
    assert made[True].memory.peak == pytest.approx(made[False].memory.peak, rel=0.02)


@pytest.mark.parametrize("window", [False, True])
def test_a_trial_trains_a_unified_micro_batch(window: bool) -> None:
    config, recipe = small_unimo(**NARROW), unified_recipe(contrast={"window": window})
    sampler = Sampler(planner_of(recipe, config))
    trial = Trial(recipe, config, sampler.objectives, ZERO, 1, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in trial.model.parameters()]
    trial.micro_step(sampler.batch("unified", 600))
    trial.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, trial.model.parameters(), strict=True)]
    assert sum(changed) > 0.8 * len(changed)  # no gradient reaches biases that a softmax does not see


ZERO = dataclasses.replace(
    Zero.from_settings(read_ds_config(ROOT / "ds_configs/demo_cpu.json")), precision="fp32", stage=1
)


def test_without_data_the_kinds_of_the_recipe_count() -> None:
    source = read_source(load_recipe(ROOT / "launch/recipes/unimo_base.yaml"))
    assert source.assumed
    assert {lengths.kind for lengths in source.lengths.values()} == {"pairs", "images", "texts"}
    (work,) = Planner(load_recipe(ROOT / "launch/recipes/unimo_base.yaml"), source).tasks
    assert work.task == "unified"
