"""UNITER built and trained under ZeRO-3: construction in partitions, tied heads, activation checkpointing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiprocess.launcher import ROOT, environment, free_port


@pytest.mark.multiprocess
def test_uniter_under_zero3_equals_plain_training():
    """Some layers are computed again in the backward pass, some are not."""
    port = free_port()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **place)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "tests.models.partitioned", "every 2"],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink()
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["partitioned"], "parameters were not partitioned while the model was constructed"
    assert found["same_start"], "partitioned construction draws other weights"
    assert found["loss"] < 1e-5
    assert found["weights"] < 1e-5
