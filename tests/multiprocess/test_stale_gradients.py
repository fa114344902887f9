"""ZeRO-3 must not move a head that lies idle by the gradient of its last turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.multiprocess.launcher import run_alone
from vlscale.errors import VlscaleError
from vlscale.train.engine import _stale_gradients

WORKER = Path(__file__).with_name("stale_worker.py")


@pytest.mark.multiprocess
def test_an_idle_head_does_not_move() -> None:
    done = run_alone(WORKER)
    assert done.status == 0, done.tail
    found = json.loads(next(line for line in done.out.splitlines() if line.startswith("FOUND "))[6:])
    idle, used = found["guarded"]
    assert idle == [0.0] * 4
    assert min(used) > 0
    # Why the guard is there. If this fails, DeepSpeed has mended it, and the guard can go.
    assert max(found["unguarded"][0]) > 1e-4


def test_an_engine_that_was_not_looked_at_is_refused() -> None:
    class Known:
        grad_partitions_flat_buffer = object()

    assert _stale_gradients(Known(), "0.19.8") is Known.grad_partitions_flat_buffer
    with pytest.raises(VlscaleError, match=r"DeepSpeed 0.20.0: its ZeRO stage 3 has not been checked"):
        _stale_gradients(Known(), "0.20.0")
    with pytest.raises(VlscaleError, match=r"use zero_optimization.stage 2"):
        _stale_gradients(object(), "0.19.8")
