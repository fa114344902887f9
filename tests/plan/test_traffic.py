"""Volumes are those of the collectives; the alpha-beta model and what hides behind the backward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from vlscale.plan.gpus import load_gpu
from vlscale.plan.memory import Zero
from vlscale.plan.traffic import Links, Traffic, collective_seconds, traffic_of

P, GAS, LAYERS = 100_000_000, 4, 12
V100 = load_gpu("v100-32")


def traffic(stage: int, gpus: int = 8, passes: tuple[float, float] = (0.0, 0.0), **changes: Any) -> Traffic:
    zero = Zero(stage, "fp16" if stage else "fp32", 4, 2 if stage else 4, **changes)
    return traffic_of(zero, P, gpus, GAS, passes, LAYERS, V100, Links())


def test_volumes_by_stage() -> None:
    whole = 7 / 8 * P
    assert traffic(0).reduce_bytes == 2 * whole * 4
    assert traffic(0).gather_bytes == 0
    assert (traffic(1).reduce_bytes, traffic(1).gather_bytes) == (2 * whole * 2, whole * 2)
    assert (traffic(2).reduce_bytes, traffic(2).gather_bytes) == (GAS * 2 * whole * 2, whole * 2)
    assert (traffic(3).reduce_bytes, traffic(3).gather_bytes) == (GAS * whole * 2, GAS * whole * 2)
    assert traffic(3, reuse_distance=0).gather_bytes == 2 * GAS * whole * 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_gpu_sends_nothing(stage: int) -> None:
    alone = traffic(stage, 1)
    assert (alone.reduce_bytes, alone.gather_bytes, alone.reduce_s, alone.exposed_s) == (0, 0, 0, 0)


def test_without_overlap_everything_is_exposed() -> None:
    found = traffic(2, passes=(10.0, 5.0))
    assert found.exposed_s == found.reduce_s + found.gather_s


def test_a_long_backward_pass_hides_all_but_the_last_bucket() -> None:
    found = traffic(1, passes=(10.0, 5.0), overlap=True)
    assert found.exposed_reduce_s == pytest.approx(found.reduce_s / 4)  # 100 million in buckets of 25 million
    assert found.exposed_gather_s == found.gather_s
    short = traffic(1, passes=(1e-9, 1e-9), overlap=True)
    assert short.exposed_reduce_s == pytest.approx(short.reduce_s, rel=1e-5)
    one = traffic(1, passes=(10.0, 5.0), overlap=True, bucket=500_000_000)
    assert one.exposed_reduce_s == one.reduce_s  # DeepSpeed's default bucket hides nothing


def test_alpha_and_beta() -> None:
    links = Links(link_efficiency=1.0, network_efficiency=1.0, link_latency_s=1e-6, network_latency_s=1e-5)
    inside = collective_seconds(150e9, 10, 8, V100, links)
    assert inside == pytest.approx(1.0 + 10 * 7e-6)
    across = collective_seconds(50e9, 10, 32, V100, links)
    assert across == pytest.approx(1.0 + 10 * (7e-6 + 1e-5 * 2 * 2))
    slow = dataclasses.replace(links, network_efficiency=0.5)
    assert collective_seconds(50e9, 0, 32, V100, slow) == pytest.approx(2.0)


def test_more_nodes_take_longer() -> None:
    seconds = [traffic(1, gpus).reduce_s for gpus in (2, 8, 16, 64, 1024)]
    assert seconds == sorted(seconds)
