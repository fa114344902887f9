"""FLOPs against PyTorch's counter on the real model; steps are those of the plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.plan.loads import REGIONS, TEXT, make_batch, objective, small
from vlscale.config import Recipe, load_recipe
from vlscale.data.deal import accumulation
from vlscale.data.source import Step
from vlscale.errors import VlscaleError
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.plan.assumed import assumed_lengths
from vlscale.plan.workload import Planner, Source, encoder_flops, read_source, shape_of
from vlscale.train.flops import model_flops

ROOT = Path(__file__).resolve().parents[2]


def recipe(name: str = "uniter_base") -> Recipe:
    return load_recipe(ROOT / f"launch/recipes/{name}.yaml")


def counted() -> UniterConfig:
    """Attention with dropout: on a CPU it runs as matrix products, which PyTorch's counter knows."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    return small(**sizes, attention_backend="packed", attention_dropout=0.1)


@pytest.mark.parametrize("task", ["mlm", "mrfr", "mrc", "mrckl", "itm"])
def test_flops_are_within_a_hundredth_of_what_pytorch_counts(task: str) -> None:
    """Forward, loss and backward of each task, at packed attention."""
    config = counted()
    batch = make_batch(task, config, 8)
    model = UniterForPretraining(config)
    with FlopCounterMode(display=False) as counter:
        terms = objective(task).terms(model, batch)
        sum((term.sum * term.weight for term in terms.values()), torch.zeros(())).backward()
    assert model_flops(config, batch) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("policy", ["full", "every 2"])
def test_checkpointing_computes_a_third_of_the_encoder_again(policy: str) -> None:
    config = counted()
    batch = make_batch("mlm", config, 8)
    counts = {}
    for name in ("none", policy):
        model = UniterForPretraining(config)
        model.set_activation_checkpointing(name)
        with FlopCounterMode(display=False) as counter:
            terms = objective("mlm").terms(model, batch)
            terms["mlm"].sum.backward()
        counts[name] = counter.get_total_flops()
    share = 1.0 if policy == "full" else 0.5
    assert counts[policy] - counts["none"] == pytest.approx(share * encoder_flops(config, batch) / 3, rel=0.01)


def test_a_step_has_the_shape_of_its_batch() -> None:
    config, examples = small(), 8
    rows = np.arange(examples)
    lengths = dataclasses.replace(
        assumed_lengths("made", 0, 60),
        tokens=np.full(60_000, TEXT - 2, np.int32),
        regions=np.full(60_000, REGIONS, np.int32),
    )
    zeros = np.zeros(examples, np.int64)
    step = Step(0, "mrfr", "made", rows, rows, zeros, rows, zeros.astype(np.int8), rows.astype(np.int32),
                np.full(examples, TEXT + REGIONS, np.int32))  # fmt: skip
    batch, load = shape_of(step, lengths, recipe(), config)
    real = make_batch("mrfr", config, examples)
    assert batch.tokens == real.tokens == load.tokens
    assert batch.cu_joint.equal(real.cu_joint)
    assert load.targets == round(examples * (0.15 * REGIONS + 0.85**REGIONS))
    assert load.masked_features


def test_the_accumulation_is_the_plans_and_nobody_waits_on_one_gpu() -> None:
    planner = Planner(recipe(), read_source(recipe()))
    for gpus in (1, 8, 16):
        work = planner.deal(gpus)
        assert work.accumulation == accumulation(planner.plan, gpus) == 16 // gpus
        assert 1 <= work.straggler_step <= work.straggler_micro < 1.01
        assert work.most <= recipe().batch.micro_batch_tokens
        assert work.fill == pytest.approx(work.mean("tokens") / (16 * 10821), rel=0.01)
    assert work.assumed
    assert sum(task.share for task in work.tasks) == pytest.approx(1)
    assert planner.deal(1).straggler_step == 1
    assert planner.deal(1024).straggler_step > 1.05


def test_real_lengths_are_used_where_the_data_are(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load_recipe(
        ROOT / "launch/recipes/demo.yaml",
        (f"data.datasets.0.root={ROOT / 'tests/fixtures/demo/train'}",),
    )
    source = read_source(demo)
    assert not source.assumed
    assert source.config.vocab_size != 28996
    work = Planner(demo, source).deal(1)
    assert work.mean("examples") == 64
    with pytest.raises(VlscaleError, match="more processes than examples"):
        Planner(demo, source).deal(128)


def test_assumed_lengths_are_those_that_are_named() -> None:
    lengths = assumed_lengths("x", 0, 60)
    assert np.median(lengths.tokens) == 11
    assert np.median(lengths.regions) == 31
    assert (lengths.tokens.min(), lengths.regions.min(), lengths.regions.max()) == (3, 10, 100)
    assert assumed_lengths("x", 0, 20).tokens.max() == 20
    source = Source({"x": lengths}, True, small())
    assert source.assumed
