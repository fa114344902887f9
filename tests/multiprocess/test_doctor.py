"""``vlscale doctor --dist`` on two real ranks: the table, what differs between hosts, wrong sums, missing ranks."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.multiprocess.launcher import BIN, ROOT, Finished, environment, free_port, launch, run_alone, run_together

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).with_name("doctor_worker.py")


def installed(folder: Path, **versions: str) -> Path:
    """A folder with the metadata of other versions of packages, as importlib finds it."""
    for name, version in versions.items():
        place = folder / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return folder


def by_torchrun() -> Finished:
    command = [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "--no-python",
               BIN / "vlscale", "doctor", "--dist"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT, env=environment())
    return Finished(done.returncode, done.stdout, done.stderr)


def by_deepspeed() -> Finished:
    return launch("--module", "vlscale.doctor", "--dist")


@pytest.mark.parametrize("start", [by_torchrun, by_deepspeed])
def test_two_ranks_measure_an_all_reduce(start: object) -> None:
    done = start()  # type: ignore[operator]
    assert done.status == 0, done.tail
    assert "all-reduce, float32, gloo, 2 ranks on 1 host" in done.out
    rows = re.findall(r"^ +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+)  right$", done.out, re.MULTILINE)
    assert [int(row[0].replace(",", "")) for row in rows] == [1024 * 4**power for power in range(8)], done.tail
    for _, milliseconds, algorithm, bus in rows:
        assert float(milliseconds) > 0
        assert algorithm == bus  # 2 (n - 1) / n is 1 for 2 ranks
    assert re.search(r"ok +versions +the same on all 2 ranks", done.out)
    assert re.search(r"ok +sums +right for all sizes", done.out)
    assert "nothing was measured" not in done.out


def test_differences_and_wrong_sums_are_told_by_host(tmp_path: Path) -> None:
    odd = installed(tmp_path, transformers="4.1.0")
    ranks = run_together(WORKER, odd, "wrong-sums", "--", "--dist", "--json", processes=2)
    assert [done.status for done in ranks] == [1, 0], [done.tail for done in ranks]
    assert ranks[1].out == ""
    found = json.loads(ranks[0].out)
    assert [rank["host"] for rank in found["ranks"]] == ["node-0", "node-1"]
    failed = {finding["name"]: finding for finding in found["findings"] if finding["state"] == "failed"}
    assert set(failed) == {"transformers", "sums"}
    assert re.fullmatch(r"\S+ on node-0 \(rank 0\); 4\.1\.0 on node-1 \(rank 1\)", failed["transformers"]["text"])
    assert "install the same on all hosts" in failed["transformers"]["cure"]
    assert "on rank 0 on node-0, 1 on node-1" in failed["sums"]["text"]
    assert "do not train on these hosts" in failed["sums"]["cure"]
    assert [row["bytes"] for row in found["all_reduce"]] == [1024 * 4**power for power in range(8)]
    for row in found["all_reduce"]:
        assert row["wrong"] == [0, 1]
        assert row["bus_bandwidth"] == row["algorithm_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
    # The host of the odd rank says itself that its version is not the pinned one.
    assert [one["text"] for one in found["findings"] if one["text"].startswith("node-1: 4.1.0; vlscale pins")]


def test_versions_without_which_ranks_cannot_talk_end_all_of_them(tmp_path: Path) -> None:
    odd = installed(tmp_path, deepspeed="0.16.1")
    ranks = run_together(WORKER, odd, "--", "--dist", processes=2)
    assert [done.status for done in ranks] == [2, 2], [done.tail for done in ranks]
    said = "".join(done.err for done in ranks)
    assert "node-1" in said
    assert "deepspeed 0.16.1" in said


def test_one_process_says_that_it_measured_nothing() -> None:
    alone = Path(WORKER.parents[2] / "vlscale/doctor/__main__.py")
    done = run_alone(alone, "--dist")
    assert done.status == 0, done.tail
    assert "one process: nothing was measured between processes" in done.out
    assert "srun vlscale doctor --dist" in done.out


def test_a_rank_that_is_missing_is_told_in_time() -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [BIN / "vlscale", "doctor", "--dist", "--join_timeout", "2"]
    variables = environment(**place, MASTER_PORT=str(free_port()))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=variables)
    assert done.returncode == 2, done.stderr
    assert "rank 1 of 2" in done.stderr
