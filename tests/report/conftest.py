from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.scenes import heldout, make_scenes
from vlscale.report.heldout import HeldOut


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("report") / "scenes")


@pytest.fixture(scope="session")
def scenes(scenes_root: Path) -> HeldOut:
    return heldout(scenes_root)


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Scenes without ground truth and without classes."""
    return heldout(make_scenes(tmp_path_factory.mktemp("report") / "bare", 20, extra=False, classes=False))
