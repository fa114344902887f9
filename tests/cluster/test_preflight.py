"""What hosts may answer, without hosts: a program named ssh that answers as each test tells it to."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlscale.cluster.facts import gpu_names, look
from vlscale.cluster.hostfile import Host
from vlscale.cluster.inputs import Needs
from vlscale.cluster.preflight import Checked, check
from vlscale.cluster.remote import Place, Session, explain_ssh

ROOT = Path(__file__).resolve().parents[2]
NEEDS = Needs((), gpus=False)
SSH = """#!{python} -SE
import json, os, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
host = sys.argv[-2]
told = json.load(open(folder + "/answers.json"))[host]
with open(folder + "/calls-" + host, "a+") as calls:
    calls.write(".")
    calls.seek(0)
    number = len(calls.read())
if number <= told.get("failures", 0):
    sys.exit(sys.stderr.write(told["complaint"]) and 255)
def answer(content):
    print("vlscale-agent: " + json.dumps(content), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    sys.stdout.write(told.get("noise", ""))
    if "raw" in told:
        print(told["raw"], flush=True)
    elif request["do"] == "look":
        answer(told["look"])
    elif request["do"] == "connect":
        answer(told.get("connect", {{"failed": {{address: "" for address in request["addresses"]}}}}))
    else:
        answer(told.get("listen", {{"token": "t"}}))
"""


class Site:
    """Hosts that answer as they are told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, dict[str, Any]] = {}
        self.facts = look([], "localhost")
        program = folder / "ssh"
        program.write_text(SSH.format(python=sys.executable), encoding="utf-8")
        program.chmod(0o755)

    def add(self, name: str, **told: Any) -> None:
        """Add a host; by default it answers well, as a machine of its own."""
        self.answers[name] = {"look": {**self.facts, "machine": name}, **told}

    def look(self, name: str, **changed: Any) -> None:
        """Add a host that has something else."""
        self.add(name, look={**self.facts, "machine": name, **changed})

    def check(self, needs: Needs = NEEDS) -> Checked:
        (self.folder / "answers.json").write_text(json.dumps(self.answers), encoding="utf-8")
        hosts = [Host(name, (0, 1), f"hosts:{number}") for number, name in enumerate(self.answers, 1)]

        async def checked() -> Checked:
            sessions: dict[str, Session] = {}
            try:
                return await check(hosts, Place(ROOT, {}), needs, "", 29500, sessions)
            finally:
                await asyncio.gather(*(session.close() for session in sessions.values()))

        return asyncio.run(checked())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return Site(tmp_path)


def of(checked: Checked, name: str) -> str:
    """The one problem of a host."""
    found = [problem for problem in checked.problems if problem.startswith(f"{name}: ")]
    assert len(found) == 1, checked.problems
    return found[0]


def test_answers_that_are_none_are_told_in_a_short_line_each(site: Site) -> None:
    evil = "\x1b[2J\nvlscale launch: all well"
    site.add("first")
    site.add("nested", raw="vlscale-agent: " + "[" * 200_000)
    site.add("endless", raw="x" * 3_000_000)
    site.look("address", interfaces={"eth0": ["nope"]})
    site.look("types", versions=["python"])
    site.look("version", versions={**site.facts["versions"], "python": evil + "9" * 100_000})
    site.look("forgetful", paths={})
    site.look("path", paths={"/data": {"problem": evil * 1000}, evil: {"problem": evil}})
    for name in set(site.answers) - {"forgetful", "path"}:
        site.answers[name]["look"]["paths"] = {"/data": {"hash": "0"}}
    found = site.check(replace(NEEDS, paths=("/data",)))
    assert len(found.problems) == len(site.answers) - 1, found.problems
    assert all(problem.isprintable() and len(problem) < 600 for problem in found.problems)
    for name in ("nested", "endless"):
        assert "its agent's answer cannot be read" in of(found, name)
    for name in ("address", "types", "forgetful"):
        assert "its agent speaks another language" in of(found, name)
    assert "python ?[2J?vlscale launch: all well999" in of(found, "version")
    assert of(found, "path").startswith("path: /data ?[2J?vlscale")


def test_hostile_answers_about_ports(site: Site) -> None:
    site.add("first", listen={"problem": "\x1b[2J" + "x" * 100_000})
    problem = of(site.check(), "first")
    assert problem.isprintable()
    assert len(problem) < 400
    site.add("first")
    site.add("other", connect={"failed": {"x": 1}})
    assert "did not say whether it reaches" in of(site.check(), "other")


