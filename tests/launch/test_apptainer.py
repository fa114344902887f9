"""The Apptainer definition, without Apptainer: its sections, the files it copies, and what it installs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {"files", "post", "environment", "test", "runscript"}


@pytest.fixture(scope="module")
def definition() -> dict[str, str]:
    """Section -> its lines; the header is ``""``."""
    text = (ROOT / "launch/apptainer/vlscale.def").read_text(encoding="utf-8")
    header, *rest = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"": header, **dict(zip(rest[::2], rest[1::2], strict=True))}


def copied(definition: dict[str, str]) -> dict[str, str]:
    """Path in the project -> path in the image."""
    return dict(line.split() for line in definition["files"].splitlines() if line.strip())


def test_the_base_is_pinned(definition: dict[str, str]) -> None:
    assert definition.keys() == SECTIONS | {""}
    fields = dict(re.findall(r"^(\w+): (\S+)$", definition[""], re.MULTILINE))
    assert fields["Bootstrap"] == "docker"
    assert re.fullmatch(r"debian:\d+\.\d+-slim", fields["From"])


def test_every_file_that_is_copied_exists(definition: dict[str, str]) -> None:
    for source, target in copied(definition).items():
        assert (ROOT / source).exists(), source
        assert target.startswith("/opt/vlscale/")


def test_what_setup_py_reads_is_copied(definition: dict[str, str]) -> None:
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md", "vlscale", "data_tools"}
    assert needed <= copied(definition).keys()
    assert set(re.findall(r'HERE / "([\w.]+)', (ROOT / "setup.py").read_text(encoding="utf-8"))) <= needed | {"vlscale"}


def test_every_install_obeys_the_constraints(definition: dict[str, str]) -> None:
    post = definition["post"]
    constraints = copied(definition)["launch/env/v100.txt"]
    assert f"--constraint {constraints}" in post
    assert post.count("pip install") == 1, "another pip than the one with the constraints"
    installs = re.findall(r"^ *\$pip (.*)$", post, re.MULTILINE)
    assert installs[0].split()[0] == "torch", "DeepSpeed is built against PyTorch"
    extras = re.search(r"source\[([\w,]+)\]", installs[1])
    assert extras
    defined = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(f'"{extra}":' in defined for extra in extras[1].split(","))
    for name in installs[0].split():
        pinned = (ROOT / "launch/env/v100.txt").read_text(encoding="utf-8")
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), f"{name} is not pinned"


@pytest.mark.parametrize("section", sorted(SECTIONS - {"files"}))
def test_the_sections_are_shell(definition: dict[str, str], section: str) -> None:
    subprocess.run(["sh", "-n"], input=definition[section], text=True, check=True, timeout=20)


def test_python_is_one_that_the_project_takes(definition: dict[str, str]) -> None:
    """Debian 12 has Python 3.11."""
    assert definition[""].split("From: debian:")[1].startswith("12.")
    assert 'python_requires=">=3.10"' in (ROOT / "setup.py").read_text(encoding="utf-8")
