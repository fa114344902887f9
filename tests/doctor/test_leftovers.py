"""Leftovers in shared memory: real files of a prefix of this test's own, and a real process that has one open."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from vlscale.cli import main
from vlscale.doctor import leftovers
from vlscale.doctor.facts import Leftover
from vlscale.doctor.system import SHM

OLD = time.time() - 3600
PORT = 100_000 + os.getpid()  # no real port, so no real run's name
PLANTED = f"deepspeed_allreduce_buffer_{os.getuid()}_doctor-test_{PORT}"
pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="no /dev/shm here")


@pytest.fixture
def planted() -> Iterator[Path]:
    path = SHM / f"{PLANTED}_0"
    path.write_bytes(bytes(mmap.PAGESIZE))
    os.utime(path, (OLD, OLD))
    yield path
    path.unlink(missing_ok=True)


@contextmanager
def holder(path: Path, keep_descriptor: bool = False) -> Iterator[None]:
    """Another process, which maps a file (and closes it, as DeepSpeed does) or only holds it open."""
    code = (
        "import mmap, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        f"if not {keep_descriptor}:\n"
        "    mapped = mmap.mmap(file.fileno(), 0)\n"
        "    file.close()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.communicate("")


def found(path: Path, temporary: Path) -> Leftover:
    items, _ = leftovers.scan(SHM, temporary)
    (item,) = [item for item in items if item.path == str(path)]
    return item


def test_clean_removes_a_stale_file(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    item = found(planted, tmp_path)
    assert (item.kind, item.owner, item.in_use, item.bytes) == ("DeepSpeed", os.getuid(), False, mmap.PAGESIZE)
    assert 3600 <= item.age_s < 86_400
    # The command as a user gives it, on this file alone: other tests' files are none of its business.
    monkeypatch.setattr(leftovers, "_MEMORY", [("DeepSpeed", _only(planted))])
    monkeypatch.setattr(leftovers, "_LOCKS", [])
    assert main(["doctor", "--clean"]) == 0
    assert f"removed {planted}\nremoved 1 file, 4 KiB\n" in capsys.readouterr().out
    assert not planted.exists()


def _only(path: Path) -> object:
    import re

    return re.compile(f"({re.escape(path.name)})")


@pytest.mark.parametrize("keep_descriptor", [False, True], ids=["mapped", "open"])
def test_a_file_that_a_process_has_is_never_removed(planted: Path, tmp_path: Path, keep_descriptor: bool) -> None:
    with holder(planted, keep_descriptor):
        assert found(planted, tmp_path).in_use
        assert str(planted) not in [item.path for item in _clean_here(planted, tmp_path)]
        assert planted.exists()
    assert not found(planted, tmp_path).in_use


def test_files_of_one_run_are_in_use_together(planted: Path, tmp_path: Path) -> None:
    other = SHM / f"{PLANTED}_1"
    other.write_bytes(bytes(mmap.PAGESIZE))
    try:
        with holder(other):
            assert found(planted, tmp_path).in_use
    finally:
        other.unlink()


def _clean_here(planted: Path, tmp_path: Path) -> list[Leftover]:
    """Clean a folder that holds a second name of the planted file, and nothing else."""
    folder = SHM / f"doctor-test-{os.getpid()}"
    folder.mkdir()
    try:
        os.link(planted, folder / planted.name)
        removed, unseen = leftovers.clean(folder, tmp_path)
        assert unseen == []
        return removed
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that stands for /dev/shm: every name that is known, one hour old, and some that are not ours."""
    folder = tmp_path / "shm"
    folder.mkdir()
    names = ["000000_locals", "000003_shard_access_times", "nccl-Ab12Cd", f"torch_{1 << 30}_7_0", f"{PLANTED}_0"]
    for name in [*names, "psm_1234abcd", "sem.mp-x", "00000_locals", "000000_locals2", "nccl-topology", "notes"]:
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (OLD, OLD))
    return folder


