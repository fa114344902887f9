"""Results are put under their names without losing anything that is no former result, whenever it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.convert.published import golden_state
from vlscale.cli import main
from vlscale.convert import placing
from vlscale.convert.conversion import RefusedError, Wish, convert
from vlscale.convert.verification import verify
from vlscale.errors import VlscaleError


def test_an_existing_target_stays_unless_it_is_a_result_and_may_be_replaced(published, tmp_path):
    target = tmp_path / "ours"
    convert(Wish(published, target))
    with pytest.raises(VlscaleError, match="exists already; give another name, or --overwrite"):
        convert(Wish(published, target))
    (target / "mine").write_text("kept")
    with pytest.raises(VlscaleError, match="holds mine, which no conversion wrote"):
        convert(Wish(published, target, overwrite=True))
    (target / "mine").unlink()
    torch.save({**golden_state(), "surprise": torch.zeros(1)}, published)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(RefusedError):
        convert(Wish(published, target, overwrite=True))
    assert (target / "model.safetensors").read_bytes() == before
    torch.save(golden_state(), published)
    convert(Wish(published, target, dtype="bf16", overwrite=True))
    assert (target / "model.safetensors").stat().st_size < len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "ours", "uniter.pt"]


def test_the_source_is_never_the_target(published, tmp_path):
    convert(Wish(published, tmp_path / "ours"))
    for target in (published, tmp_path / "ours/config.json", tmp_path / "ours", tmp_path / "ours/model.safetensors"):
        source = published if target == published else tmp_path / "ours"
        with pytest.raises(
            VlscaleError, match=r"is, holds or lies in the source|holds config\.json, which|is a folder"
        ):
            convert(Wish(source, target, to="uniter", overwrite=True))
    with pytest.raises(VlscaleError, match=r"is, holds or lies in|which no conversion wrote"):
        convert(Wish(published, tmp_path, overwrite=True))
    assert verify(tmp_path / "ours", published).same


@pytest.mark.parametrize("name", [".", "x" * 256, "x" * 300, "missing/x"])
def test_names_that_are_none_for_a_result(name, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VlscaleError, match=r"is no name for a result|is no folder; make it first"):
        convert(Wish(published, Path(name), overwrite=True))


def test_a_device_is_not_replaced(published, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VlscaleError, match="is neither a file nor a folder"):
        convert(Wish(published, tmp_path / "pipe", overwrite=True))
    assert (tmp_path / "pipe").is_fifo()


def test_what_comes_into_being_meanwhile_is_kept(published, tmp_path, monkeypatch):
    target = tmp_path / "ours"
    honest = placing._sync

    def slow(path):
        honest(path)
        target.mkdir()
        (target / "somebody else's").write_text("kept")

    monkeypatch.setattr(placing, "_sync", slow)
    with pytest.raises(VlscaleError, match="has come into being meanwhile"):
        convert(Wish(published, target))
    assert (target / "somebody else's").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_exchange_leaves_the_old_result(error, published, tmp_path, monkeypatch):
    target = tmp_path / "ours"
    convert(Wish(published, target))
    before = (target / "model.safetensors").read_bytes()
    honest, calls = os.rename, []

    def failing(one, other):
        calls.append(other)
        if len(calls) == 2:
            raise error
        honest(one, other)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((KeyboardInterrupt, VlscaleError)):
        convert(Wish(published, target, dtype="bf16", overwrite=True))
    monkeypatch.undo()
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "ours", "uniter.pt"]


KILLED = """
import os, signal, sys
from pathlib import Path
from vlscale.convert import placing
from vlscale.convert.conversion import Wish, convert
name, count = sys.argv[3], int(sys.argv[4])
honest, calls = getattr(os, name), []
def killing(*arguments):
    calls.append(arguments)
    if len(calls) > count:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*arguments)
setattr(os, name, killing)
convert(Wish(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=True))
"""


def killed(source, target, name, count):
    """Convert in a process that is killed at its call number ``count`` + 1 of a function of :mod:`os`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(source), str(target), name, str(count)]
    assert subprocess.run(command, env=environment, timeout=300).returncode == -signal.SIGKILL


def leftovers(folder):
    return sorted(folder.glob(".vlscale-convert-*"))


def test_what_a_killed_conversion_left_goes_with_the_next_to_the_same_target(published, tmp_path):
    killed(published, tmp_path / "ours", "fsync", 0)
    (left,) = leftovers(tmp_path)
    assert not (tmp_path / "ours").exists()
    assert (left / "new" / "ours" / "model.safetensors").is_file()
    convert(Wish(published, tmp_path / "other"))
    assert leftovers(tmp_path) == [left]
    convert(Wish(published, tmp_path / "ours"))
    assert leftovers(tmp_path) == []


def test_the_only_copy_of_the_former_result_stays(published, tmp_path):
    target = tmp_path / "ours"
    convert(Wish(published, target))
    killed(published, target, "rename", 1)
    (left,) = leftovers(tmp_path)
    convert(Wish(published, tmp_path / "other"))
    with placing.workplace(target):
        assert verify(left / "former", published).same
        assert verify(left / "new" / "ours", published).same
    convert(Wish(published, target))
    assert leftovers(tmp_path) == [left]
    convert(Wish(published, target, overwrite=True))
    assert leftovers(tmp_path) == []


def test_a_workplace_in_use_stays(tmp_path):
    with placing.workplace(tmp_path / "ours") as first:
        with placing.workplace(tmp_path / "ours") as second:
            assert first.parent.is_dir()
            assert first != second
        assert leftovers(tmp_path) == [first.parents[1]]
        alien = first.parents[1].with_name(f"{first.parents[1].name}-link")
        alien.symlink_to(tmp_path)
    with placing.workplace(tmp_path / "ours"):
        assert alien.is_symlink()


@pytest.mark.parametrize("name", ["old", "new", "former"])
def test_no_name_of_a_target_meets_one_of_the_workplace(name, published, tmp_path):
    convert(Wish(published, tmp_path / name))
    convert(Wish(published, tmp_path / name, dtype="bf16", overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", name, "uniter.pt"])


def test_reports_replace_nothing_but_reports(published, tmp_path, capsys):
    command = ["convert", str(published), str(tmp_path / "ours"), "--overwrite", "--report"]
    for wrong, says in ((published, "lies in the source"), (tmp_path / "no/r.json", "is no folder"),
                        (tmp_path / "text", "exists and is no report")):  # fmt: skip
        (tmp_path / "text").write_text("hello")
        with pytest.raises(SystemExit):
            main([*command, str(wrong)])
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert not (tmp_path / "ours").exists()
    assert main([*command, str(tmp_path / "r.json")]) == 0
    assert main([*command, str(tmp_path / "r.json")]) == 0
    check = ["convert", "--verify", str(tmp_path / "ours"), "--against", str(published)]
    assert main([*check, "--report", str(tmp_path / "r.json")]) == 0
    assert len(json.loads((tmp_path / "r.json").read_text())["equal"]) == 60
    with pytest.raises(SystemExit):
        main([*check, "--overwrite"])
