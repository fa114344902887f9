from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden_batches import load_golden
from vlscale.config import ScheduleSection
from vlscale.train.schedule import LEARNING_RATE_FLOOR, learning_rate, warmup_linear


@pytest.mark.golden
def test_uniter_golden_multipliers():
    golden = load_golden("optim")
    (name,) = [name for name in golden if name.startswith("sched_warm")]
    warmup, total = (int(part) for part in name.removeprefix("sched_warm").split("_total"))
    got = [warmup_linear(int(step), warmup, total) for step in golden["sched_steps"]]
    assert got == pytest.approx(golden[name].tolist(), rel=1e-12, abs=1e-15)


def test_rises_to_the_peak_and_falls_to_the_floor():
    section = ScheduleSection(warmup_steps=4, total_steps=12)
    rates = [learning_rate(section, 0.8, taken) for taken in range(14)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:11] == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates[11:] == [LEARNING_RATE_FLOOR] * 3


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 5), (5, 5), (1, 1)])
def test_edges(warmup, total):
    rates = [learning_rate(ScheduleSection(warmup_steps=warmup, total_steps=total), 1.0, taken) for taken in range(7)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[total:] == [LEARNING_RATE_FLOOR] * (7 - total)
    if warmup:
        assert rates[warmup - 1] == 1.0


def test_the_published_schedule_of_unimo_is_an_option():
    section = ScheduleSection(kind="paddle", warmup_steps=4, total_steps=10)
    rates = [learning_rate(section, 0.5, taken) for taken in range(11)]
    assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0])


@given(st.integers(0, 50), st.integers(1, 50), st.integers(0, 120))
def test_never_above_the_peak_and_unimodal(warmup, more, taken):
    section = ScheduleSection(warmup_steps=warmup, total_steps=warmup + more)
    now, after = (learning_rate(section, 3.0, step) for step in (taken, taken + 1))
    assert 0 < now <= 3.0
    assert after >= now if taken + 1 < warmup else after <= now