def test_a_login_shell_that_prints_without_ending_its_line(site: Site) -> None:
    site.add("first", noise="welcome to this cluster ")
    assert site.check().problems == []


def test_too_many_connections_at_once_are_tried_again_once(site: Site) -> None:
    complaint = "kex_exchange_identification: Connection closed by remote host\nConnection closed by 10.0.0.1 port 22\n"
    site.add("first", failures=1, complaint=complaint)
    site.add("never", failures=9, complaint=complaint)
    site.add("unknown", failures=9, complaint="Host key verification failed.\nConnection closed by 10.0.0.1 port 22\n")
    found = site.check()
    assert len(found.problems) == 2, found.problems
    assert "raise MaxStartups" in of(found, "never")
    assert "its host key is not known" in of(found, "unknown")
    calls = {name: len((site.folder / f"calls-{name}").read_text()) for name in site.answers}
    assert calls == {"first": 2, "never": 2, "unknown": 1}


def test_the_master_is_what_its_name_means_on_the_other_hosts(site: Site) -> None:
    site.look("first", interfaces={"eno1": ["10.1.0.1"], "ib0": ["fd00::1", "10.2.0.1"]}, master=["127.0.1.1"])
    site.look("other", master=["10.2.0.1"])
    assert site.check().master == "10.2.0.1"
    site.look("other", master=[])
    assert site.check().master == "10.1.0.1"


def test_pdsh_needs_a_posix_shell(site: Site) -> None:
    site.look("first", shell="bash")
    site.look("other", shell="tcsh")
    assert site.check().problems == []
    assert "other: its login shell is tcsh" in of(site.check(replace(NEEDS, posix_shell=True)), "other")


def test_why_there_are_no_gpus(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = site.folder / "nvidia-smi"
    for text, names, reason in (
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", [], "status 18: Failed to init"),
        ("sleep 60", [], "did not answer within 1 s"),
        ("echo 'Tesla V100, 16384'", ["Tesla V100, 16384"], ""),
    ):
        smi.write_text(f"#!/bin/sh\n{text}\n".replace("sleep", "exec sleep"), encoding="utf-8")
        smi.chmod(0o755)
        monkeypatch.setattr("vlscale.cluster.facts._QUERY_S", 1.0)
        found, problem = gpu_names()
        assert found == names
        assert reason in problem
        assert bool(reason) == bool(problem)
        site.look("first", gpus=found, gpu_problem=problem)
        told = of(site.check(replace(NEEDS, gpus=True)), "first")
        assert f"asks for 2 slots, but it has {len(names)} GPUs" in told
        assert reason in told


def test_no_ssh_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    site.add("first")
    (tmp_path / "ssh").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install openssh-client" in of(site.check(), "first")


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "zsh", "tcsh", "fish"])
def test_every_login_shell_passes_words_on_as_they_are(tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    odd = ["a b", "it's", "a\\b", "a\\\\b", "end\\", "x\\'y", "bang!x", "!!", "$(id) `id`", "a;b", "*", "", "é"]
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['SITE'], os.getcwd()]))"
    command = Place(tmp_path, {"SITE": "it's!"}).ssh("host", [sys.executable, "-c", show, *odd])
    done = subprocess.run([shell, "-c", command[-1]], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [odd, "it's!", str(tmp_path)]


def test_what_ssh_says_is_shown_without_control_characters() -> None:
    told = explain_ssh("something new: \x1b[2J" + "x" * 1000 + "\n", "host", 255)
    assert told.isprintable()
    assert len(told) < 400


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGUSR2, 75)]
)
def test_a_signal_during_the_check_starts_nothing(site: Site, number: int, status: int) -> None:
    site.add("first", raw="")  # it never answers
    (site.folder / "answers.json").write_text(json.dumps(site.answers), encoding="utf-8")
    (site.folder / "hosts").write_text("first slots=1\n", encoding="utf-8")
    (site.folder / "script.py").write_text("print('started')\n", encoding="utf-8")
    words = [
        "-c",
        "from vlscale.cli import main; raise SystemExit(main())",
        "launch",
        "--hostfile",
        "hosts",
        "script.py",
    ]
    process = subprocess.Popen([sys.executable, *words], cwd=site.folder, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # not nohup's
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        until = time.monotonic() + 20
        while not (site.folder / "calls-first").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == status, shlex.quote(out)
    assert out == "vlscale launch: stopped by a signal; nothing was started\n"
