"""Compiling the CPU kernel: what ``CXX`` and ``VLSCALE_CACHE`` may say, and what is told where they lead nowhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vlscale.kernels.ipot import compiled_files, native


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path))
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.fixture
def quick_source(tmp_path, monkeypatch):
    """A source that compiles in no time."""
    source = tmp_path / "quick.cpp"
    source.write_text(f'extern "C" int {native.SYMBOL}() {{ return 7; }}\n')
    monkeypatch.setattr(native, "SOURCE", source)


def _libraries(tmp_path) -> list[Path]:
    return list((tmp_path / "kernels").iterdir())


def _script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


def _needs_compiler() -> None:
    try:
        native.compiler()
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("quick_source")
def test_cxx_may_have_arguments(monkeypatch, tmp_path):
    _needs_compiler()
    named = Path(native.compiler()[0]).name
    monkeypatch.setenv("CXX", f"{named} -DGREETING='a b'")
    assert native.compiler()[1:] == ["-DGREETING=a b"]
    library, path = native.load()
    assert library is not None, path
    assert library[native.SYMBOL]() == 7
    assert _libraries(tmp_path) == [Path(path)]


@pytest.mark.parametrize(
    ("named", "message"),
    [("no-such-compiler -O2", "looked for no-such-compiler); install g++"), ("g++ '", 'CXX is "g++ \'"')],
)
def test_a_compiler_that_is_none_is_named(monkeypatch, named, message):
    monkeypatch.setenv("CXX", named)
    library, why = native.load()
    assert library is None
    assert message in why


@pytest.mark.usefixtures("quick_source")
def test_what_cannot_be_loaded_is_not_kept(monkeypatch, tmp_path):
    """``true`` succeeds and makes an empty file; a source may lack the functions."""
    monkeypatch.setenv("CXX", "true")
    library, why = native.load()
    assert library is None
    assert "cannot be loaded" in why
    assert "set CXX" in why
    assert _libraries(tmp_path) == []
    _needs_compiler()
    monkeypatch.delenv("CXX")
    native.load.cache_clear()
    native.SOURCE.write_text("int other;\n")
    assert f"has no {native.SYMBOL}" in native.load()[1]
    assert _libraries(tmp_path) == []


@pytest.mark.usefixtures("quick_source")
def test_a_spoilt_library_is_compiled_anew(monkeypatch, tmp_path):
    _needs_compiler()
    name = Path(native.load()[1]).name
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "other"))  # a path already loaded would not be read again
    spoilt = compiled_files.cache_folder() / name
    spoilt.touch()
    native.load.cache_clear()
    library, path = native.load()
    assert library is not None, path
    assert path == str(spoilt)


def test_a_compiler_that_hangs_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", _script(tmp_path / "slow", "exec sleep 30"))

    def impatient(command, **options):
        return honest(command, **{**options, "timeout": 0.05})

    honest = subprocess.run
    monkeypatch.setattr(native.subprocess, "run", impatient)
    library, why = native.load()
    assert library is None
    assert "--version needs more than" in why


def test_a_cache_that_cannot_be_made_names_the_setting(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for place in ("/proc/nope", str(tmp_path / "file")):
        monkeypatch.setenv("VLSCALE_CACHE", place)
        with pytest.raises(OSError, match=rf"{place}/kernels, .*cannot be made \(.*\); set VLSCALE_CACHE"):
            compiled_files.cache_folder()


def test_the_folder_of_another_user_and_one_open_to_all_are_told_apart(monkeypatch, tmp_path):
    folder = compiled_files.cache_folder()
    folder.chmod(0o775)
    with pytest.raises(OSError, match=r"others can write to it.*chmod go-w it, or set VLSCALE_CACHE"):
        compiled_files.cache_folder()
    folder.chmod(0o755)
    assert compiled_files.cache_folder() == folder
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(OSError, match=rf"belongs to another user \(id {folder.stat().st_uid}\).*set VLSCALE_CACHE"):
        compiled_files.cache_folder()


def test_a_folder_that_takes_no_files_names_the_setting(tmp_path):
    with (
        pytest.raises(OSError, match=r"no file can be written there .*set VLSCALE_CACHE"),
        compiled_files.written(tmp_path / "gone" / "x.so"),
    ):
        pass