def test_only_known_names_are_looked_at(folder: Path, tmp_path: Path) -> None:
    for name in ("000000_barrier_filelock", "000003_cache_filelock", "other_filelock"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (OLD, OLD))
    items, _ = leftovers.scan(folder, tmp_path)
    assert sorted((Path(item.path).name, item.kind) for item in items) == sorted([
        ("000000_locals", "streaming"), ("000003_shard_access_times", "streaming"), ("nccl-Ab12Cd", "NCCL"),
        (f"torch_{1 << 30}_7_0", "PyTorch"), (f"{PLANTED}_0", "DeepSpeed"),
        ("000000_barrier_filelock", "streaming"), ("000003_cache_filelock", "streaming"),
    ])  # fmt: skip


def test_the_names_are_those_that_streaming_gives() -> None:
    """They are read from its source: a new version may have new ones."""
    constant = pytest.importorskip("streaming.base.constant")
    prefix = pytest.importorskip("streaming.base.shared.prefix")
    for name in constant.SHM_TO_CLEAN:
        assert leftovers._MEMORY[0][1].fullmatch(prefix._get_path(7, name))
    for name in (constant.BARRIER_FILELOCK, constant.CACHE_FILELOCK):
        assert leftovers._LOCKS[0][1].fullmatch(prefix._get_path(7, name))


def test_a_lock_of_streaming_lives_as_long_as_its_memory(folder: Path, tmp_path: Path) -> None:
    lock = tmp_path / "000000_barrier_filelock"
    lock.touch()
    os.utime(lock, (OLD, OLD))
    with holder(folder / "000000_locals"):
        removed, _ = leftovers.clean(folder, tmp_path)
    assert lock.exists()
    assert (folder / "000000_locals").exists()
    assert "000003_shard_access_times" in [Path(item.path).name for item in removed]
    removed, _ = leftovers.clean(folder, tmp_path)
    assert {Path(item.path).name for item in removed} == {"000000_locals", lock.name}


def test_young_files_and_those_of_others_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(folder / "nccl-Ab12Cd")
    assert "nccl-Ab12Cd" not in [Path(item.path).name for item in leftovers.clean(folder, tmp_path)[0]]
    assert (folder / "nccl-Ab12Cd").exists()
    stranger = Leftover("/x", "NCCL", "g", 1, os.getuid() + 1, 1, 1e6, False)
    assert not leftovers.removable(stranger, os.getuid())
    assert leftovers.removable(replace(stranger, owner=os.getuid()), os.getuid())


def test_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("x", encoding="utf-8")
    os.utime(precious, (OLD, OLD))
    shm = tmp_path / "shm"
    shm.mkdir()
    (shm / "000000_locals").symlink_to(precious)
    os.utime(shm / "000000_locals", (OLD, OLD), follow_symlinks=False)
    assert leftovers.scan(shm, tmp_path / "none") == ([], [])
    assert leftovers.clean(shm, tmp_path / "none") == ([], [])
    assert (shm / "000000_locals").is_symlink()


def test_tensors_of_a_living_process_stay(tmp_path: Path) -> None:
    path = tmp_path / f"torch_{os.getpid()}_1_0"
    path.write_bytes(b"x")
    os.utime(path, (OLD, OLD))
    assert leftovers.clean(tmp_path, tmp_path / "none")[0] == []


def test_nothing_is_removed_while_a_process_hides_what_it_uses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /proc of files: a trainer of this user whose mappings cannot be read, a daemon's, and another user's."""
    proc = tmp_path / "proc"
    processes = {"17": ("sshd", os.getuid()), "18": ("python", os.getuid() + 1), "19": ("pt_main_thread", os.getuid())}
    for number, (name, user) in processes.items():
        (proc / number).mkdir(parents=True)
        (proc / number / "status").write_text(f"Name:\t{name}\nUid:\t{user}\t0\t0\t0\n", encoding="utf-8")
    monkeypatch.setattr(leftovers, "_mappings", _forbidden)
    assert leftovers.clean(folder, tmp_path / "none", proc) == ([], ["pt_main_thread (19)"])
    (proc / "19/status").unlink()
    removed, unseen = leftovers.clean(folder, tmp_path / "none", proc)
    assert (len(removed), unseen) == (5, [])


def _forbidden(process: Path) -> bytes:
    raise PermissionError(process)  # not even root gets here by file modes
