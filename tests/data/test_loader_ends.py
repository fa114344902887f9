"""However a loader ends, no process, thread, descriptor or shared memory is left."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import SemLock
from pathlib import Path

import psutil
import pytest

from tests.data.test_loader import SETTINGS, Faulty, loader_of, take, workers_alive
from tests.helpers import make_dataset
from vlscale.data.dataset import open_dataset
from vlscale.data.plan import FixedSteps, evaluation_steps
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset("toy", make_dataset(tmp_path_factory.mktemp("data") / "toy"), True)


ENDS = ["close", "forget", "interrupt", "exhaust", "user", "bug", "kill", "kill from outside", "plan"]


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_behind(dataset, end):
    take(loader_of(dataset, workers=1), 1)  # the fork server stays; start it before counting
    gc.collect()
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    steps = evaluation_steps(dataset.lengths, "mlm", 30, SETTINGS)
    if end not in ("exhaust", "close"):
        steps = steps * 5
    plan = Failing(steps, 9) if end == "plan" else FixedSteps(steps)
    faulty = {"mlm": Faulty(end, 3)} if end in ("user", "bug", "kill") else None
    loader = loader_of(dataset, plan, workers=2, objectives=faulty)
    batches = next(loader)[2]
    running = workers_alive()
    names = own_shared_files()
    assert (len(running), bool(names)) == (2, True)
    if end == "close":
        loader.close()
        loader.close()
        assert not list(loader)
    elif end == "exhaust":
        assert len(list(loader)) == len(plan) - 1 > 0
    elif end == "interrupt":
        with pytest.raises(KeyboardInterrupt), loader:
            raise KeyboardInterrupt
    elif end == "kill from outside":
        running[0].kill()
        with pytest.raises(VlscaleError, match="a reader process has died"):
            list(loader)
    elif end != "forget":
        raised = {"bug": ZeroDivisionError, "plan": ZeroDivisionError}.get(end, VlscaleError)
        with pytest.raises(raised):
            list(loader)
    if end != "forget":
        assert "plan" not in {thread.name for thread in threading.enumerate()}  # closed, not only dropped
    loader = None
    assert batches[0].features.isfinite().all()  # a batch outlives its loader
    batches = None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (workers_alive() or len(os.listdir("/proc/self/fd")) > descriptors):
        gc.collect()
        time.sleep(0.05)
    assert not workers_alive()
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert [name for name in names if Path(name).exists()] == []


class Failing(FixedSteps):
    """A plan that turns out to be impossible after some steps."""

    def __init__(self, steps, good):
        super().__init__(steps)
        self.good = good

    def steps(self, position):
        for index, found in enumerate(super().steps(position)):
            if index == self.good:
                raise ZeroDivisionError("planning failed")
            yield found


def own_shared_files():
    """Files in /dev/shm that are this process's semaphores or that PyTorch named after it or its workers."""
    locks = [thing for thing in gc.get_objects() if issubclass(type(thing), SemLock)]
    named = [lock._semlock.name for lock in locks if lock._semlock.name]  # other libraries' may be anonymous
    semaphores = {f"/dev/shm/sem.{name.strip('/')}" for name in named}
    pids = [os.getpid(), *(process.pid for process in workers_alive())]
    blocks = {str(path) for pid in pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")}
    return {name for name in semaphores if Path(name).exists()} | blocks


SCRIPT = """
import sys, time
from tests.data.test_loader import loader_of, open_dataset, workers_alive
from tests.data.test_loader_ends import own_shared_files
if __name__ == "__main__":
    loader = loader_of(open_dataset("toy", sys.argv[1], True), workers=2)
    next(loader)
    print(*own_shared_files(), *(process.pid for process in workers_alive()), flush=True)
    time.sleep(60)
"""


def test_nothing_is_left_behind_by_a_killed_run(dataset, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(dataset.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as run:
        try:
            told = run.stdout.readline().split()
        finally:
            run.kill()
    names = [word for word in told if word.startswith("/dev/shm")]
    workers = [int(word) for word in told if word.isdigit()]
    assert names
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        left = [name for name in names if Path(name).exists()], [pid for pid in workers if psutil.pid_exists(pid)]
        if left == ([], []):
            return
        time.sleep(0.1)
    raise AssertionError(f"left behind: {left}")
