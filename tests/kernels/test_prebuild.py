"""CUDA kernels that are compiled when vlscale is installed, and then found instead of being compiled at first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vlscale.kernels.ipot import nvrtc, prebuild
from vlscale.kernels.ipot.cuda_sources import all_kernels, is_prebuilt

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nvrtc():
    try:
        nvrtc.library()
    except OSError as error:
        pytest.skip(str(error))


def test_an_install_that_asks_for_it_brings_every_kernel(tmp_path, monkeypatch):
    """A real wheel; what it brings is taken without NVRTC."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("vlscale", "data_tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    environment = {**os.environ, "VLSCALE_BUILD_CUDA": "1", "VLSCALE_CUDA_ARCHS": "70"}
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = list(all_kernels())
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if "/prebuilt/" in name]
        wheel.extractall(tmp_path / "installed", names)
    assert len(names) == 2 * len(kernels) == 60
    monkeypatch.setattr(nvrtc, "PREBUILT", tmp_path / "installed/vlscale/kernels/ipot/prebuilt")
    monkeypatch.setattr(nvrtc, "library", None)  # not asked
    assert is_prebuilt("sm_70")
    assert not is_prebuilt("sm_80")
    for kernel in kernels:
        assert kernel.compiled("sm_70").figure("registers") > 0


def test_architectures_are_read_in_any_usual_form_and_checked():
    assert prebuild.architectures("7.0 8.0,9.0;70") == ["sm_70", "sm_80", "sm_90"]
    assert prebuild.architectures("sm_120") == ["sm_120"]
    for wrong in ("60", "", "volta", "70x"):
        with pytest.raises(ValueError, match=r"VLSCALE_CUDA_ARCHS has .*expected numbers from 70 on"):
            prebuild.architectures(wrong)


def test_what_cannot_be_compiled_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLSCALE_CUDA_ARCHS", "71")
    assert prebuild.main(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("vlscale: IPOT's CUDA kernels cannot be compiled: NVRTC cannot compile")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
