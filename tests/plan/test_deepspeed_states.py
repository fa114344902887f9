"""Predicted model states against what a real DeepSpeed engine keeps on a CPU (one process, bf16 and fp32)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.multiprocess.launcher import ROOT, environment
from tests.plan.deepspeed_states import BUCKET, PARAMETERS, WIDTH
from vlscale.plan.memory import Zero, state_bytes

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [
        (1, "bf16", "fp32"),
        (1, "bf16", "bf16"),
        pytest.param(2, "bf16", "fp32", marks=pytest.mark.long),
        (3, "bf16", "fp32"),
    ],
)
def test_states_are_what_the_engine_keeps(stage: int, precision: str, accumulation: str) -> None:
    words = [sys.executable, "-m", "tests.plan.deepspeed_states", str(stage), precision, accumulation]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])["per_parameter"]
    width = {"fp32": 4, "bf16": 2}
    zero = Zero(stage, precision, width[accumulation], width[precision], BUCKET)
    found = state_bytes(zero, PARAMETERS, WIDTH * WIDTH, 1)
    states = (found.weights + found.gradients + found.optimizer) / PARAMETERS
    # Python may or may not reach the buckets, and a gradient that has just been reduced; here each is a third of 1 B.
    assert 0.99 * states <= measured <= 1.01 * states + 2 * found.buckets / PARAMETERS
