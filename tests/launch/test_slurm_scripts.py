"""The scripts of launch/slurm without a Slurm: syntax, what they ask of srun, and when a job starts again.

``srun`` and ``scontrol`` are the test's own here; tests/cluster/test_slurm.py runs the scripts on a real Slurm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "launch/slurm").iterdir() if path.suffix in (".sh", ".sbatch"))
TRAINING = ["one_node.sbatch", "many_nodes.sbatch"]
SECRET = "planted-77d0"

# Notes how it is called, then does what the next line of `plan` says: STATUS STEP [LEFT].
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >srun.called
env >srun.environment
read -r status step left <plan
sed -i 1d plan
[[ $step == - ]] || { mkdir -p run/checkpoints; echo "step-$step" >run/checkpoints/latest; }
[[ -z $left ]] || echo "$left" >"$VLSCALE_STATUS"
exit "$status"
"""
SCONTROL = """#!/bin/bash
case "$*" in
"show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
"--oneliner show job 4107") echo "JobId=4107 JobState=$(cat state) Requeue=1 BatchFlag=$(cat batch) Reboot=0" ;;
"requeue 4107") [[ ! -f refuse ]] || { echo "Requested operation is presently disabled" >&2; exit 1; }
    echo requeued >>requeued ;;
*) echo "scontrol $*" >&2; exit 3 ;;
esac
"""


