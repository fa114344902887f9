"""What ``--dist`` makes of the ranks' reports, the arithmetic of the all-reduce, and the variables of Slurm."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch

from tests.doctor.described import HEALTHY, WITHOUT_GPUS, changed
from vlscale.doctor import allreduce, compare, dist, slurm
from vlscale.doctor.allreduce import Measured
from vlscale.doctor.compare import RankReport
from vlscale.doctor.facts import Facts
from vlscale.doctor.findings import Finding
from vlscale.errors import VlscaleError
from vlscale.train.processes import Processes

WARNING = Finding("network", "name of this host", "warning", "is 127.0.0.1", "give it an address")
OK = Finding("system", "glibc", "ok", "2.36")


def report(
    rank: int, host: str = "", work_s: float = 1.0, findings: tuple[Finding, ...] = (), **odd: str
) -> RankReport:
    versions = {"torch": "2.10.0", "NCCL": "2.27.5"} | {name: odd[name] for name in odd if name in ("torch", "NCCL")}
    variables = {name: value for name, value in odd.items() if name.startswith("NCCL_")}
    return RankReport(
        host or f"node-{rank // 2}", rank, odd.get("device", "V100"), versions, variables, work_s, findings
    )


def found(reports: list[RankReport]) -> dict[str, Finding]:
    return {finding.name: finding for finding in compare.differences(reports)}


def test_equal_hosts() -> None:
    assert [finding.state for finding in compare.differences([report(rank) for rank in range(4)])] == ["ok"]


def test_a_version_that_differs_is_told_with_hosts_and_ranks() -> None:
    reports = [report(0), report(1), report(2), report(3, torch="2.9.1")]
    finding = found(reports)["torch"]
    assert finding.state == "failed"
    assert finding.text == "2.10.0 on node-0, node-1 (rank 2); 2.9.1 on node-1 (rank 3)"
    assert "first: node-1 (rank 3)" in finding.cure


def test_a_package_that_one_host_lacks() -> None:
    lacking = RankReport("node-9", 1, "V100", {"torch": "2.10.0"}, {}, 1.0)
    assert found([report(0), lacking])["NCCL"].text == "2.27.5 on node-0; missing on node-9"


def test_mixed_devices_and_variables_are_warnings() -> None:
    kinds = found([report(0), report(1, device="A100")])
    assert (kinds["devices"].state, kinds["devices"].text) == (
        "warning",
        "V100 on node-0 (rank 0); A100 on node-0 (rank 1)",
    )
    steered = found([report(0), report(1, NCCL_ALGO="Ring")])["NCCL_ALGO"]
    assert (steered.state, "not set on node-0 (rank 0); Ring" in steered.text) == ("warning", True)


def test_a_driver_is_compared_between_hosts_and_not_between_ranks() -> None:
    reports = [replace(report(rank), driver=None if rank % 2 else "535.1") for rank in range(4)]
    assert [finding.state for finding in compare.differences(reports)] == ["ok"]
    reports[2] = replace(reports[2], driver="550.2")
    assert (found(reports)["driver"].state, found(reports)["driver"].text) == (
        "failed",
        "535.1 on node-0; 550.2 on node-1",
    )


def test_lines_stay_short_on_128_hosts() -> None:
    """Also where every rank has a value of its own; ranks are told only where those of a host differ."""
    own = [report(rank, host=f"node-{rank // 8}", torch=f"2.{rank}") for rank in range(1024)]
    text = found(own)["torch"].text
    assert len(text) < 300
    assert text.startswith("2.0 on node-0 (rank 0); 2.1 on")
    assert text.endswith("; and 1020 more")
    half = [report(rank, host=f"node-{rank // 8}", torch=f"2.{rank // 8 % 2}") for rank in range(1024)]
    told = found(half)["torch"]
    assert told.text.startswith("2.0 on node-0, node-2, node-4, node-6, node-8 and 59 more; 2.1 on node-1,")
    assert "rank" not in told.text


def test_findings_of_many_hosts_are_told_once() -> None:
    reports = [report(0, findings=(WARNING, OK)), report(1), report(2, findings=(WARNING,))]
    (finding,) = compare.merged(reports)
    assert finding.text == "node-0, node-1: is 127.0.0.1"
    assert (finding.state, finding.cure) == (WARNING.state, WARNING.cure)


def test_findings_of_one_cure_are_one_line_on_128_hosts() -> None:
    slow = [replace(WARNING, text=f"10.0.0.{rank} in 0.9 s") for rank in range(128)]
    reports = [report(rank, host=f"node-{rank}", findings=(slow[rank],)) for rank in range(128)]
    (finding,) = compare.merged(reports)
    assert finding.text.startswith("node-0: 10.0.0.0 in 0.9 s; node-1: 10.0.0.1 in 0.9 s; ")
    assert finding.text.endswith("; and 124 more")


def test_a_slow_rank_and_wrong_sums() -> None:
    reports = [report(rank, work_s=2.0 if rank == 3 else 1.0) for rank in range(4)]
    lines = {finding.name: finding for finding in compare.judge_measured([Measured(1024, 1.0, 4, (2,))], reports)}
    assert lines["sums"].text == "wrong for 1,024 bytes on rank 2 on node-1"
    assert lines["sums"].state == "failed"
    assert lines["slow ranks"].text.startswith("3 on node-1 (2.0 times the median)")
    assert lines["slow ranks"].state == "warning"
    right = {finding.name: finding.state for finding in compare.judge_measured([Measured(1024, 1.0, 4)], reports[:3])}
    assert right == {"sums": "ok"}


class Half(Processes):
    """A rank of a run whose other ranks say nothing."""

    def barrier(self) -> None:
        pass

    def gather(self, item: object) -> list[object]:
        return [item]


def test_a_host_is_looked_at_by_its_first_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    few = changed(HEALTHY, "machine", limits={"open files": (600, 600)})
    looked: list[int | None] = []

    def look(processes: int | None = None) -> Facts:
        looked.append(processes)
        return few

    monkeypatch.setattr(dist, "gather", look)
    cpu, hosts = torch.device("cpu"), ["a"] * 64 + ["b"] * 64
    (first,) = dist._reports(Half(0, 128, cpu, hosts=hosts))
    (second,) = dist._reports(Half(1, 128, cpu, hosts=hosts))
    (other,) = dist._reports(Half(64, 128, cpu, hosts=hosts))
    assert looked == [64, 64]
    assert (first.driver, second.driver, second.findings) == (HEALTHY.graphics.driver, None, ())
    assert second.versions["torch"] == version("torch")
    assert second.device == first.device
    limit = [[one.state for one in rank.findings if one.name == "open files of rank 0"] for rank in (first, other)]
    assert limit == [["failed"], []]


def test_a_gpu_that_the_facts_lack_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at all GPUs of a host may fail where a rank's own GPU works."""
    monkeypatch.setattr(dist, "gather", lambda processes: WITHOUT_GPUS)
    monkeypatch.setattr(dist, "own_work", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"V100 {device.index}")
    (own,) = dist._reports(Half(0, 1, torch.device("cuda", 3), hosts=["a"]))
    assert own.device == "V100 3"


