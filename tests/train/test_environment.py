"""The device that is asked for, the compiler, and a single process without a launcher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vlscale.errors import VlscaleError
from vlscale.train.environment import check_compiler, choose_accelerator, compute_capability, stand_alone


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "")
    return monkeypatch


def test_without_a_gpu_the_cpu_is_chosen_and_deepspeed_is_told(no_gpu: pytest.MonkeyPatch) -> None:
    assert choose_accelerator("auto") == "cpu"
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert compute_capability("cpu") is None


def test_a_gpu_that_is_not_there_is_refused(no_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(VlscaleError, match=r"--device gpu: a GPU is asked for"):
        choose_accelerator("gpu")
    no_gpu.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(VlscaleError, match=r"DS_ACCELERATOR=cuda: a GPU is asked for"):
        choose_accelerator("auto")
    no_gpu.setenv("DS_ACCELERATOR", "xpu")
    with pytest.raises(VlscaleError, match=r"expected cpu or cuda"):
        choose_accelerator("auto")
    assert choose_accelerator("cpu") == "cpu"


def test_a_gpu_is_taken_unless_the_cpu_is_asked_for(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_accelerator("auto") == "cuda"
    assert choose_accelerator("cpu") == "cpu"
    assert choose_accelerator("auto") == "cpu", "DS_ACCELERATOR is followed"
    assert choose_accelerator("gpu") == "cuda"


def test_ninja_beside_python_is_put_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("bin/ninja", "tools/g++"):
        tool = tmp_path / name
        tool.parent.mkdir()
        tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    check_compiler()
    assert os.environ["PATH"].startswith(str(tmp_path / "bin"))


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(VlscaleError, match=r"ninja is not on PATH.*pip install ninja"):
        check_compiler()
    (tmp_path / "ninja").touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-compiler -O2")
    with pytest.raises(VlscaleError, match=r"my-compiler is not on PATH"):
        check_compiler()


def test_a_process_without_a_launcher_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    stand_alone()
    assert os.environ["WORLD_SIZE"] == "1"
    assert 0 < int(os.environ["MASTER_PORT"]) < 65536
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    stand_alone()
    assert os.environ["RANK"] == "3"
