"""Model states against DeepSpeed's own estimators; what fits and what to change where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlscale.models.registry import load_preset
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.plan.activations import Load
from vlscale.plan.memory import GIB, Zero, cures, memory_bytes, state_bytes
from vlscale.plan.model import model_sizes
from vlscale.train.ds_config import read_ds_config

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ("uniter-base", "uniter-large")


def preset(name: str) -> UniterConfig:
    return UniterConfig(**load_preset(name))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = UniterForPretraining(preset(name))
    assert model_sizes(preset(name))[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 8), (4, 4), (16, 8)])
def test_stage_2_is_what_deepspeed_estimates(name: str, nodes: int, per_node: int) -> None:
    """Its estimator counts 16-bit accumulation and a float32 copy for the step."""
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate

    parameters, largest = model_sizes(preset(name))
    _, expected = estimate(parameters, per_node, nodes, cpu_offload=False)
    found = state_bytes(Zero(2, "fp16", 2, 2), parameters, largest, nodes * per_node)
    assert found.model_states == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("nodes", "per_node"), [(1, 8), (4, 4), (16, 8)])
def test_stage_3_is_what_deepspeed_estimates(name: str, nodes: int, per_node: int) -> None:
    """Its estimator counts a float32 gradient once (in DeepSpeed 0.19 the step copies it) and the largest module."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    parameters, largest = model_sizes(preset(name))
    _, expected, of_largest = estimate(
        parameters, largest, per_node, nodes, cpu_offload=False, cpu_offload_params=False
    )
    found = state_bytes(Zero(3, "fp16", 4, 2), parameters, largest, nodes * per_node)
    assert found.model_states - found.step_copy + of_largest == pytest.approx(expected, rel=0.05)


def test_stage_1_keeps_a_whole_gradient_and_stage_0_everything() -> None:
    assert state_bytes(Zero(1, "fp16", 4, 2), 1000, 100, 10).gradients == 4000
    assert state_bytes(Zero(2, "fp16", 4, 2), 1000, 100, 10).gradients == 400
    plain = state_bytes(Zero(0, "fp32", 4, 4), 1000, 100, 10)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4000, 4000, 8000)


def test_bf16_at_stage_1_keeps_both_gradients() -> None:
    both = state_bytes(Zero(1, "bf16", 4, 2), 1000, 100, 10)
    assert (both.gradients, both.buckets) == (6000, 0)
    assert state_bytes(Zero(1, "bf16", 2, 2), 1000, 100, 10).gradients == 2000


def test_stage_3_releases_weights_only_if_the_json_says_so() -> None:
    kept = state_bytes(Zero(3, "fp16", 4, 2), 10**6, 10**4, 4)
    released = state_bytes(Zero(3, "fp16", 4, 2, reuse_distance=0, prefetch=0), 10**6, 10**4, 4)
    assert kept.weights + kept.gathered == 2 * 10**6
    assert released.gathered == 2 * 10**4 * 3 / 4


def test_what_the_json_says(tmp_path: Path) -> None:
    zero = Zero.from_settings(read_ds_config(ROOT / "ds_configs/uniter_large_v100.json"))
    assert zero == Zero(2, "fp16", 4, 2, 25_000_000, 25_000_000, overlap=True)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
                                "data_types": {"grad_accum_dtype": "bf16"}}))  # fmt: skip
    assert Zero.from_settings(read_ds_config(path)) == Zero(1, "bf16", 2, 2)


def test_what_does_not_fit_gets_cures_that_do_what_they_say() -> None:
    config, zero = preset("uniter-large"), Zero(1, "fp16", 4, 2)
    sizes = model_sizes(config)

    def memory_in(capacity: float):
        def memory_of(changed: Zero, policy: str, tokens: float):
            load = Load("mrfr", tokens * 0.28, tokens * 0.72, tokens / 50, tokens * 0.11, True)
            return memory_bytes(changed, config, sizes, 8, [load], policy, capacity)

        return memory_of

    tight = memory_in(8 * GIB)
    assert not tight(zero, "none", 8211).fits
    advice = cures(tight, zero, "none", 8, 8211)
    tokens = int(advice[0].split()[1])
    assert tight(zero, "none", tokens).fits
    assert not tight(zero, "none", tokens + 1).fits
    full = next(line for line in advice if line.startswith("activation_checkpointing: full"))
    assert full.endswith(f"{tight(zero, 'full', 8211).peak / GIB:.2f} GiB, fits")
    assert any(line.startswith("zero_optimization.stage 2 instead of 1") for line in advice)
    assert any("does not fit yet" in line for line in advice)
    roomy = memory_in(79 * GIB)
    assert roomy(zero, "none", 8211).to_json()["fits"]
    assert cures(roomy, zero, "none", 8, 8211) == []
    hopeless = cures(memory_in(GIB), zero, "none", 1, 8211)
    assert not any(line.endswith(" fits") for line in hopeless)
    assert not any("stage" in line for line in hopeless)
