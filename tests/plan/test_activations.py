"""Predicted activations against what autograd saves and against the measured peak of a step on a CPU."""

from __future__ import annotations

import pytest

from tests.plan.loads import measure, small
from vlscale.plan.activations import Load, activation_bytes, checkpointed, layer_bytes

TASKS = ("mlm", "mrfr", "mrc", "mrckl", "itm")
SIZES = {
    "small": (small(), 16),
    "wide": (small(hidden_size=192, num_attention_heads=6, intermediate_size=768), 12),
    "deep, large vocabulary": (small(num_hidden_layers=6, vocab_size=30000, norm="pre"), 4),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", SIZES)
def test_peak_is_within_a_tenth_of_the_measured_one(size: str, task: str) -> None:
    config, examples = SIZES[size]
    measured = measure(task, config, examples)
    found = activation_bytes(config, measured.load, "fp32", cpu=True)
    assert found.embeddings + found.layers == pytest.approx(measured.saved, rel=0.02)
    assert found.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("policy", ["full", "every 2", "every 3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing(policy: str, precision: str) -> None:
    config = small(num_hidden_layers=6)
    measured = measure("mrckl", config, 16, precision, policy)
    found = activation_bytes(config, measured.load, precision, policy, cpu=True)
    assert found.embeddings + found.layers == pytest.approx(measured.saved, rel=0.02)
    assert found.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("task", "wide"),
    [("mlm", {"vocab_size": 20000}), ("mrc", {"num_classes": 20000}), ("mrckl", {"num_classes": 20000})],
)
def test_logits_that_decide_the_peak(task: str, wide: dict[str, int], precision: str) -> None:
    config = small(num_hidden_layers=1, hidden_size=32, intermediate_size=64, **wide)
    measured = measure(task, config, 16, precision)
    found = activation_bytes(config, measured.load, precision, cpu=True)
    assert found.loss > found.layers
    assert found.peak == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_masked_features_that_decide_the_peak(precision: str) -> None:
    config = small(num_hidden_layers=1, hidden_size=32, intermediate_size=64, feature_dim=8192)
    measured = measure("mrfr", config, 16, precision)
    found = activation_bytes(config, measured.load, precision, cpu=True)
    assert found.peak == pytest.approx(measured.peak, rel=0.1)


def test_checkpointing_takes_less_and_a_gpu_less_than_a_cpu() -> None:
    config, load = small(num_hidden_layers=12), Load("mrfr", 400, 1200, 34, 180, True)
    none, some, full = (activation_bytes(config, load, "fp16", p).peak for p in ("none", "every 2", "full"))
    assert full < some < none
    assert layer_bytes(config, "fp16") < layer_bytes(config, "fp16", cpu=True)
    assert activation_bytes(config, load, "fp16").peak < activation_bytes(config, load, "fp32").peak


def test_which_layers_are_checkpointed() -> None:
    assert checkpointed("none", 3) == [False] * 3
    assert checkpointed("full", 3) == [True] * 3
    assert checkpointed("every 2", 5) == [True, False, True, False, True]


@pytest.mark.parametrize("heads", [4, 2])
def test_optimal_transport_counts(heads: int) -> None:
    """Its rows, plans and their gradients, where little else is there."""
    config = small(num_hidden_layers=1, intermediate_size=32, num_attention_heads=heads)
    without, measured = measure("itm", config, 32), measure("itm", config, 32, alignment=True)
    found = activation_bytes(config, measured.load, "fp32", cpu=True)
    assert found.peak == pytest.approx(measured.peak, rel=0.1)
    assert measured.peak > 1.05 * without.peak
    assert found.peak > activation_bytes(config, without.load, "fp32", cpu=True).peak
