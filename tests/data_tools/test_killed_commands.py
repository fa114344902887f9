"""kill -9 of the real command lines over real formats at random moments; the same command then gives equal bytes."""

from __future__ import annotations

import gzip
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import import_images, import_texts
from tests.data_tools.feature_files import Picture, bottom_up_row
from tests.data_tools.text_sources import ENGLISH, small_tokenizer
from tests.data_tools.toy_sources import tree


def write_features(folder):
    """Seven files, two of them packed: a part each."""
    paths = []
    for number in range(7):
        rows = [Picture(f"{number}-{row}", regions=36, dim=64, seed=number) for row in range(40)]
        data = "".join(bottom_up_row(row, probs=True) + "\n" for row in rows).encode()
        paths.append(folder / (f"{number}.tsv.gz" if number % 3 == 1 else f"{number}.tsv"))
        paths[-1].write_bytes(gzip.compress(data, 1) if number % 3 == 1 else data)
    return [*map(str, paths)]


def write_texts(folder):
    """Six files of documents, a third of which repeat earlier ones."""
    rng, paths = random.Random(0), []
    for number in range(6):
        documents = ["\n".join(rng.choices(ENGLISH, k=1 + rng.randrange(3))) for _ in range(400)]
        paths.append(folder / f"{number}.txt")
        paths[-1].write_text("\n\n".join(documents) + "\n")
    return [*map(str, paths)]


@pytest.fixture(params=["images", "texts"])
def command(request, tmp_path):
    """Module and arguments without ``--out``, and the function behind it."""
    folder = tmp_path / "source"
    folder.mkdir()
    if request.param == "images":
        return "data_tools.import_images", ["bottom_up_tsv", *write_features(folder)], import_images.run
    tokenizer = small_tokenizer(tmp_path / "tokenizer", "wordpiece")
    options = ["--tokenizer", str(tokenizer), "--dedup", "exact", "--max-tokens", "40"]
    return "data_tools.import_texts", ["plain_text", *write_texts(folder), *options], import_texts.run


def _command_line(module, arguments):
    """``python -m module arguments``, in a process that has loaded the libraries already."""
    sys.argv = [module, *arguments]
    with Path(os.devnull).open("w") as sys.stderr:
        runpy.run_module(module, run_name="__main__")


def forked(module, arguments, after=None):
    """Exit code and seconds of a command, perhaps killed after some seconds."""
    child = multiprocessing.get_context("fork").Process(target=_command_line, args=(module, arguments))
    begin = time.monotonic()
    child.start()
    if after is not None:
        child.join(after)
        child.kill()
    child.join(120)
    return child.exitcode, time.monotonic() - begin


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_finished(root, module):
    """Whether the store is there: what was killed behind that is not built again."""
    kind = module.rpartition("_")[2]
    return (root / kind).exists() and not (root / ".parts" / f"{kind}-merged").exists()


def killed_with_workers(module, arguments):
    """Kill a real ``python -m`` while its workers run, and wait until they have ended too."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    workers: list[int] = []
    while len(workers) < 3 and process.poll() is None and time.monotonic() < deadline:  # one tracks resources
        workers = children(process)
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(workers) >= 2
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_a_command_killed_again_and_again_ends_with_the_same_bytes(tmp_path, command):
    module, arguments, run = command
    run([*arguments, "--out", str(tmp_path / "warm")])  # loads what the children would load each
    code, seconds = forked(module, [*arguments, "--out", str(tmp_path / "whole")])
    assert code == 0
    expected = tree(tmp_path / "whole")
    assert tree(tmp_path / "warm") == expected

    killed_with_workers(module, [*arguments, "--out", str(tmp_path / "workers"), "--workers", "2"])
    rng, killed = random.Random(0), 0
    for _ in range(20):
        if killed >= 3:
            break
        if is_finished(tmp_path / "again", module):  # the machine was busier while the command was timed
            shutil.rmtree(tmp_path / "again")
            seconds, killed = seconds / 2, 0
        after = rng.uniform(0.05, 0.3) * seconds
        killed += forked(module, [*arguments, "--out", str(tmp_path / "again")], after)[0] == -signal.SIGKILL
    assert killed >= 2
    for root in (tmp_path / "workers", tmp_path / "again"):
        if not is_finished(root, module):
            code, _ = forked(module, [*arguments, "--out", str(root)])
            assert code == 0
        assert tree(root) == expected
