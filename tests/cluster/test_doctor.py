"""``srun vlscale doctor --dist`` on a real Slurm with two nodes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm_site import slurm_site, unavailable

REASON = unavailable()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=f"no Slurm here: {REASON}")]
PROGRAM = Path(sys.executable).with_name("vlscale")


def test_srun_starts_the_doctor_on_every_rank(tmp_path: Path) -> None:
    with slurm_site() as site:
        variables = {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",  # n1 and n2 do not resolve
            "HOME": os.environ.get("HOME", "/root"),  # where operators lie that are compiled already
            "PATH": f"{PROGRAM.parent}:{site.environment['PATH']}",
        }  # fmt: skip
        both = site.run("srun", "--nodes=2", "--ntasks=2", PROGRAM, "doctor", "--dist", timeout=150, **variables)
        assert "2 ranks on 2 hosts" in both.stdout, both.stderr
        assert "right for all sizes on all ranks" in both.stdout
        said = tmp_path / "batch.out"
        words = ("--wait", "--ntasks=2", f"--output={said}", "--wrap", f"{PROGRAM} doctor --dist")
        batch = site.run("sbatch", *words, check=False, timeout=90, **variables)
        assert batch.returncode == 2
        assert "no launcher started this one" in said.read_text(encoding="utf-8")
