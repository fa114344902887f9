"""One loss scale per task, on DeepSpeed's own scaler and on a fake optimiser."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from vlscale.errors import VlscaleError
from vlscale.train.loss_scale import MAX_SKIPS_IN_A_ROW, TaskLossScales


class FakeScaler:
    """Halves at each overflow, doubles after two good steps in a row."""

    def __init__(self, scale: float = 1024.0) -> None:
        self.cur_scale, self.min_scale = scale, 1.0
        self.cur_iter, self.last_overflow_iter, self.cur_hysteresis = 0, -1, 1
        self.raise_error_at_min_scale = True

    def update_scale(self, overflow: bool) -> None:
        if overflow:
            assert not self.raise_error_at_min_scale or self.cur_scale > self.min_scale
            self.cur_scale = max(self.cur_scale / 2, self.min_scale)
            self.last_overflow_iter = self.cur_iter
        elif (self.cur_iter - self.last_overflow_iter) % 2 == 0:
            self.cur_scale *= 2
        self.cur_iter += 1


def optimizer(scaler: Any = None) -> Any:
    return SimpleNamespace(loss_scaler=scaler or FakeScaler())


def step(scales: TaskLossScales, zero: Any, task: str, overflow: bool) -> bool:
    scale = scales.select(task)
    zero.loss_scaler.update_scale(overflow)
    return scales.record(task, scale, not overflow)


def test_an_overflow_of_one_task_leaves_the_others_alone() -> None:
    zero = optimizer()
    scales = TaskLossScales(zero, ["mlm", "itm"])
    for _ in range(3):
        assert not step(scales, zero, "itm", True)
    step(scales, zero, "mlm", False)
    assert scales.select("itm") == 128.0
    assert scales.select("mlm") == 1024.0
    assert zero.loss_scaler.cur_scale == 1024.0
    assert scales.skipped == {"mlm": 0, "itm": 3}


def test_a_scale_at_the_bottom_that_still_overflows_has_collapsed() -> None:
    zero = optimizer(FakeScaler(4.0))
    scales = TaskLossScales(zero, ["mlm"])
    assert [step(scales, zero, "mlm", True) for _ in range(3)] == [False, False, True]


def test_so_has_one_that_never_recovers() -> None:
    static = SimpleNamespace(cur_scale=8.0, update_scale=lambda overflow: None)
    zero = optimizer(static)
    scales = TaskLossScales(zero, ["mlm", "itm"])
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        assert not step(scales, zero, "mlm", True)
    assert not step(scales, zero, "itm", True)
    assert step(scales, zero, "mlm", True)
    assert not step(scales, zero, "mlm", False)
    assert not step(scales, zero, "mlm", True)


def test_state_survives_a_checkpoint() -> None:
    zero = optimizer()
    scales = TaskLossScales(zero, ["mlm", "itm"])
    for task, overflow in (("mlm", True), ("itm", False), ("mlm", True), ("itm", False)):
        step(scales, zero, task, overflow)
    saved = json.loads(json.dumps(scales.state()))
    other = optimizer()
    restored = TaskLossScales(other, ["mlm", "itm", "mrfr"])
    restored.load(saved)
    assert restored.state().items() >= saved.items()
    assert restored.select("mrfr") == 1024.0
    for task, overflow in (("mlm", False), ("itm", True), ("mlm", False), ("itm", False)):
        step(scales, zero, task, overflow)
        step(restored, other, task, overflow)
        assert restored.select(task) == scales.select(task)


def test_damaged_state_is_refused() -> None:
    scales = TaskLossScales(optimizer(), ["mlm"])
    with pytest.raises(VlscaleError, match="loss scale of task mlm is damaged"):
        scales.load({"mlm": {"skipped": 1}})


def test_it_fits_the_scaler_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    module = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(module.dist, "get_rank", lambda: 0)
    scaler = module.DynamicLossScaler(
        init_scale=4.0, scale_window=2, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
    )
    zero = optimizer(scaler)
    scales = TaskLossScales(zero, ["mlm", "itm"])
    assert [step(scales, zero, "mlm", True) for _ in range(3)] == [False, False, True]
    for _ in range(4):
        step(scales, zero, "itm", False)
    state = scales.state()
    assert state["itm"]["cur_scale"] > 4.0
    assert {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"} <= state["itm"].keys()