def test_a_rank_on_a_shared_cpu_is_as_fast_as_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of ten products are disturbed."""
    seconds = [9.0] * allreduce.WARM_UP + [5.0] * 8 + [1.0] * 2
    moments = iter(
        [moment for number, length in enumerate(seconds) for moment in (100.0 * number, 100.0 * number + length)]
    )
    monkeypatch.setattr(allreduce.time, "perf_counter", lambda: next(moments))
    assert allreduce.own_work(torch.device("cpu")) == 1.0


@pytest.mark.parametrize(("ranks", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5), (16, 1.875)])
def test_bandwidths(ranks: int, factor: float) -> None:
    """As nccl-tests defines them: the bus carries 2 (n - 1) / n of the tensor."""
    measured = Measured(1_000_000, 0.5, ranks)
    assert measured.algorithm_bandwidth == 2e6
    assert measured.bus_bandwidth == pytest.approx(2e6 * factor)


def test_sums_are_exact_and_a_swapped_rank_is_seen() -> None:
    for ranks in (1, 2, 7, 300):
        total = torch.stack([allreduce.values(rank, 1000) for rank in range(ranks)]).sum(0)
        assert torch.equal(total, allreduce.expected_sum(ranks, 1000))
    assert not torch.equal(allreduce.values(0, 1000) * 2, allreduce.expected_sum(2, 1000))
    with pytest.raises(ValueError, match="not exact"):
        allreduce.expected_sum(1 << 16, 4)


STEP = {
    "SLURM_JOB_ID": "81", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_GTIDS": "2,3", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_a_task_of_a_slurm_step_knows_its_rank() -> None:
    assert slurm.variables(STEP) == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20081",
    }  # fmt: skip
    told = slurm.variables(STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"})
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.9", "4000")


def test_what_a_launcher_has_set_stays() -> None:
    assert slurm.variables(STEP | {"RANK": "0", "WORLD_SIZE": "2"}) == {}
    assert slurm.variables({}) == {}
    assert slurm.variables({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "81"}) == {}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"SLURM_STEP_ID": "4294967291"}, "no launcher started this one: torchrun"),  # the batch script
        ({"SLURM_STEP_ID": ""}, "no launcher started this one"),
        ({"SLURM_PROCID": "x"}, "RANK is 'x'"),
        ({"SLURM_LOCALID": "1; rm"}, "LOCAL_RANK is '1; rm'"),
        ({"SLURM_STEP_NODELIST": "$(x)"}, "no list of hosts"),
    ],
)
def test_tasks_that_cannot_be_placed(changed: dict[str, str], expected: str) -> None:
    with pytest.raises(VlscaleError) as caught:
        slurm.variables(STEP | changed)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("gpu[007,9-11]", "gpu007"), ("r[3-4]-ib,x", "r3-ib"),
     ("a.b-c_d[12]", "a.b-c_d12")],
)  # fmt: skip
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert slurm.first_host(hosts) == first
