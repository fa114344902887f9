"""What tasks of a job start, shares of an import, and submit.sh, without a Slurm."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.launch.slurm_desk import Desk

SHARE = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}


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
    image = desk.image()
    done = task(desk, 0, VLSCALE_IMAGE=image, VLSCALE_BIND="/data,/scratch", CC="gcc-12", CUDA_HOME="/opt/cuda")
    said = [word for word in done.stdout.splitlines() if word != "--nv"]
    place = ["exec", "--bind", f"{desk.folder},/data,/scratch", "--pwd", str(desk.folder), image, "python"]
    assert said == [*place, "launch/pretrain.py", "--x", "a b", "CC= CUDA_HOME="]
    assert ("--nv" in done.stdout) == os.path.exists("/dev/nvidiactl")


def test_an_image_that_a_host_lacks_is_named(desk: Desk) -> None:
    desk.image()
    done = task(desk, 0, VLSCALE_IMAGE="/nowhere.sif")
    assert done.stderr.startswith("slurm: error: host n2: no /nowhere.sif or no apptainer; see VLSCALE_IMAGE in "), done
    assert (desk.folder / "status").read_text(encoding="utf-8") == "2\n"


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
    done = desk.script("import.sh", *arguments, **(SHARE | variables))
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], ["--shard", "2/3", "--workers", "6"]),
        (["--merge"], ["--workers", "6"]),
        (["--workers", "2"], ["--shard", "2/3"]),
    ],
)
def test_a_task_of_an_array_builds_its_share(desk: Desk, more: list[str], expected: list[str]) -> None:
    done = desk.script("import.sh", "3", "import_texts", "flickr30k", "a b.csv", *more, **SHARE)
    assert done.returncode == 0, done.stderr
    start = desk.asked.index(f"{desk.folder}/.venv/bin/python")
    assert desk.asked[start + 1 :] == ["-m", "data_tools.import_texts", "flickr30k", "a b.csv", *more, *expected]


def test_shares_are_built_in_an_image_too(desk: Desk) -> None:
    image = desk.image()
    done = desk.script("import.sh", "3", "import_texts", "x", VLSCALE_IMAGE=image, CC="gcc-12", **SHARE)
    assert done.returncode == 0, done.stderr
    start = desk.asked.index("apptainer")
    assert desk.asked[start : start + 2] == ["apptainer", "exec"]
    assert [image, "python", "-m", "data_tools.import_texts", "x"] == desk.asked[desk.asked.index(image) :][:5]
    (exported,) = (word for word in desk.asked if word.startswith("--export="))
    assert "CC" not in exported.split(",")


def test_a_share_without_the_environment_is_refused(desk: Desk) -> None:
    desk.settings("VLSCALE_VENV=/nowhere")
    done = desk.script("import.sh", "3", "import_texts", "x", **SHARE)
    assert done.returncode == 2
    assert "no /nowhere/bin/python; set VLSCALE_VENV" in done.stderr
    assert not (desk.folder / "srun.called").exists()


def test_a_site_whose_cd_says_where_it_goes(desk: Desk) -> None:
    done = desk.train(CDPATH=f".:{desk.folder}")
    assert done.returncode == 0, done.stderr
    (desk.folder / "status").touch()
    assert task(desk, 0, CDPATH=f".:{desk.folder}").returncode == 0


def submit(desk: Desk, *answer: str, sinfo: bool = True) -> tuple[int, str]:
    """Status and standard error of submit.sh where ``sbatch --test-only`` says ``answer`` and fails."""
    (desk.folder / "answer").write_text("\n".join(answer) + "\n", encoding="utf-8")
    if not sinfo:
        (desk.folder / "nosinfo").touch()
    done = desk.script("submit.sh", "--parsable", "a.sbatch", "--x", "a b")
    assert (desk.folder / "submitted").exists() == (done.returncode == 0)
    assert done.stderr.count("\n") == 1, "not one line"
    return done.returncode, done.stderr


UNAVAILABLE = "allocation failure: Requested node configuration is not available"


def test_what_can_start_is_submitted(desk: Desk) -> None:
    done = desk.script("submit.sh", "--parsable", "a.sbatch", "--x", "a b")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Submitted batch job 7\n", "")
    assert (desk.folder / "submitted").read_text(encoding="utf-8") == "--parsable a.sbatch --x a b\n"


@pytest.mark.parametrize(
    "asked",
    [
        ["nodes : 5", "partition : gpu"],
        ["nodes               : 5-8"],
        ["nodes : 2", "ntasks-per-node : 8", "cpus-per-task : 6"],
        ["nodes : 1", "gres : gres:gpu:9"],
        ["nodes : 1", "gres : gpu:v100:9"],
    ],
)
def test_what_can_never_start_is_refused(desk: Desk, asked: list[str]) -> None:
    status, said = submit(desk, *(f"sbatch: {line}" for line in asked), UNAVAILABLE)
    assert status == 2
    assert "not submitted: Requested node configuration is not available: asked for" in said
    assert "in partition 'gpu', which has 4 nodes of 40 CPUs; change #SBATCH --nodes," in said


@pytest.mark.parametrize(
    "asked",
    [
        ["nodes : 4", "ntasks-per-node : 8", "cpus-per-task : 5", "gres : gres:gpu:8"],
        ["gres : gpu:v100:8"],
        [],
    ],
)
def test_what_waits_for_a_node_is_submitted_with_a_warning(desk: Desk, asked: list[str]) -> None:
    status, said = submit(desk, *(f"sbatch: {line}" for line in asked), UNAVAILABLE)
    assert status == 0
    assert said.startswith("slurm: warning: submitted, but it cannot start now: Requested node configuration is not")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (["sbatch: error: Unable to open file a.sbatch"], "Unable to open file a.sbatch"),
        (
            ["sbatch: error: invalid partition specified: x", "allocation failure: Invalid partition name specified"],
            "invalid partition specified: x; Invalid partition name specified",
        ),
        (["sbatch: unrecognized option '--x'", 'Try "sbatch --help"'], "unrecognized option '--x'"),
        (["allocation failure: Requested time limit is invalid"], "Requested time limit is invalid"),
        (["sbatch: nodes : 5"], "sbatch --test-only gave no answer within 45 s"),
    ],
)
def test_what_sbatch_refuses_is_told_without_advice(desk: Desk, answer: list[str], reason: str) -> None:
    assert submit(desk, *answer) == (2, f"slurm: error: not submitted: {reason}\n")


def test_a_site_without_an_answer_from_sinfo_is_told_so(desk: Desk) -> None:
    status, said = submit(desk, "sbatch: nodes : 2", UNAVAILABLE, sinfo=False)
    assert status == 2
    assert "asked for 2 nodes in partition 'unknown', which has no nodes" in said
