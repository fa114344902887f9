"""The scripts of launch/slurm without a Slurm: syntax, what they ask of srun, and when a job starts again.

``srun`` and ``scontrol`` are the test's own here; tests/cluster/test_slurm.py runs the scripts on a real Slurm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.slurm_desk import ROOT, SECRET, Desk

SCRIPTS = sorted(path for path in (ROOT / "launch/slurm").iterdir() if path.suffix in (".sh", ".sbatch"))
TRAINING = ["one_node.sbatch", "many_nodes.sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=20)
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-x", path.name], cwd=path.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def options(name: str) -> dict[str, str]:
    """The #SBATCH options of a script."""
    text = (ROOT / "launch/slurm" / name).read_text(encoding="utf-8")
    found = re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", text, re.MULTILINE)
    assert len(found) == text.count("#SBATCH")
    return dict(found)


@pytest.mark.parametrize("name", TRAINING)
def test_what_a_job_asks_for(name: str) -> None:
    asked = options(name)
    assert asked["gres"] == f"gpu:{asked['ntasks-per-node']}"
    assert asked["signal"] == "USR2@300", "to the tasks, not to the batch shell"
    assert (asked["requeue"], asked["open-mode"], asked["export"]) == ("", "append", "NONE")
    assert asked["mem"] == "0", "--exclusive alone gives only the site's default"
    text = (ROOT / "launch/slurm" / name).read_text(encoding="utf-8")
    config = re.search(r"--ds_config (\S+)", text)
    assert config
    assert (ROOT / config[1]).is_file()


def test_the_array_has_as_many_tasks_as_shares() -> None:
    text = (ROOT / "launch/slurm/import_array.sbatch").read_text(encoding="utf-8")
    shares = re.search(r"^shares=(\d+)", text, re.MULTILINE)
    assert shares
    assert options("import_array.sbatch")["array"] == f"0-{int(shares[1]) - 1}"


def test_every_setting_of_the_example_is_read_somewhere() -> None:
    example = (ROOT / "launch/slurm/site.env.example").read_text(encoding="utf-8")
    names = re.findall(r"^#(?:export )?([A-Z_]+)=", example, re.MULTILINE)
    read = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    outside = ("SBATCH_", "NCCL_", "GLOO_")
    assert "VLSCALE_IMAGE" in names
    assert not [name for name in names if name not in read and not name.startswith(outside)]


def test_srun_gets_rendezvous_binding_and_named_variables_only(desk: Desk) -> None:
    desk.settings(
        "VLSCALE_WORKERS=2", "export NCCL_SOCKET_IFNAME=ib0", "VLSCALE_EXPORT=PROXY", "export PROXY=p OTHER=o"
    )
    done = desk.train("--set", "a=b c")
    assert done.returncode == 0, done.stderr
    asked = desk.asked
    assert asked[asked.index("--set") + 1] == "a=b c"
    assert asked[-2:] == ["--resume", "auto"]
    assert "--output=run/logs/4107/rank-%3t.log" in asked
    assert {
        "--cpus-per-task=6",
        "--cpu-bind=verbose,cores",
        "--kill-on-bad-exit=1",
        "--wait=600",
        "--open-mode=append",
    } <= set(asked)
    (exported,) = (word.partition("=")[2].split(",") for word in asked if word.startswith("--export="))
    assert {"PATH", "HOME", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "PROXY"} <= set(exported)
    assert {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "VLSCALE_HOSTS", "VLSCALE_RUN_ID", "VLSCALE_STATUS"} <= set(exported)
    assert len(exported) == len(set(exported))
    assert not {"WANDB_API_KEY", "OTHER"} & set(exported)
    variables = (desk.folder / "srun.environment").read_text(encoding="utf-8").splitlines()
    place = {"MASTER_ADDR=n1", f"MASTER_PORT={20000 + 4107}", "VLSCALE_HOSTS=n1,n2", "OMP_NUM_THREADS=4"}
    place |= {"VLSCALE_RUN_ID=slurm-4107-0"}
    assert place <= set(variables)
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "state", "batch", "status", "again", "said"),
    [
        ("0 9", "RUNNING", "1", 0, 0, "job 4107 is done"),
        ("0 9 75", "RUNNING", "1", 0, 1, "job 4107: it was asked to stop, and has saved at step 9; requeueing"),
        ("137 9", "RUNNING", "1", 0, 1, "it ended with status 137 at step 9; requeueing"),
        ("137 - 75", "RUNNING", "1", 0, 1, "it was asked to stop, and has saved at step none; requeueing"),
        (
            "143 - 2",
            "RUNNING",
            "1",
            2,
            0,
            "a mistake that a restart would repeat; see run/logs/4107/rank-*.log",
        ),
        ("0 - 2", "RUNNING", "1", 2, 0, "ended by a mistake"),
        ("2 -", "RUNNING", "1", 2, 0, "ended by a mistake"),
        ("0 9 75", "RUNNING", "0", 75, 0, "the same command goes on from step 9"),
        ("0 9 75", "RUNNING", "2", 0, 1, "it was asked to stop, and has saved at step 9; requeueing"),
        ("143 9", "CANCELLED", "1", 143, 0, "cancelled or out of time, so not requeued"),
        ("143 9", "TIMEOUT", "1", 143, 0, "cancelled or out of time, so not requeued"),
        ("1 9 rubbish", "RUNNING", "1", 0, 1, "it ended with status 1 at step 9; requeueing"),
    ],
)
def test_what_follows_an_end(desk: Desk, line: str, state: str, batch: str, status: int, again: int, said: str) -> None:
    desk.plan(line, state=state, batch=batch)
    done = desk.train()
    assert said in done.stdout + done.stderr
    assert (done.returncode, desk.requeued) == (status, again)


