"""What ``--dist`` makes of the ranks' reports, the arithmetic of the all-reduce, and the variables of Slurm."""

from __future__ import annotations

import pytest
import torch

from vlscale.doctor import allreduce, compare, slurm
from vlscale.doctor.allreduce import Measured
from vlscale.doctor.compare import RankReport
from vlscale.doctor.findings import Finding
from vlscale.errors import VlscaleError

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
    assert finding.text == "2.10.0 on node-0 (rank 0, 1), node-1 (rank 2); 2.9.1 on node-1 (rank 3)"
    assert "first: node-1 (rank 3)" in finding.cure


def test_a_package_that_one_host_lacks() -> None:
    lacking = RankReport("node-9", 1, "V100", {"torch": "2.10.0"}, {}, 1.0)
    assert found([report(0), lacking])["NCCL"].text == "2.27.5 on node-0 (rank 0); missing on node-9 (rank 1)"


def test_mixed_devices_and_variables_are_warnings() -> None:
    kinds = found([report(0), report(1, device="A100")])
    assert (kinds["devices"].state, kinds["devices"].text) == (
        "warning",
        "V100 on node-0 (rank 0); A100 on node-0 (rank 1)",
    )
    steered = found([report(0), report(1, NCCL_ALGO="Ring")])["NCCL_ALGO"]
    assert (steered.state, "not set on node-0 (rank 0); Ring" in steered.text) == ("warning", True)


def test_findings_of_many_hosts_are_told_once() -> None:
    reports = [report(0, findings=(WARNING, OK)), report(1), report(2, findings=(WARNING,))]
    (finding,) = compare.merged(reports)
    assert finding.text == "node-0, node-1: is 127.0.0.1"
    assert (finding.state, finding.cure) == (WARNING.state, WARNING.cure)


def test_a_slow_rank_and_wrong_sums() -> None:
    reports = [report(rank, work_s=2.0 if rank == 3 else 1.0) for rank in range(4)]
    lines = {finding.name: finding for finding in compare.judge_measured([Measured(1024, 1.0, 4, (2,))], reports)}
    assert lines["sums"].text == "wrong for 1,024 bytes on rank 2 on node-1"
    assert lines["sums"].state == "failed"
    assert lines["slow ranks"].text.startswith("3 on node-1 (2.0 times the median)")
    assert lines["slow ranks"].state == "warning"
    right = {finding.name: finding.state for finding in compare.judge_measured([Measured(1024, 1.0, 4)], reports[:3])}
    assert right == {"sums": "ok"}


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
