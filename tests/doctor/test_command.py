"""``vlscale doctor`` on this very machine: what it prints, the JSON that programs read, its exit status."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.doctor.described import HEALTHY
from vlscale.cli import main
from vlscale.doctor import gather, gpus, kernels, network, system
from vlscale.doctor.facts import Facts, Gpu
from vlscale.doctor.findings import MIB
from vlscale.kernels.ipot import backends, compiled_files, cuda_sources, native, nvrtc

ROOT = Path(__file__).resolve().parents[2]
SLOWEST_PROBE_S = 30.0  # 4 s on a quiet machine, most of them for importing PyTorch


@pytest.fixture(scope="module")
def probe() -> tuple[dict[str, Any], str, float]:
    """What ``python -m vlscale.doctor --json`` says in a process of its own, the text, and its seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "vlscale.doctor", "--json"], capture_output=True, text=True, cwd="/", timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_API_KEY": "planted-secret", "NCCL_DEBUG": "W" * 5000},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), done.stdout, time.monotonic() - start


def test_the_probe_is_one_small_json_object_without_secrets(probe: tuple[dict[str, Any], str, float]) -> None:
    found, text, seconds = probe
    assert seconds < SLOWEST_PROBE_S
    assert len(text) < 100_000
    assert "planted-secret" not in text
    assert found["network"]["variables"]["NCCL_DEBUG"] == "W" * network.LONGEST


def test_the_probe_has_what_a_preflight_compares(probe: tuple[dict[str, Any], str, float]) -> None:
    found, _, _ = probe
    assert found["host"]
    assert found["packages"]["numpy"].startswith("2.")
    assert set(found["packages"]) >= {"torch", "deepspeed", "mosaicml-streaming", "numpy"}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["vlscale"]
    assert found["commit"] is None or len(found["commit"].partition("+")[0]) == 40
    assert [set(gpu) for gpu in found["gpus"]] == [{"name", "arch", "memory_bytes", "used_bytes", "mode"}] * len(
        found["gpus"]
    )
    assert all(arch.startswith(("sm_", "compute_")) for arch in found["arch_list"])
    assert bool(found["arch_list"]) == (torch.version.cuda is not None)
    for finding in found["findings"]:
        assert set(finding) == {"section", "name", "state", "text", "cure"}
        assert finding["state"] in ("ok", "warning", "failed")
        assert (finding["state"] == "ok") == (finding["cure"] == "")


def test_the_probe_tells_what_runs_on_every_device(probe: tuple[dict[str, Any], str, float]) -> None:
    found, _, _ = probe
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["ipot"] == ("cpu" if native.load()[0] else "reference")
    assert "NVIDIA" in cpu["ipot_not"]["triton"]
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["compiling"]["cache"] == str(compiled_files.cache_folder())
    assert found["compiling"]["nvrtc"] == ".".join(map(str, nvrtc.version()))
    assert found["compiling"]["compiler"] == shlex.join(native.compiler())


@pytest.fixture(scope="module")
def here() -> Facts:
    return gather.gather()


def test_facts_of_this_machine(here: Facts) -> None:
    soft = here.machine.limits["open files"][0]
    assert soft is None or soft > 0
    assert here.machine.glibc is None or here.machine.glibc[0] == "2"
    assert here.software.torch_error is None
    assert [interface for interface in here.network.interfaces if interface.address == "127.0.0.1"]
    assert here.machine.processes >= 2
    assert {folder.variable for folder in here.machine.folders} == {"TMPDIR", "TORCH_EXTENSIONS_DIR", "VLSCALE_CACHE"}
    assert here.accelerator == (
        "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    )


@pytest.mark.parametrize(
    ("status", "changed", "summary"),
    [
        (0, {}, "0 warnings, 0 failed"),
        (0, {"memory_available": 1 << 30}, "1 warning, 0 failed"),
        (1, {"glibc": "2.17"}, "0 warnings, 1 failed"),
    ],
)
def test_text_in_a_pipe_is_plain_and_the_status_tells(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    changed: dict[str, Any],
    summary: str,
) -> None:
    from tests.doctor import described

    facts = described.changed(HEALTHY, "machine", **changed)
    monkeypatch.setattr(gather, "gather", lambda: facts)
    assert main(["doctor"]) == status
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert said.startswith("node-1\nversions\n  ok      python")
    assert said.rstrip().endswith(f"ok, {summary}")
    assert ("  failed  glibc" in said) == bool(status)
    assert ("cure: run inside a container" in said) == bool(status)


def test_without_a_compiler_the_lines_say_so(here: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    backends._fastest.cache_clear()
    try:
        device = kernels.devices(0)[0]
        compiling = kernels.compiling()
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
        backends._fastest.cache_clear()
    assert device["ipot"] == "reference"
    assert "no C++ compiler found (looked for no-such-compiler)" in device["ipot_not"]["cpu"]
    assert compiling["compiler"].startswith("none: no C++ compiler found")


@pytest.mark.parametrize(
    ("named", "expected"),
    [("no-such-compiler", "no-such-compiler is not on PATH"), ("false", "exit status 1"), ("g++ -I'", "not on PATH")],
)
def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch, named: str, expected: str) -> None:
    monkeypatch.setenv("CXX", named)
    assert expected in system.building().compiler_error


def test_headers_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.sysconfig, "get_path", lambda name: "/nowhere")
    error = system.building().compiler_error
    assert "Python.h" in error or "not on PATH" in error


