"""Every line that can warn or fail, with its cure, on machines that are described and need not be broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.doctor.described import (
    DEVICE,
    H100,
    HEALTHY,
    MACHINE,
    NETWORK,
    V100_32,
    WITHOUT_GPUS,
    changed,
    with_gpus,
    with_packages,
)
from vlscale.doctor import pins
from vlscale.doctor.check_machine import files_of_rank_0
from vlscale.doctor.examination import judge
from vlscale.doctor.facts import Facts, Folder, Graphics, InfinibandPort, Interface, Leftover
from vlscale.doctor.findings import GIB, MIB, Finding, Section, counted, duration, exit_status, size

ROOT = Path(__file__).resolve().parents[2]
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"
TOO_NEW = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
BUFFER = Leftover("/dev/shm/deepspeed_allreduce_buffer_1000_a_1_0", "DeepSpeed", "g", 1, 1000, 66 * MIB, 7200.0, False)


def building(facts: Facts = WITHOUT_GPUS, **values: object) -> Facts:
    return changed(facts, "building", **values)


def machine(facts: Facts = HEALTHY, **values: object) -> Facts:
    return changed(facts, "machine", **values)


def limit(name: str, soft: int | None, hard: int | None) -> Facts:
    return machine(limits=dict(MACHINE.limits) | {name: (soft, hard)})


def network(**values: object) -> Facts:
    return changed(HEALTHY, "network", **values)


def variable(name: str, value: str) -> Facts:
    return network(variables={name: value})


def folder(free: int | None, problem: str = "") -> Facts:
    return machine(folders=(Folder("temporary files", "TMPDIR", "/tmp", free, problem),))


def software(facts: Facts = HEALTHY, **values: object) -> Facts:
    return changed(facts, "software", **values)


def unseen(**values: object) -> Facts:
    return software(changed(HEALTHY, "graphics", torch_gpus=()), **values)


def broken(**values: object) -> Facts:
    """A machine that would pass for one without GPUs, but for the values."""
    return changed(WITHOUT_GPUS, "graphics", **values)


CASES = [
    # facts, name of the line, state, words of the text, words of the cure
    (software(python="3.9.18"), "python", "failed", "3.9.18", "install Python 3.10"),
    (software(torch_error="OSError: libcudart.so"), "torch", "failed", "libcudart", "-c launch/env/v100.txt"),
    (with_packages(HEALTHY, torch=None), "torch", "failed", "not installed", "-c launch/env/v100.txt torch"),
    (with_packages(HEALTHY, torch="2.6.0"), "torch", "failed", "needs 2.7", "launch/env/v100.txt"),
    (with_packages(HEALTHY, torch="2.9.1"), "torch", "warning", "vlscale pins 2.10.0 (launch", "launch/env/v100.txt"),
    (with_packages(HEALTHY, torch="2.9.1"), "torch.load", "warning", "CVE-2026-24747", "2.10 or newer"),
    (with_packages(HEALTHY, deepspeed=None), "deepspeed", "failed", "training needs it", "deepspeed"),
    (with_packages(HEALTHY, deepspeed="0.17.0"), "deepspeed", "failed", "needs 0.19.8", "deepspeed"),
    (with_packages(HEALTHY, numpy="1.26.4"), "numpy", "failed", "needs 2.1", "numpy"),
    (with_packages(HEALTHY, transformers=None), "transformers", "warning", "vlscale.hf alone", "transformers"),
    (with_packages(HEALTHY, triton="3.3.1"), "triton", "warning", "3.3.1; vlscale pins", "torch torchvision"),
    (with_packages(HEALTHY, mosaicml_streaming=None), "mosaicml-streaming", "warning", "datasets", "streaming"),
    (with_packages(HEALTHY, transformers="5.0.0"), "streaming and transformers", "warning", "< 5", "transformers"),
    (with_packages(HEALTHY, numpy="2.2.0"), "streaming and numpy", "warning", "< 2.2", "numpy"),
    (software(cudnn="9.11.0"), "cuDNN", "failed", "no kernels for sm_70", "brings 9.10"),
    (software(nccl="2.28.9"), "NCCL on V100", "warning", "2.28.9", "2.27.5"),
    (software(arch_list=TOO_NEW), "architecture", "failed", "is sm_70, but torch", "-c launch/env/v100.txt"),
    (changed(HEALTHY, "graphics", driver="470.57.02"), "driver", "failed", "too old for CUDA 12.8", "525.60.13"),
    (unseen(), "GPUs", "failed", "driver shows 8, PyTorch sees none", "torch.zeros(1).cuda()"),
    (broken(driver_error=MISMATCH), "GPUs", "failed", MISMATCH, "reboot, or reload the driver"),
    (broken(device_files=("/dev/nvidia0",)), "GPUs", "failed", "/dev has /dev/nvidia0, PyTorch sees none", "--nv"),
    (changed(broken(driver_error=MISMATCH), "network", variables={"DS_ACCELERATOR": "cpu"}), "GPUs", "warning",
     MISMATCH, "--gpus all"),
    (changed(HEALTHY, "graphics", driver_error=MISMATCH), "nvidia-smi", "warning", "though PyTorch sees 8", "reboot"),
    (unseen(cuda=None), "GPUs", "failed", "built without CUDA", "launch/env/v100.txt"),
    (unseen(torch_error="ImportError: x"), "GPUs", "failed", "cannot be imported", "launch/env/v100.txt"),
    (changed(unseen(), "network", variables={"CUDA_VISIBLE_DEVICES": ""}), "GPUs", "warning", "hides", "unset CUDA"),
    (with_gpus(replace(V100_32, used_bytes=20 * GIB)), "GPUs in use", "warning", "0 (20.0 GiB)", "nvidia-smi"),
    (with_gpus(replace(V100_32, mode="Prohibited")), "compute mode", "failed", "nothing may", "nvidia-smi -c DEFAULT"),
    (with_gpus(replace(V100_32, mode="Exclusive_Process")), "compute mode", "warning", "one process", "-c DEFAULT"),
    (replace(HEALTHY, devices=({"device": "cuda", "error": "no kernel image"},)), "kernels on cuda", "failed",
     "no kernel image", "GPUs and versions first"),
    (replace(HEALTHY, devices=(DEVICE | {"ipot": "reference", "ipot_not": {"cuda": "no NVRTC"}},)), "IPOT on cuda:0",
     "warning", "not cuda: no NVRTC", "install g++"),
    (network(addresses=()), "name of this host", "warning", "resolves to nothing", "/etc/hosts"),
    (network(addresses=("127.0.1.1", "::1")), "name of this host", "warning", "127.0.1.1", "--master_addr"),
    (network(own_address="10.0.0.1", lookup_s=0.6), "name of its address", "warning", "10.0.0.1 in 0.60 s", "PTR"),
    (network(interfaces=(Interface("eth0", False), Interface("lo", True, "127.0.0.1"))), "interfaces", "warning",
     "none is up", "ip link"),
    (variable("NCCL_SOCKET_IFNAME", "ib"), "NCCL_SOCKET_IFNAME", "failed", "'ib'", "eth0, lo"),
    (variable("NCCL_SOCKET_IFNAME", "=eth"), "NCCL_SOCKET_IFNAME", "failed", "'=eth'", "eth0, lo"),
    (variable("NCCL_SOCKET_IFNAME", "^eth,lo"), "NCCL_SOCKET_IFNAME", "failed", "no interface", "unset"),
    (variable("GLOO_SOCKET_IFNAME", "eth"), "GLOO_SOCKET_IFNAME", "failed", "'eth'", "eth0, lo"),
    (variable("NCCL_P2P_DISABLE", "1"), "NCCL_P2P_DISABLE", "warning", "slower", "unset NCCL_P2P_DISABLE"),
    (variable("NCCL_SHM_DISABLE", "1"), "NCCL_SHM_DISABLE", "warning", "slower", "unset NCCL_SHM_DISABLE"),
    (variable("NCCL_IB_DISABLE", "1"), "InfiniBand", "warning", "NCCL_IB_DISABLE=1", "unset NCCL_IB_DISABLE"),
    (variable("NCCL_IB_HCA", "=mlx5_7:1"), "NCCL_IB_HCA", "failed", "mlx5_7", "correct it"),
    (network(infiniband=(InfinibandPort("mlx5_0", "1", "DOWN", "InfiniBand"),)), "InfiniBand", "warning", "no port",
     "ibstat"),
    (building(compiler_error="omp.h: No such file"), "compiler", "failed", "omp.h", "install g++"),
    (building(HEALTHY, compiler_error="c++ is not on PATH"), "compiler", "warning", "not on PATH", "set CXX"),
    (building(ninja=""), "ninja", "failed", "not on PATH", "pip install ninja"),
    (building(HEALTHY, ninja=""), "ninja", "warning", "not on PATH", "pip install ninja"),
    (building(lock="/c/lock", lock_age_s=7200.0), "lock", "failed", "/c/lock is 2 hours old", "rm /c/lock"),
    (building(HEALTHY, toolkit="11.8"), "CUDA toolkit", "warning", "11.8, but torch", "CUDA_HOME"),
    (machine(shm_total=None), "/dev/shm", "failed", "is not there", "mount -t tmpfs"),
    (machine(shm_total=64 * MIB, shm_free=64 * MIB), "/dev/shm", "failed", "64 MiB free", "--shm-size=8g"),
    (machine(shm_free=512 * MIB), "/dev/shm", "warning", "512 MiB free", "remount"),
    (machine(WITHOUT_GPUS, shm_free=500 * MIB), "/dev/shm", "failed", "8 processes on a CPU need 528 MiB", "remount"),
    (machine(shm_free=MIB, leftovers=(BUFFER,)), "/dev/shm", "failed", "1 MiB free", "vlscale doctor --clean; mount"),
    (machine(memory_available=GIB), "memory", "warning", "1 GiB available", "--mem"),
    (machine(leftovers=(BUFFER,)), "leftovers", "warning", "1 file of DeepSpeed, 66 MiB, up to 2 hours old",
     "vlscale doctor --clean"),
    (machine(leftovers=(BUFFER,), unseen=("python (7)",)), "leftovers", "warning", "66 MiB", "after these have ended"),
    (machine(leftovers=(replace(BUFFER, owner=54321),)), "leftovers of others", "warning", "user 54321",
     "let user 54321 run"),
    (machine(glibc="2.17"), "glibc", "failed", "2.17, but", "Apptainer"),
    (machine(glibc=None), "glibc", "failed", "another C library", "Apptainer"),
    (limit("open files", 256, 1 << 20), "open files", "failed", "at most 256", "ulimit -n 65536"),
    (limit("open files", 1024, 2048), "open files", "warning", "at most 1,024", "ulimit -n 2048; if that"),
    (limit("open files", 1024, 1024), "open files", "warning", "at most 1,024", "nofile in /etc/security/limits.conf"),
    (limit("processes", 100, None), "processes", "failed", "at most 100", "ulimit -u 65536"),
    (limit("locked memory", 64 << 10, 64 << 10), "locked memory", "failed", "64 KiB", "memlock unlimited"),
    (limit("locked memory", GIB, GIB), "locked memory", "warning", "for InfiniBand", "--ulimit memlock=-1"),
    (folder(MIB), "temporary files", "failed", "only 1 MiB free", "set TMPDIR"),
    (folder(500 * MIB), "temporary files", "warning", "only 500 MiB free", "set TMPDIR"),
    (folder(None, "/tmp cannot be written to"), "temporary files", "failed", "cannot be written", "set TMPDIR"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "name", "state", "text", "cure"), CASES, ids=[f"{case[1]}-{number}" for number, case in enumerate(CASES)]
)
def test_a_bad_line_says_what_is_wrong_and_how_to_cure_it(
    facts: Facts, name: str, state: str, text: str, cure: str
) -> None:
    findings = judge(facts)
    (found,) = [finding for finding in findings if finding.name == name]
    assert found.state == state, found
    assert text in found.text
    assert cure in found.cure
    assert exit_status(findings) == 1 if state == "failed" else True


@pytest.mark.parametrize("facts", [HEALTHY, WITHOUT_GPUS], ids=["V100s", "CPU"])
def test_nothing_is_wrong_with_a_healthy_machine(facts: Facts) -> None:
    findings = judge(facts)
    assert [finding for finding in findings if finding.state != "ok"] == []
    assert exit_status(findings) == 0
    assert len(findings) > 20


def test_warnings_alone_are_no_failure() -> None:
    assert exit_status(judge(with_packages(HEALTHY, transformers=None))) == 0


def test_a_number_of_processes_that_nobody_told_is_called_assumed() -> None:
    texts = {
        assumed: next(found.text for found in judge(machine(WITHOUT_GPUS, assumed=assumed)) if found.name == "/dev/shm")
        for assumed in (True, False)
    }
    assert "8 processes on a CPU (assumed) need" in texts[True]
    assert "8 processes on a CPU need" in texts[False]


@pytest.mark.parametrize(
    ("limit", "ranks", "cure"),
    [
        ((1024, 1 << 20), 513, "ulimit -n 65536"),
        ((1024, 1100), 1024, "ulimit -n 1100; if that is not enough, nofile in"),
        ((70_000, None), 70_000, "ulimit -n 70512"),
    ],
)
def test_rank_0_needs_a_file_for_every_rank(limit: tuple[int, int | None], ranks: int, cure: str) -> None:
    (found,) = files_of_rank_0(limit, ranks)
    assert found.state == "failed"
    assert f"at most {limit[0]:,}, and with {ranks:,} ranks" in found.text
    assert cure in found.cure
    assert list(files_of_rank_0(limit, limit[0] - 512)) == list(files_of_rank_0((None, None), ranks)) == []


def test_every_bad_line_carries_a_cure_by_construction() -> None:
    with pytest.raises(ValueError, match="without cure"):
        Section("s").failed("name", "text", "")
    with pytest.raises(ValueError, match="has a cure"):
        Finding("s", "name", "ok", "text", "cure")


def test_ok_lines_where_a_fact_is_harmless() -> None:
    """What fails on other machines, and must not here."""
    harmless = {
        "locked memory": changed(
            limit("locked memory", 65536, 65536), "network", infiniband=()
        ),
        "NCCL_SOCKET_IFNAME": variable("NCCL_SOCKET_IFNAME", "^docker,lo"),
        "leftovers": machine(leftovers=(replace(BUFFER, in_use=True),)),
        "name of its address": network(own_address="10.0.0.1", lookup_s=0.4),
        "CUDA toolkit": building(HEALTHY, toolkit=""),
        "architecture": with_gpus(H100),
    }  # fmt: skip
    for name, facts in harmless.items():
        (found,) = [finding for finding in judge(facts) if finding.name == name]
        assert found.state == "ok", found
    young = building(lock="/c/lock", lock_age_s=30.0)
    assert "lock" not in [finding.name for finding in judge(young)]


@pytest.mark.parametrize(
    ("arch_list", "gpu", "runs"),
    [
        (("sm_70", "sm_80"), "sm_70", True),
        (TOO_NEW, "sm_70", False),
        (("sm_80",), "sm_86", True),  # a later minor version of the same major one
        (("sm_86",), "sm_80", False),
        (("sm_80",), "sm_90", False),
        (("sm_80", "compute_80"), "sm_90", True),  # PTX is compiled by the driver
        (("sm_90a",), "sm_90", True),
        (("sm_100a",), "sm_103", False),  # the letter binds
        (("sm_100",), "sm_103", True),
        ((), "sm_70", False),
    ],
)
def test_which_gpu_a_wheel_serves(arch_list: tuple[str, ...], gpu: str, runs: bool) -> None:
    assert pins.serves(arch_list, gpu) is runs


def test_a_gpu_of_an_unknown_kind_is_no_failure() -> None:
    unknown = replace(V100_32, arch="")
    facts = changed(HEALTHY, "graphics", torch_gpus=(), driver_gpus=(unknown,))
    assert [found.state for found in judge(facts) if found.name == "architecture"] == ["ok"]
    assert [found.text for found in judge(replace(facts, graphics=Graphics())) if found.name == "GPUs"] == [
        "none; training runs on the CPU"
    ]


@pytest.mark.parametrize("file", pins.PINS)
def test_pins_are_those_of_the_constraints(file: str) -> None:
    constraints = pins.read_constraints((ROOT / file).read_text(encoding="utf-8"))
    assert pins.PINS[file] == {name: constraints[name] for name in pins.PACKAGES}


def test_the_least_versions_are_those_of_setup_py() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name, version in pins.LEAST.items():
        assert f'"{name}>={version}"' in text
    assert f'python_requires=">={pins.LEAST_PYTHON}"' in text


def test_newer_gpus_have_a_newer_set_beside_the_older_one() -> None:
    for version in ("2.10.0", "2.11.0+cu130"):
        facts = with_packages(with_gpus(H100), torch=version)
        assert [found.state for found in judge(facts) if found.name == "torch"] == ["ok"]
    (found,) = [found for found in judge(with_packages(HEALTHY, torch="2.11.0")) if found.name == "torch"]
    assert found.state == "warning"  # on V100s


def test_versions_are_compared_as_numbers() -> None:
    assert pins.older("2.9.1", "2.10")
    assert not pins.older("2.10.0+cu128", "2.10.0")
    assert pins.older("", "1")
    assert pins.release("535.104.05") == (535, 104, 5)


def test_sizes_and_ages_for_people() -> None:
    assert (counted(0, "file"), counted(1, "file"), counted(2, "file")) == ("0 files", "1 file", "2 files")
    assert (size(66 * MIB), size(3 * GIB // 2), size(10)) == ("66 MiB", "1.5 GiB", "10 bytes")
    assert (duration(5), duration(7200), duration(3 * 86400)) == ("5 seconds", "2 hours", "3 days")


def test_words_from_outside_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from vlscale.doctor import text

    facts = replace(HEALTHY, network=replace(NETWORK, variables={"NCCL_DEBUG": "\x1b[2Jx\ny"}))
    text.show(judge(facts), text.console())
    said = capsys.readouterr().out
    assert "NCCL_DEBUG=\\x1b[2Jx\\ny" in said
    assert "\x1b" not in said
