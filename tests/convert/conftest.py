"""Fixtures of the tests of conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.convert.published import CONFIG, golden_state


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A published checkpoint with its configuration beside it."""
    (tmp_path / CONFIG.name).write_bytes(CONFIG.read_bytes())
    torch.save(golden_state(), tmp_path / "uniter.pt")
    return tmp_path / "uniter.pt"