@dataclass(frozen=True)
class Desk:
    """A project folder with the scripts, and programs that stand in for Slurm's."""

    folder: Path

    def script(self, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts."""
        job = {"SLURM_JOB_ID": "4107", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "6", "USER": "me"}
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), "WANDB_API_KEY": SECRET}
        command = ["bash", f"launch/slurm/{name}", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment | job | variables, capture_output=True, text=True, timeout=60
        )

    def train(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run train.sh as a job does."""
        return self.script("train.sh", "--ds_config", "a.json", "--run_dir", "run", *arguments, **variables)

    def plan(self, *lines: str, state: str = "RUNNING", batch: str = "1") -> None:
        """What srun does, call by call; what scontrol says of the job."""
        (self.folder / "plan").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "state").write_text(state, encoding="utf-8")
        (self.folder / "batch").write_text(batch, encoding="utf-8")

    def settings(self, *lines: str) -> None:
        """Write site.env."""
        (self.folder / "launch/slurm/site.env").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def program(self, path: str, text: str) -> None:
        """Write a program."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(0o755)

    @property
    def requeued(self) -> int:
        """How often the job has been requeued."""
        path = self.folder / "requeued"
        return path.read_text(encoding="utf-8").count("requeued") if path.exists() else 0

    @property
    def asked(self) -> list[str]:
        """The words that srun was called with."""
        return (self.folder / "srun.called").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    desk = Desk(tmp_path)
    shutil.copytree(ROOT / "launch/slurm", tmp_path / "launch/slurm", ignore=shutil.ignore_patterns("site.env"))
    desk.program("bin/srun", SRUN)
    desk.program("bin/scontrol", SCONTROL)
    desk.program("bin/sleep", "#!/bin/bash\n")
    desk.plan("0 -")
    return desk


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
    assert {"--cpus-per-task=6", "--cpu-bind=verbose,cores", "--kill-on-bad-exit=1", "--open-mode=append"} <= set(asked)
    (exported,) = (word.partition("=")[2].split(",") for word in asked if word.startswith("--export="))
    assert {"PATH", "HOME", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "PROXY"} <= set(exported)
    assert {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "VLSCALE_HOSTS", "VLSCALE_STATUS", "VLSCALE_VENV"} <= set(exported)
    assert len(exported) == len(set(exported))
    assert not {"WANDB_API_KEY", "OTHER"} & set(exported)
    variables = (desk.folder / "srun.environment").read_text(encoding="utf-8").splitlines()
    place = {"MASTER_ADDR=n1", f"MASTER_PORT={20000 + 4107}", "VLSCALE_HOSTS=n1,n2", "OMP_NUM_THREADS=4"}
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


def task(desk: Desk, status: int, rank: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run task.sh with a Python that says where it is and ends with ``status``."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYTHONPATH")
    shown = " ".join(f"{name}=${name}" for name in names)
    desk.program("venv/bin/python", f'#!/bin/bash\necho "{shown}" "$@"\nkill -USR2 $$\nexit {status}\n')
    slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "1", "SLURM_NTASKS": "6", "SLURM_GTIDS": "3,4,5"}
    ours = {"VLSCALE_VENV": str(desk.folder / "venv"), "VLSCALE_STATUS": "status", "SLURMD_NODENAME": "n2"}
    return desk.script("task.sh", "launch/pretrain.py", "--x", "a b", **(slurm | ours | variables))


@pytest.mark.parametrize(
    ("status", "exited", "left"), [(0, 0, ""), (2, 0, "2"), (75, 0, "75"), (1, 1, ""), (137, 137, "")]
)
def test_rank_0_leaves_word_of_what_all_ranks_agreed_on(desk: Desk, status: int, exited: int, left: str) -> None:
    (desk.folder / "status").touch()
    done = task(desk, status)
    assert done.returncode == exited, "SIGUSR2 before Python holds it back must do nothing"
    assert (desk.folder / "status").read_text(encoding="utf-8").strip() == left
    expected = (
        f"RANK=0 LOCAL_RANK=1 WORLD_SIZE=6 LOCAL_WORLD_SIZE=3 PYTHONPATH={desk.folder} launch/pretrain.py --x a b"
    )
    assert done.stdout.strip() == expected


def test_other_ranks_only_wait_for_that_word(desk: Desk) -> None:
    (desk.folder / "status").write_text("75\n", encoding="utf-8")
    assert task(desk, 75, rank=2).returncode == 0
    assert (desk.folder / "status").read_text(encoding="utf-8") == "75\n"


def test_a_host_without_the_environment_is_named(desk: Desk) -> None:
    done = task(desk, 0, VLSCALE_VENV="/nowhere")
    cure = "set VLSCALE_VENV in launch/slurm/site.env to what all nodes see"
    assert done.stderr == f"slurm: error: host n2: no /nowhere/bin/python; {cure}\n"
    assert (desk.folder / "status").read_text(encoding="utf-8") == "2\n"


def test_an_image_takes_the_environments_place(desk: Desk) -> None:
    desk.program("bin/apptainer", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    done = task(desk, 0, VLSCALE_IMAGE="/images/v.sif", VLSCALE_BIND="/data,/scratch")
    said = [word for word in done.stdout.splitlines() if word != "--nv"]
    place = ["exec", "--bind", f"{desk.folder},/data,/scratch", "--pwd", str(desk.folder), "/images/v.sif", "python"]
    assert said == [*place, "launch/pretrain.py", "--x", "a b"]
    assert ("--nv" in done.stdout) == os.path.exists("/dev/nvidiactl")


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["3", "import_images"], {"SLURM_ARRAY_TASK_ID": ""}, "not a task of an array"),
        (["0", "import_images"], {}, "shares is '0'"),
        (["3", "build_demo"], {}, "'build_demo' is no tool that works in shares"),
        (["2", "import_images"], {}, "task 2 of the array, but there are 2 shares (0 to 1)"),
        (["3", "import_images"], {"SLURM_ARRAY_TASK_COUNT": "5"}, "5 tasks for 3 shares"),
    ],
)
def test_mistakes_of_arrays(desk: Desk, arguments: list[str], variables: dict[str, str], said: str) -> None:
    place = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    done = desk.script("import.sh", *arguments, **(place | variables))
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("more", "expected"),
    [([], ["--workers", "6", "--shard", "2/3"]), (["--merge"], ["--merge", "--workers", "6"])],
)
def test_a_task_of_an_array_builds_its_share(desk: Desk, more: list[str], expected: list[str]) -> None:
    place = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    done = desk.script("import.sh", "3", "import_texts", "flickr30k", "a b.csv", *more, **place)
    assert done.returncode == 0, done.stderr
    assert desk.asked[desk.asked.index("-m") :] == ["-m", "data_tools.import_texts", "flickr30k", "a b.csv", *expected]