def test_the_folder_of_operators_is_pytorchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    theirs = Path(cpp_extension._get_build_directory("probe", verbose=False))
    assert system.extensions_folder() == theirs.parent
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert system.extensions_folder() == tmp_path / "mine"


def test_a_lock_and_a_compiled_operator_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert (system.building().lock, system.building().operator) == ("", "")
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    for name in ("lock", "deepspeed_shm_comm.so"):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 3600,) * 2)
    found = system.building()
    assert (found.lock, found.operator) == (str(folder / "lock"), str(folder / "deepspeed_shm_comm.so"))
    assert found.lock_age_s == pytest.approx(3600, abs=60)


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file/below"))
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "file"))
    problems = {folder.variable: folder.problem for folder in system.machine(0).folders}
    assert "is no folder" in problems["TORCH_EXTENSIONS_DIR"]
    assert "VLSCALE_CACHE" in problems["VLSCALE_CACHE"]


def test_a_program_that_hangs_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SECONDS", 0.2)
    assert system.ask(["sleep", "5"]) == (-1, "sleep did not end within 0.2 s")
    assert system.ask(["no-such-program"])[0] == -1


def test_what_nvidia_smi_prints_is_read_and_rubbish_is_not() -> None:
    said = (
        "Tesla V100-SXM2-32GB, 32768, 30000, Exclusive_Process, 535.104.05, 7.0\n"
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb, 40960, [N/A], Default, 535.104.05, 8.0\n"
        "Unable to determine the device handle for GPU 0000:3B:00.0\n"
    )
    driver, found = gpus.parse_smi(said)
    assert driver == "535.104.05"
    assert found == (
        Gpu("Tesla V100-SXM2-32GB", "sm_70", 32768 * MIB, 30000 * MIB, "Exclusive_Process"),
        Gpu("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "sm_80", 40960 * MIB, None, "Default"),
    )
    assert gpus.parse_smi("Tesla K80, 11441, 0, Default, 390.1\n") == (
        "390.1",
        (Gpu("Tesla K80", "", 11441 * MIB, 0, "Default"),),
    )
    assert gpus.parse_smi("") == (None, ())


def asked(folder: Path) -> int:
    """How often the planted nvidia-smi ran."""
    return len((folder / "asked").read_text(encoding="utf-8").splitlines())


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts an nvidia-smi of given shell commands in front of PATH."""

    def plant(commands: str) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/asked\n{commands}\n', encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(gpus, "_torch_gpus", tuple)
        return tmp_path

    return plant


def test_a_broken_driver_is_told(planted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planted("echo 'Failed to initialize NVML: Driver/library version mismatch'; echo more; exit 18")
    found = gpus.graphics()
    assert found.driver_error == "Failed to initialize NVML: Driver/library version mismatch"
    assert (found.driver, found.driver_gpus, asked(folder)) == (None, (), 1)
    facts = replace(HEALTHY, graphics=found)
    monkeypatch.setattr(gather, "gather", lambda: facts)
    assert main(["doctor"]) == 1


def test_a_driver_that_hangs_is_asked_once(planted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SECONDS", 0.5)
    folder = planted("exec sleep 5")
    assert gpus.graphics().driver_error == "nvidia-smi did not end within 0.5 s"
    assert asked(folder) == 1


def test_an_old_driver_is_asked_again_without_what_it_does_not_know(planted: Callable[[str], Path]) -> None:
    folder = planted(
        'case "$*" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\'; exit 2;; esac\n'
        "echo 'Tesla K80, 11441, 0, Default, 390.1'"
    )
    found = gpus.graphics()
    assert (found.driver, len(found.driver_gpus), found.driver_error, asked(folder)) == ("390.1", 1, "", 2)


@pytest.mark.parametrize(
    ("said", "status", "error"),
    [
        ("No devices were found", 6, "No devices were found"),
        ("No devices were found", 0, "No devices were found"),
        ("", 9, "exit status 9"),
        ("Tesla V100, 32768, 0, Default, 535.1, 7.0\nUnable to determine the device handle: GPU is lost", 15,
         "Unable to determine the device handle: GPU is lost"),
        ("NVIDIA GB10, [N/A], [N/A], Default, 580.95, 12.1", 0, ""),
    ],
)  # fmt: skip
def test_what_nvidia_smi_complains_of(planted: Callable[[str], Path], said: str, status: int, error: str) -> None:
    planted(f"cat <<'END'\n{said}\nEND\nexit {status}")
    assert gpus.graphics().driver_error == error


def test_files_of_gpus_that_nobody_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "_DEVICES", tmp_path)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus.graphics().device_files == (f"{tmp_path}/nvidia0", f"{tmp_path}/nvidia1")


def test_interfaces_and_infiniband_are_read_from_sysfs(tmp_path: Path) -> None:
    port = tmp_path / "ib/mlx5_0/ports/1"
    port.mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE"), ("link_layer", "InfiniBand"), ("rate", "100 Gb/sec (4X EDR)")):
        (port / name).write_text(f"{text}\n", encoding="ascii")
    (found,) = network.infiniband(tmp_path / "ib")
    assert (found.device, found.port, found.state, found.link) == ("mlx5_0", "1", "ACTIVE", "InfiniBand")
    for name, flags in (("up0", "0x1003"), ("down0", "0x1002")):
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "flags").write_text(flags, encoding="ascii")
    (tmp_path / "net/bonding_masters").touch()
    assert [(one.name, one.up) for one in network.interfaces(tmp_path / "net")] == [("down0", False), ("up0", True)]
    assert network.interfaces(tmp_path / "nowhere") == network.infiniband(tmp_path / "nowhere") == ()


def test_names_that_do_not_resolve() -> None:
    assert "127.0.0.1" in network.addresses_of("localhost")
    assert network.addresses_of("no-such-host.invalid") == ()
    assert network.addresses_of("\udcff") == ()


def test_a_slow_resolver_is_timed_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.lookup_seconds("127.0.0.1") < network._RESOLVING_S
    monkeypatch.setattr(network, "_RESOLVING_S", 0.3)
    release = threading.Event()
    monkeypatch.setattr(socket, "getnameinfo", lambda *ignored: release.wait(10))
    start = time.monotonic()
    seconds = network.lookup_seconds("10.0.0.1")
    assert 0.25 < seconds <= time.monotonic() - start < 5
    release.set()


def test_the_address_that_others_see() -> None:
    assert network.outside(("127.0.1.1", "", "::1", "10.0.0.1", "10.0.0.2")) == "10.0.0.1"
    assert network.outside(("127.0.0.1", "fe80::1%eth0")) == "fe80::1%eth0"
    assert network.outside(()) == ""
    found = network.network()
    assert bool(found.own_address) == bool(found.lookup_s)


def test_the_number_of_processes_is_told_or_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [(one.processes, one.assumed) for one in (system.machine(0), system.machine(4), system.machine(0, 3))] == [
        (2, True), (4, True), (3, False),
    ]  # fmt: skip
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert (system.machine(0).processes, system.machine(0).assumed) == (6, False)


def test_tells_prebuilt_kernels_from_those_compiled_at_first_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(nvrtc, "PREBUILT", tmp_path)
    monkeypatch.setattr(cuda_sources, "is_prebuilt", lambda architecture: architecture == "sm_70")
    assert kernels.kernels_of("cuda", "sm_70") == f"prebuilt for sm_70, {tmp_path}"
    assert kernels.kernels_of("cuda", "sm_80") == "compiled at first use by NVRTC for sm_80"
    assert "by Triton" in kernels.kernels_of("triton", "sm_80")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--jsn"], "--jsn"),
        (["--clean", "--dist"], "exclude each other"),
        (["--join_timeout", "inf"], "expected seconds"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def test_a_broken_pytorch_is_told_and_does_not_stop_the_doctor(tmp_path: Path) -> None:
    """A torch that cannot be imported stands in front of the real one."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    done = subprocess.run(
        [sys.executable, "-m", "vlscale.doctor"], capture_output=True, text=True, timeout=120, cwd="/",
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "failed  torch" in done.stdout
    assert "libcudart.so.12" in done.stdout
    assert "cure: pip install -c launch/env/v100.txt torch torchvision" in done.stdout
