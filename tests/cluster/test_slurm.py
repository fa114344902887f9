"""The scripts of launch/slurm on a real Slurm with two nodes: train, be preempted, crash, go on, stop, leak nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm_project import FILES, ROOT, SECRET, STEPS, TWO_NODES, Project, environment, scalars, until
from tests.cluster.slurm_site import Site, slurm_site, unavailable
from tests.data_tools.feature_files import Picture, bottom_up_row, write_lines
from tests.data_tools.toy_sources import tree
from tests.multiprocess.launcher import run_alone, run_together

REASON = unavailable()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=f"no Slurm here: {REASON}")]

ERROR_S = 60
"""An error has to come, and all ranks have to be gone, within this time."""

ONE_NODE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--gres=none", "--time=20")

# Task 1 of an array crashes once, at a time when task 0 runs.
ONE_CRASH = """
import os, sys, time
time.sleep(2)
task, again = sys.argv[sys.argv.index("--run_dir") + 1][-1], os.path.exists("crashed")
if task == "1" and not again:
    open("crashed", "w").close()
    raise SystemExit(7)
time.sleep(5)
"""

# Runs launch/pretrain.py, but rank 1 sees another world: the statement in the middle.
ODD_RANK = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    {statement}
sys.argv[0] = "launch/pretrain.py"
sys.path[0] = "launch"
runpy.run_path("launch/pretrain.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with slurm_site() as site:
        yield site


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[Project]:
    project = Project.make(tmp_path_factory.mktemp("slurm") / "project", site)
    yield project
    project.sweep()


@pytest.fixture(scope="module")
def undisturbed(project: Project) -> dict[int, dict[str, float]]:
    """What a run of two processes logs that nothing disturbs, without Slurm."""
    run = project.folder / "alone"
    files = [word if word.startswith("--") else str(project.folder / word) for word in FILES]
    for done in run_together(ROOT / "launch/pretrain.py", *files, "--run_dir", run, processes=2):
        assert done.status == 0, done.tail
    found = scalars(run)
    assert list(found) == list(range(1, STEPS + 1))
    return found


def test_a_preempted_job_saves_requeues_resumes_and_loses_nothing(
    project: Project, undisturbed: dict[int, dict[str, float]]
) -> None:
    job = project.train("preempted")
    until(lambda: project.steps("preempted") >= 5, 180, "five steps")
    project.site.run("scancel", "--signal=USR2", job)
    project.site.wait(job, lambda fields: fields["Restarts"] == "1", 60)
    fields = project.site.ended(job, 240)
    said = project.said(job)
    assert fields["JobState"] == "COMPLETED", said
    saved = re.search(rf"job {job}: it was asked to stop, and has saved at step (\d+); requeueing", said)
    assert saved, said
    assert 5 <= int(saved[1]) < STEPS, "it was not stopped in the middle: the test covers nothing"
    assert f"resumed from preempted/checkpoints/step-{saved[1]}" in said, said
    assert f"job {job} is done" in said, said
    assert scalars(project.folder / "preempted") == undisturbed
    assert project.rank_log("preempted", job, 0).count("processes on cpu") == 2, "a restart wrote over a log"
    assert "rank 0 at 127.0.0.1:" in said
    assert "processes on cpu" not in project.rank_log("preempted", job, 1)


def test_a_job_makes_room_for_an_urgent_one_and_goes_on(project: Project) -> None:
    """Preemption by the scheduler, with preempt_send_user_signal: SIGUSR2 instead of SIGTERM."""
    job = project.train("evicted", "--set", "schedule.total_steps=4000")
    until(lambda: project.steps("evicted") >= 2, 180, "two steps")
    urgent = project.site.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive",
                              "--output=/dev/null", "--wrap=sleep 1").stdout.strip()  # fmt: skip
    assert project.site.ended(urgent, 90)["JobState"] == "COMPLETED"
    fields = project.site.wait(job, lambda fields: fields["JobState"] == "RUNNING", 60)
    assert fields["Restarts"] == "1", project.said(job)
    until(lambda: "resumed from evicted/checkpoints/step-" in project.said(job), 120, "going on")
    assert "it was asked to stop, and has saved at step" in project.said(job)
    project.site.run("scancel", job)
    project.site.ended(job, 60)


def test_a_killed_rank_takes_all_with_it_and_the_job_goes_on(
    project: Project, undisturbed: dict[int, dict[str, float]]
) -> None:
    job = project.train("killed")
    until(lambda: (project.folder / "killed/checkpoints/latest").exists(), 180, "a checkpoint")
    before = project.ranks()
    assert sorted(set(before.values())) == [0, 1]
    assert not [pid for pid in before if SECRET.encode() in environment(pid)], "the secret reached a task"
    os.kill(min(pid for pid, rank in before.items() if rank == 1), signal.SIGKILL)
    until(lambda: not before.keys() & project.ranks().keys(), ERROR_S, "all ranks gone")
    fields = project.site.ended(job, 240)
    said = project.said(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), said
    assert re.search(r"ended with status \d+ at step \d+; requeueing", said), said
    assert scalars(project.folder / "killed") == undisturbed


def test_restarts_without_progress_stop_after_three(tmp_path: Path, site: Site) -> None:
    project = Project.make(tmp_path / "project", site, "export VLSCALE_SCRIPT=crash.py")
    (project.folder / "crash.py").write_text("raise SystemExit(7)", encoding="utf-8")
    job = project.train("crashes")
    fields = site.ended(job, 120)
    said = project.said(job)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "3", "1:0"), said
    # 143 where srun ended one task before it had crashed by itself.
    assert len(re.findall(r"it ended with status (?:7|143) at step none; requeueing", said)) == 3, said
    last = said.splitlines()[-1]
    assert f"job {job} stops: 3 restarts in a row brought it no further than step none; last, it ended" in last, last
    assert f"see crashes/logs/{job}/rank-*.log" in last


def test_a_mistake_is_not_requeued(project: Project) -> None:
    begun = time.monotonic()
    job = project.train("mistake", "--set", "optimizer.lerning_rate=1")
    fields = project.site.ended(job, ERROR_S)
    said = project.said(job)
    assert time.monotonic() - begun < ERROR_S
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0"), said
    assert "unknown key 'optimizer.lerning_rate'" in said
    assert f"job {job} ended by a mistake that a restart would repeat" in said


@pytest.mark.parametrize(
    ("statement", "setting", "expected"),
    [
        ("os.chdir('elsewhere')", "", r"rank 1\b.*/nowhere"),
        ("import vlscale; vlscale.__version__ = '0.0.1'", "", r"host n2 \(rank 1\) has vlscale 0\.0\.1, host n1"),
        (
            "pass",
            "MASTER_ADDR=192.0.2.1",
            r"rank 0 on n1 does not reach itself at 192\.0\.2\.1:",
        ),
    ],
    ids=["a rank without the data", "another version", "a master out of reach"],
)
def test_what_differs_between_nodes_ends_all_ranks(
    tmp_path: Path, site: Site, statement: str, setting: str, expected: str
) -> None:
    project = Project.make(tmp_path / "project", site, "export VLSCALE_SCRIPT=odd.py", *filter(None, [setting]))
    (project.folder / "odd.py").write_text(ODD_RANK.format(statement=statement), encoding="utf-8")
    elsewhere = project.folder / "elsewhere"  # what another node sees at the same paths
    elsewhere.mkdir()
    for name in ("launch", "small.json"):
        (elsewhere / name).symlink_to(project.folder / name)
    recipe = (project.folder / "small.yaml").read_text(encoding="utf-8")
    (elsewhere / "small.yaml").write_text(recipe.replace(str(project.folder / "train"), "/nowhere"), encoding="utf-8")
    begun = time.monotonic()
    job = project.train("odd", "--join_timeout", "20")
    try:
        fields = site.ended(job, ERROR_S)
        took = time.monotonic() - begun
    finally:
        project.sweep()
    said = project.said(job)
    assert took < ERROR_S, said
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0"), said
    assert re.search(expected, said), said
    assert not site.processes("odd.py")


def test_a_partition_that_lacks_the_nodes_is_refused_at_once(project: Project) -> None:
    project.clear()
    begun = time.monotonic()
    done = project.submit("many_nodes.sbatch", (*TWO_NODES, "--partition=one"), check=False)
    assert time.monotonic() - begun < ERROR_S
    assert done.returncode == 2
    assert re.fullmatch(
        r"slurm: error: not submitted: Requested node configuration is not available: asked for 2 nodes in partition "
        r"'one', which has 1 nodes of 2 CPUs, 8000 MB, .*; change #SBATCH --nodes, .*\n",
        done.stderr,
    ), done.stderr
    done = project.submit("many_nodes.sbatch", (*TWO_NODES, "--nodes=5"), check=False)
    assert "asked for 5 nodes in partition 'main', which has 2 nodes" in done.stderr
    done = project.submit("many_nodes.sbatch", (*TWO_NODES, "--partition=nosuch"), check=False)
    assert done.stderr.startswith("slurm: error: not submitted: invalid partition specified: nosuch;"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not project.site.run("squeue", "--noheader").stdout, "something was submitted"


def test_a_job_waits_for_a_node_that_is_drained(project: Project) -> None:
    project.clear()
    project.site.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        done = project.submit("many_nodes.sbatch", TWO_NODES, *FILES, "--run_dir", "waits")
        job = done.stdout.strip()
        assert project.site.wait(job, lambda fields: fields["Reason"] != "None", 30)["JobState"] == "PENDING"
        assert done.stderr.startswith("slurm: warning: submitted, but it cannot start now: Requested node"), done.stderr
        refused = project.submit("many_nodes.sbatch", (*TWO_NODES, "--cpus-per-task=3"), check=False)
        assert refused.returncode == 2, "it has to wait for a node, and could not start on any"
    finally:
        project.clear()
        project.site.run("scontrol", "update", "nodename=n2", "state=resume")


def test_a_second_job_in_a_run_folder_is_refused(project: Project) -> None:
    first = project.train("shared", "--set", "schedule.total_steps=4000", options=ONE_NODE)
    until((project.folder / "shared/logs/owner").exists, 60, "a start")
    second = project.train("shared", options=ONE_NODE)
    fields = project.site.ended(second, 60)
    said = project.said(second)
    project.clear()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "2:0"), said
    assert f"slurm: error: job {first} has --run_dir shared (squeue lists it); give another one, or: " in said


def test_a_crashed_task_of_an_array_requeues_itself_alone(tmp_path: Path, site: Site) -> None:
    project = Project.make(tmp_path / "project", site, "export VLSCALE_SCRIPT=crash.py", "VLSCALE_MAX_RESTARTS=1")
    (project.folder / "crash.py").write_text(ONE_CRASH, encoding="utf-8")
    script = project.folder / "launch/slurm/many_nodes.sbatch"
    text = script.read_text(encoding="utf-8").replace("runs/uniter_large", '"run-$SLURM_ARRAY_TASK_ID"')
    script.write_text(text, encoding="utf-8")
    done = project.submit("many_nodes.sbatch", (*ONE_NODE, "--array=0-1", "--output=slurm-%a.out"))
    job = done.stdout.strip()
    fields = [site.ended(f"{job}_{task}", 120) for task in (0, 1)]
    said = [project.said(task) for task in "01"]
    assert [(found["JobState"], found["Restarts"]) for found in fields] == [("COMPLETED", "0"), ("COMPLETED", "1")], (
        said
    )
    assert f"job {job}_1: it ended with status 7 at step none; requeueing" in said[1]


def test_a_cancelled_job_stays_cancelled(project: Project) -> None:
    job = project.train("cancelled", "--set", "schedule.total_steps=4000")
    until(lambda: project.steps("cancelled") >= 1, 180, "a step")
    project.site.run("scancel", job)
    fields = project.site.ended(job, 60)
    time.sleep(2)
    assert project.site.job(job)["JobState"] == fields["JobState"] == "CANCELLED", project.said(job)
    assert not project.ranks()


def test_salloc_trains_stops_and_goes_on(project: Project, undisturbed: dict[int, dict[str, float]]) -> None:
    command = ["salloc", *TWO_NODES, "bash", "launch/slurm/train.sh", *FILES, "--run_dir", "interactive"]

    def start(*more: str) -> tuple[int, str]:
        done = project.site.run(*command, *more, cwd=project.folder, check=False, timeout=240, WANDB_API_KEY=SECRET)
        return done.returncode, done.stdout + done.stderr

    status, said = start("--set", "schedule.total_steps=4")
    assert status == 0, said
    assert "2 processes on cpu" in said, "rank 0 is not shown"
    assert SECRET not in said
    status, said = start("--set", "optimizer.lerning_rate=1")
    assert status == 2, said
    status, said = start()
    assert status == 0, said
    assert "resumed from interactive/checkpoints/step-4" in said
    assert not project.leaks()


def test_an_array_builds_shares_and_a_dependent_task_merges_them(project: Project) -> None:
    rows = [bottom_up_row(Picture(f"{number}", seed=number), probs=True) for number in range(24)]
    for part in range(4):
        write_lines(project.folder / f"part{part}.tsv", rows[part * 6 : part * 6 + 6])
    sources = [str(project.folder / f"part{part}.tsv") for part in range(4)]
    script = project.folder / "launch/slurm/import_array.sbatch"
    script.write_text(script.read_text(encoding="utf-8").replace("shares=32 ", "shares=3 "), encoding="utf-8")
    tool = ["import_images", "bottom_up_tsv", *sources, "--out", str(project.folder / "set")]
    small = ("--cpus-per-task=1", "--time=5")
    job = project.submit("import_array.sbatch", ("--array=0-2", *small), *tool).stdout.strip()
    merge = ("--array=0", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", *small)
    last = project.submit("import_array.sbatch", merge, *tool, "--merge").stdout.strip()
    fields = project.site.ended(f"{last}_0", 180)
    said = "".join(path.read_text(encoding="utf-8") for path in sorted(project.folder.glob("slurm-*_*.out")))
    assert fields["JobState"] == "COMPLETED", said
    one = project.folder / "one"
    done = run_alone("-m", "data_tools.import_images", "bottom_up_tsv", *sources, "--out", one)
    assert done.status == 0, done.tail
    assert tree(project.folder / "set/images") == tree(one / "images")


def test_shares_that_do_not_fit_the_array_are_refused(project: Project) -> None:
    script = project.folder / "launch/slurm/import_array.sbatch"
    script.write_text(re.sub("shares=[0-9]+ ", "shares=3 ", script.read_text(encoding="utf-8")), encoding="utf-8")
    done = project.submit("import_array.sbatch", ("--array=3", "--cpus-per-task=1"), "import_images", "bottom_up_tsv")
    job = done.stdout.strip()
    assert project.site.ended(f"{job}_3", 60)["ExitCode"] == "2:0"
    assert "task 3 of the array, but there are 3 shares" in (project.folder / f"slurm-{job}_3.out").read_text()


def test_each_task_has_its_cores_its_place_and_only_named_variables(tmp_path: Path) -> None:
    with slurm_site(nodes=1, binds=True) as site:
        exports = ("export NCCL_SOCKET_IFNAME=lo", "VLSCALE_EXPORT=PLAIN", "export PLAIN=1 OTHER=1")
        settings = ("export VLSCALE_SCRIPT=show.py", *exports)
        project = Project.make(tmp_path / "project", site, *settings)
        program = "import os, json; print(json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]))"
        (project.folder / "show.py").write_text(program, encoding="utf-8")
        options = ("--ntasks-per-node=2", "--cpus-per-task=1", "--gres=none", "--time=5")
        job = project.submit("one_node.sbatch", options, "--run_dir", "shown").stdout.strip()
        assert site.ended(job, 60)["JobState"] == "COMPLETED", project.said(job)
        ranks = [shown(project.rank_log("shown", job, rank)) for rank in (0, 1)]
    first, second = (cores for cores, _ in ranks)
    assert len(first) == len(second) == 1
    assert first != second
    for rank, (_, variables) in enumerate(ranks):
        place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "NCCL_SOCKET_IFNAME", "PLAIN")
        assert [variables[name] for name in place] == [str(rank), str(rank), "2", "2", "127.0.0.1", "lo", "1"]
        assert not {"OTHER", "WANDB_API_KEY"} & variables.keys()


def shown(log: str) -> tuple[list[int], dict[str, str]]:
    """The last line of a log, which is JSON."""
    cores, variables = json.loads(log.splitlines()[-1])
    return cores, variables
