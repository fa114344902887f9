"""The pinned environments: complete, consistent with what the packages themselves ask for, and each for its GPUs."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = {"v100": ("3.10", "3.11", "3.12"), "hopper": ("3.12",)}
CASES = [(name, python) for name, pythons in PYTHONS.items() for python in pythons]


def pins_of(name: str, python: str) -> dict[str, Version]:
    """Package -> version on Linux, x86-64."""
    machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found: dict[str, Version] = {}
    for line in (ROOT / f"launch/env/{name}.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            if pin.marker is None or pin.marker.evaluate({**machine, "platform_machine": "x86_64"}):
                assert canonicalize_name(pin.name) not in found, f"{pin.name} is pinned twice"
                found[canonicalize_name(pin.name)] = Version(specifier.version)
    return found


def wanted() -> list[Requirement]:
    """What setup.py asks for, extras included."""
    lists = re.findall(
        r"^[A-Z]+ = \[(.*?)\]$", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [Requirement(text) for words in lists for text in re.findall(r'"([^"]+)"', words)]


@pytest.mark.parametrize(("name", "python"), CASES)
def test_every_requirement_is_pinned_to_a_version_that_suits_it(name: str, python: str) -> None:
    pins, requirements = pins_of(name, python), wanted()
    assert {"torch", "deepspeed", "scipy"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize(("name", "python"), CASES)
def test_pins_obey_the_metadata_of_streaming_and_deepspeed(name: str, python: str) -> None:
    pins = pins_of(name, python)
    for package in ("mosaicml-streaming", "deepspeed"):
        assert pins[package] == Version(metadata.version(package)), "the metadata read here are of another version"
        for text in metadata.requires(package) or []:
            requirement = Requirement(text)
            if requirement.marker is None:
                assert pins[canonicalize_name(requirement.name)] in requirement.specifier, f"{package}: {requirement}"


def test_each_set_is_for_its_gpus() -> None:
    v100, hopper = pins_of("v100", "3.11"), pins_of("hopper", "3.12")
    assert v100["torch"] < Version("2.11"), "2.11's default wheels have no sm_70 kernels"
    assert v100["nvidia-cudnn-cu12"] < Version("9.11"), "cuDNN 9.11 has none for Volta"
    assert (hopper["torch"], hopper["triton"]) == (Version("2.11.0"), Version("3.6.0"))
    assert hopper["nvidia-cudnn-cu13"] >= Version("9.19")


def test_the_sets_differ_in_what_their_heads_say() -> None:
    """Torch, torchvision, setuptools and the CUDA packages alone."""
    v100, hopper = pins_of("v100", "3.12"), pins_of("hopper", "3.12")
    both = v100.keys() & hopper.keys()
    assert {name for name in both if v100[name] != hopper[name]} == {
        "torch",
        "torchvision",
        "setuptools",
        "cuda-bindings",
    }
    alone = {re.sub(r"-cu1[23]$", "", name) for name in v100.keys() ^ hopper.keys()}
    assert all(name.startswith(("nvidia-", "cuda-")) for name in alone)
