"""``vlscale doctor --dist`` on two real ranks: the table, what differs between hosts, wrong sums, missing ranks."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.multiprocess.doctor_worker import Scene
from tests.multiprocess.launcher import BIN, ROOT, Finished, environment, free_port, run_together

pytestmark = pytest.mark.multiprocess
WORKER = Path(__file__).with_name("doctor_worker.py")


def installed(folder: Path, name: str, version: str) -> str:
    """A folder with the metadata of another version of a package, as importlib finds it."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return str(folder)


def by_torchrun() -> list[str | Path]:
    return [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "--no-python",
            BIN / "vlscale", "doctor", "--dist"]  # fmt: skip


def by_deepspeed() -> list[str | Path]:
    """What ``deepspeed --module vlscale.doctor --dist`` starts on every host."""
    slots = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    return [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={slots}", "--master_addr=127.0.0.1",
            f"--master_port={free_port()}", "--module", "vlscale.doctor", "--dist"]  # fmt: skip


@pytest.mark.parametrize("start", [by_torchrun, by_deepspeed])
def test_two_ranks_measure_an_all_reduce(start: Callable[[], list[str | Path]]) -> None:
    run = subprocess.run(start(), capture_output=True, text=True, timeout=150, cwd=ROOT, env=environment())
    done = Finished(run.returncode, run.stdout, run.stderr)
    assert done.status == 0, done.tail
    assert "all-reduce, float32, gloo, 2 ranks on 1 host: median" in done.out
    rows = re.findall(r"^ +([\d,]+) +([\d.]+) +([\d.]+) +([\d.]+)  right$", done.out, re.MULTILINE)
    assert [int(row[0].replace(",", "")) for row in rows] == [1024 * 4**power for power in range(8)], done.tail
    for _, milliseconds, algorithm, bus in rows:
        assert float(milliseconds) > 0
        assert algorithm == bus  # 2 (n - 1) / n is 1 for 2 ranks
    assert re.search(r"ok +versions +the same on all 2 ranks", done.out)
    assert re.search(r"ok +sums +right for all sizes", done.out)
    assert "nothing was measured" not in done.out


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finished]]:
    """What the ranks left in each scene."""
    folder = tmp_path_factory.mktemp("doctor")
    alone = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    versions = {"deepspeed": "0.16.1", "transformers": "4.1.0"}
    old = {name: installed(folder / name, name, version) for name, version in versions.items()}
    scenes = {
        "other versions": Scene(["--dist"], free_port(), [0, 1], installed=old["deepspeed"]),
        "missing": Scene(["--dist", "--join_timeout", "2"], free_port(), [0]),
        "alone": Scene(["--dist"], 0, [0], variables=alone),
        "differences": Scene(
            ["--dist", "--json"], free_port(), [0, 1], installed=old["transformers"], wrong_sums=True
        ),
    }  # fmt: skip
    todo = folder / "scenes.json"
    todo.write_text(json.dumps([asdict(scene) for scene in scenes.values()]), encoding="utf-8")
    for done in run_together(WORKER, todo, processes=2):
        assert done.status == 0, done.tail
    left = [json.loads(Path(f"{todo}.{rank}.out").read_text(encoding="utf-8")) for rank in range(2)]
    return {name: [Finished(*of_rank) for of_rank in ranks] for name, *ranks in zip(scenes, *left, strict=True)}


def test_differences_and_wrong_sums_are_told_by_host(played: dict[str, list[Finished]]) -> None:
    ranks = played["differences"]
    assert [done.status for done in ranks] == [1, 0], [done.tail for done in ranks]
    assert ranks[1].out == ""
    found = json.loads(ranks[0].out)
    assert [rank["host"] for rank in found["ranks"]] == ["node-0", "node-1"]
    failed = {finding["name"]: finding for finding in found["findings"] if finding["state"] == "failed"}
    assert set(failed) == {"transformers", "sums"}
    assert re.fullmatch(r"\S+ on node-0; 4\.1\.0 on node-1", failed["transformers"]["text"])
    assert "install the same on all hosts" in failed["transformers"]["cure"]
    assert "on rank 0 on node-0, 1 on node-1" in failed["sums"]["text"]
    assert "do not train on these hosts" in failed["sums"]["cure"]
    assert [row["bytes"] for row in found["all_reduce"]] == [1024 * 4**power for power in range(8)]
    for row in found["all_reduce"]:
        assert row["wrong"] == [0, 1]
        assert row["bus_bandwidth"] == row["algorithm_bandwidth"] == pytest.approx(row["bytes"] / row["seconds"])
    # The host of the odd rank says itself that its version is not the pinned one.
    assert [one["text"] for one in found["findings"] if one["text"].startswith("node-1: 4.1.0; vlscale pins")]


def test_versions_without_which_ranks_cannot_talk_end_all_of_them(played: dict[str, list[Finished]]) -> None:
    ranks = played["other versions"]
    assert [done.status for done in ranks] == [2, 2], [done.tail for done in ranks]
    said = "".join(done.err for done in ranks)
    assert "node-1" in said
    assert "deepspeed 0.16.1" in said


def test_one_process_says_that_it_measured_nothing(played: dict[str, list[Finished]]) -> None:
    done = played["alone"][0]
    assert done.status == 0, done.tail
    assert "one process: nothing was measured between processes" in done.out
    assert "srun vlscale doctor --dist" in done.out


def test_a_rank_that_is_missing_is_told_in_time(played: dict[str, list[Finished]]) -> None:
    done = played["missing"][0]
    assert done.status == 2, done.tail
    assert "rank 1 of 2" in done.err