def test_a_refused_requeue_is_told(desk: Desk) -> None:
    desk.plan("0 9 75")
    (desk.folder / "refuse").touch()
    done = desk.train()
    assert done.returncode == 75
    assert "cannot be requeued (Requested operation is presently disabled); submit it again" in done.stderr


@pytest.mark.parametrize(("times", "status", "again"), [(2, 0, 1), (20, 75, 0)])
def test_a_controller_that_is_away_is_asked_again(desk: Desk, times: int, status: int, again: int) -> None:
    desk.plan("0 9 75")
    (desk.folder / "away").write_text("again\n" * times, encoding="utf-8")
    done = desk.train()
    assert (done.returncode, desk.requeued) == (status, again)
    assert ("not requeued, as scontrol does not answer; submit it again" in done.stderr) == (not again)


def test_a_task_of_an_array_requeues_itself_alone(desk: Desk) -> None:
    desk.plan("0 9 75")
    done = desk.train(SLURM_ARRAY_JOB_ID="4099", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 0, done.stderr
    assert (desk.folder / "requeued").read_text(encoding="utf-8") == "requeued 4099_3\n"


def test_a_mistake_after_a_restart_is_tried_again(desk: Desk) -> None:
    """A node without the data at night: another one may have it."""
    assert ends(desk, ["137 -", "2 -", "143 - 2", "2 -"]) == [0, 0, 0, 1]
    assert desk.requeued == 3


@pytest.mark.parametrize(
    ("owner", "queue", "status"),
    [("4000", "4000", 2), ("4000", "4001", 0), ("4107", "4107", 0), ("", "", 0), ("$(touch hacked)", "", 0)],
)
def test_a_run_folder_belongs_to_one_job(desk: Desk, owner: str, queue: str, status: int) -> None:
    path = desk.folder / "run/logs/owner"
    path.parent.mkdir(parents=True)
    path.write_text(f"{owner}\n", encoding="utf-8")
    (desk.folder / "queue").write_text(f"{queue}\n", encoding="utf-8")
    done = desk.train()
    assert done.returncode == status, done.stderr
    assert path.read_text(encoding="utf-8") == f"{'4107' if status == 0 else owner}\n"
    assert (desk.folder / "srun.called").exists() == (status == 0)
    assert status == 0 or "job 4000 has --run_dir run (squeue lists it)" in done.stderr
    assert not (desk.folder / "hacked").exists()


def ends(desk: Desk, lines: Sequence[str]) -> list[int]:
    """Statuses of as many starts of one job."""
    desk.plan(*lines)
    return [desk.train(SLURM_RESTART_COUNT=str(start)).returncode for start, _ in enumerate(lines)]


def test_restarts_in_a_row_without_progress_stop_the_job(desk: Desk) -> None:
    assert ends(desk, ["1 -"] * 4) == [0, 0, 0, 1]
    assert desk.requeued == 3


def test_progress_starts_the_count_again(desk: Desk) -> None:
    assert ends(desk, ["1 -", "1 -", "1 -", "1 5", "1 5", "1 5", "1 5", "1 5"]) == [0, 0, 0, 0, 0, 0, 0, 1]


def test_being_preempted_without_progress_counts_too(desk: Desk) -> None:
    desk.settings("VLSCALE_MAX_RESTARTS=1")
    assert ends(desk, ["0 - 75", "0 - 75"]) == [0, 1]


def test_starting_again_by_hand_is_not_counted(desk: Desk) -> None:
    desk.plan(*["1 -"] * 5, batch="0")
    assert [desk.train().returncode for _ in range(5)] == [1] * 5
    assert (desk.folder / "run/logs/4107/restarts").read_text(encoding="utf-8") == "none 0\n"


def test_a_start_that_was_cut_off_counts(desk: Desk) -> None:
    """A node failed, and took the script with it: nothing was written at the end."""
    logs = desk.folder / "run/logs/4107"
    logs.mkdir(parents=True)
    (logs / "restarts").write_text("none 3\n", encoding="utf-8")
    done = desk.train(SLURM_RESTART_COUNT="4")
    assert done.returncode == 1
    assert "3 restarts in a row brought it no further than step none" in done.stderr
    assert not (desk.folder / "srun.called").exists()


@pytest.mark.parametrize("content", ["", "none", "none x", "-1 3", "none 3 $(touch hacked)", "\0\0", "5 3"])
def test_a_damaged_count_starts_again(desk: Desk, content: str) -> None:
    logs = desk.folder / "run/logs/4107"
    logs.mkdir(parents=True)
    (logs / "restarts").write_text(content, encoding="utf-8")
    desk.plan("1 -")
    assert desk.train(SLURM_RESTART_COUNT="1").returncode == 0
    assert (logs / "restarts").read_text(encoding="utf-8") == "none 0\n"
    assert not (desk.folder / "hacked").exists()


def test_a_run_folder_that_goes_away_counts_as_no_progress(desk: Desk) -> None:
    desk.program("bin/srun", "#!/bin/bash\nrm -rf run\nexit 1\n")
    done = desk.train()
    assert (done.returncode, desk.requeued) == (0, 1), done.stderr
    assert "at step none; requeueing" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "setting", "variables", "said"),
    [
        (["--ds_config", "a.json"], "", {}, "no --run_dir FOLDER among the arguments"),
        (["--run_dir=run", "--resume", "none"], "", {}, "--resume: a job resumes by itself"),
        (["--run_dir", "run%j"], "", {}, "choose another name"),
        (["--run_dir", "/proc/nowhere"], "", {}, "/proc/nowhere/logs/4107 cannot be made; give another --run_dir"),
        (["--run_dir", "run"], "", {"SLURM_JOB_ID": ""}, "not inside a job"),
        (["--run_dir", "run"], "VLSCALE_MAX_RESTARTS=many", {}, "VLSCALE_MAX_RESTARTS is 'many'; expected a number"),
        (["--run_dir", "run"], "VLSCALE_EXPORT='A=1'", {}, "VLSCALE_EXPORT: 'A=1' is not the name of a variable"),
        (["--run_dir", "run"], "false", {}, "site.env: status 1"),
    ],
)
def test_mistakes(desk: Desk, arguments: list[str], setting: str, variables: dict[str, str], said: str) -> None:
    desk.settings(setting)
    done = desk.script("train.sh", *arguments, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert desk.requeued == 0
    assert not (desk.folder / "srun.called").exists()
