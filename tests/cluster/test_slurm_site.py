"""Where Slurm cannot be installed or started, its tests skip and say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import slurm_site

APT_GET = "#!/bin/sh\necho 'E: first' >&2\necho 'E: Could not resolve deb.debian.org' >&2\nexit 100\n"
MUNGED = "#!/bin/sh\necho 'munged: Error: Logfile is insecure' >&2\nexit 1\n"


def program(folder: Path, name: str, text: str) -> None:
    """Write a program."""
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)


def test_a_machine_that_cannot_install_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "apt-get", APT_GET)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_site, "PROGRAMS", ("no-such-program",))
    with (
        pytest.raises(pytest.skip.Exception, match=r"apt-get update failed: E: Could not resolve deb\.debian\.org$"),
        slurm_site.slurm_site(),
    ):
        pass


def test_a_machine_without_munged_skips_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "munged", MUNGED)
    program(tmp_path, "mungekey", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm_site, "PROGRAMS", ("munged",))
    monkeypatch.setattr(slurm_site, "MUNGED_S", 1.0)
    monkeypatch.setattr(slurm_site.tempfile, "tempdir", str(tmp_path))
    with (
        pytest.raises(pytest.skip.Exception, match=r"munged does not start: .*Logfile is insecure$"),
        slurm_site.slurm_site(),
    ):
        pass
    assert not list(tmp_path.glob("vlscale-slurm-*"))


@pytest.mark.parametrize(
    ("version", "setting"),
    [
        ("slurm-wlm 22.05.8", "SlurmctldParameters=preempt_send_user_signal"),
        ("slurm 23.02.2", "PreemptParameters=send_user_signal"),
        ("slurm-wlm 24.11.5-4", "PreemptParameters=send_user_signal"),
    ],
)
def test_each_slurm_gets_the_setting_that_it_knows(version: str, setting: str) -> None:
    assert slurm_site._preemption(version) == setting
