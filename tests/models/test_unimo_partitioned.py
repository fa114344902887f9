"""UNIMO built and trained under ZeRO-3, with steps in which heads or the whole image side are idle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiprocess.launcher import ROOT, environment, free_port


@pytest.mark.multiprocess
@pytest.mark.long  # tests/multiprocess/test_unified.py trains one under ZeRO-3 too
def test_unimo_under_zero3_equals_plain_training():
    port = free_port()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **place)
    command = [sys.executable, "-m", "tests.models.unimo_partitioned"]
    try:
        run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False)
    finally:
        for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            left.unlink()
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found["same_start"], "partitioned construction draws other weights"
    assert found["loss"] < 1e-5
    assert found["weights"] < 1e-5
    assert found["drift"] == 0.0
