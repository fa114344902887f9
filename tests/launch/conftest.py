"""The desk of the tests of launch/slurm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch.slurm_desk import PROGRAMS, ROOT, Desk


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    shutil.copytree(ROOT / "launch/slurm", tmp_path / "launch/slurm", ignore=shutil.ignore_patterns("site.env"))
    for name, text in PROGRAMS.items():
        desk.program(f"bin/{name}", text)
    desk.program(".venv/bin/python", "#!/bin/bash\n")
    desk.plan("0 -")
    return desk
