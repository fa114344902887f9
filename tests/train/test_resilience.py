"""The signal that asks to stop: held back, remembered, and no business of child processes."""

from __future__ import annotations

import subprocess
import sys

HELD = """
import os, signal, subprocess, sys, multiprocessing
from vlscale.train.resilience import STOP, hold_stop, stop_asked

def sleep(ready):
    ready.set()
    import time
    time.sleep(0.5)

if __name__ == "__main__":
    hold_stop()
    assert not stop_asked()
    os.kill(os.getpid(), STOP)
    os.kill(os.getpid(), STOP)
    hold_stop()  # launch/pretrain.py calls it twice
    import torch  # anything slow: the signal waits
    assert stop_asked(), "the signal was lost"
    assert not stop_asked(), "one request counts once"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    child.send_signal(STOP)
    assert child.wait() == 0, "a compiler would have died of it"
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    worker = context.Process(target=sleep, args=(ready,))
    worker.start()
    ready.wait()
    os.kill(worker.pid, STOP)
    from multiprocessing import forkserver
    os.kill(forkserver._forkserver._forkserver_pid, STOP)
    worker.join()
    assert worker.exitcode == 0, worker.exitcode
    assert not stop_asked()
    print("held")
"""


def test_the_signal_is_held_until_it_is_asked_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "held.py"
    script.write_text(HELD, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "held\n", done.stderr


def test_a_signal_that_a_wrapper_ignores_still_arrives() -> None:
    """launch/slurm/task.sh ignores it, so that nothing dies before Python holds it."""
    code = (
        "import os, signal; from vlscale.train.resilience import STOP, hold_stop, stop_asked; hold_stop();"
        "assert signal.getsignal(STOP) == signal.SIG_IGN; os.kill(os.getpid(), STOP); print(stop_asked())"
    )
    shell = f'trap "" USR2; exec {sys.executable} -c "$0"'
    done = subprocess.run(["bash", "-c", shell, code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
