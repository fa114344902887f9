"""A real Slurm of a test's own: munged, slurmctld and slurmd with several virtual nodes on this machine.

It has its own folder, ports, keys and cluster name, so that it disturbs no Slurm that runs here already, and its
processes are found again by the SLURM_CONF in their environment, so that none is left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
PACKAGES = ("slurm-wlm", "munge")
DAEMONS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "munged": "munge"}
"""Program -> service that Debian starts when it installs it; tests start their own."""
MUNGED_S = 15.0
"""How long munged may take to start."""

_PREFIX = "vlscale-slurm-"
# cred_expire: how long Slurm holds a requeued job back, for its old credential: 120 s unless told, at least 5.
CONFIGURATION = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/{task}
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=5
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preemption}
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=n[1-{count}] MaxTime=INFINITE State=UP PriorityTier=2
PartitionName=one Nodes=n1 MaxTime=INFINITE State=UP
"""


def unavailable() -> str | None:
    """Why Slurm cannot be started here, as far as a look tells; None if it may be."""
    if os.geteuid() != 0:
        return "not root"
    if _missing() and (not Path("/etc/debian_version").is_file() or shutil.which("apt-get") is None):
        return f"not Debian, and {' '.join(_missing())} are not installed"
    return None


def install() -> None:
    """Install Debian's packages, unless the programs are there; skip the test where apt-get cannot."""
    missing = _missing()
    if not missing:
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        try:
            subprocess.run(["apt-get", "-qq", *command], check=True, env=environment, timeout=300, capture_output=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            pytest.skip(f"no Slurm here: apt-get {command[0]} failed: {said.splitlines()[-1] if said else error}")
    for program, service in DAEMONS.items():
        if program in missing and shutil.which("service"):
            subprocess.run(["service", service, "stop"], check=False, timeout=60, capture_output=True)


def _missing() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Site:
    """A running Slurm.

    Attributes:
        folder: its configuration, state and logs.
        environment: what a user's shell has; the commands of this site find it through SLURM_CONF.
    """

    folder: Path
    environment: dict[str, str]

    def run(
        self, *command: str | Path, cwd: Path | None = None, check: bool = True, timeout: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user of the cluster would."""
        words = [str(word) for word in command]
        environment = self.environment | variables
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, field by field."""
        said = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait(self, job: str, wanted: Callable[[dict[str, str]], bool], timeout: float = 120) -> dict[str, str]:
        """Wait until a job is as wanted, and return its fields."""
        end = time.monotonic() + timeout
        while not wanted(fields := self.job(job)):
            assert time.monotonic() < end, f"job {job} after {timeout} s: {fields}"
            time.sleep(0.3)
        return fields

    def ended(self, job: str, timeout: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good."""
        going = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")
        return self.wait(job, lambda fields: not fields["JobState"].startswith(going), timeout)

    def processes(self, word: str = "") -> dict[int, str]:
        """Processes that this site started, as process id -> command line, whose command line holds ``word``."""
        return {pid: line for pid, line in _processes(self.folder).items() if word in line}


@contextmanager
def slurm_site(nodes: int = 2, cpus: int = 2, binds: bool = False) -> Iterator[Site]:
    """Start Slurm with nodes n1, n2, ... and end it at exit.

    Partitions: ``main`` has all nodes, ``urgent`` too and preempts its jobs, ``one`` has n1 alone.

    Args:
        nodes: how many; cpus: what each says it has.
        binds: tasks are bound to cores; those of all nodes to the same ones, as it is one machine.

    A machine that cannot install Slurm, or start its munged, skips the test; what fails after that is a failure.
    """
    install()
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # short: the path of a socket has 107 characters at most
    (folder / "owner").write_text(str(os.getpid()), encoding="ascii")
    environment = {
        "PATH": _path(),
        "HOME": os.environ.get("HOME", "/root"),  # as in batch jobs: with the operators that are compiled already
        "USER": "root",
        "LANG": "C.UTF-8",
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    site = Site(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _configure(folder, nodes, cpus, "affinity" if binds else "none")
        _start_daemons(site, daemons, nodes)
        yield site
    finally:
        _stop(site, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep() -> None:
    """End what is left of sites whose tests were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            if not Path(f"/proc/{int((folder / 'owner').read_text(encoding='ascii'))}").exists():
                _kill_all(folder)
                shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, nodes: int, cpus: int, task: str) -> None:
    for name in ("state", *(f"spool-n{number}" for number in range(1, nodes + 1))):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    ports = _free_ports(nodes + 1)
    lines = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[number]} CPUs={cpus} "
        f"RealMemory=8000 State=UNKNOWN"
        for number in range(1, nodes + 1)
    ]
    name = re.sub(r"\W", "", folder.name)[-12:].lower()
    version = subprocess.run(["slurmctld", "-V"], env={"PATH": _path()}, capture_output=True, text=True, timeout=20)
    text = CONFIGURATION.format(
        preemption=_preemption(version.stdout),
        name=f"t{name}",
        host=host,
        ports=ports,
        folder=folder,
        nodes="\n".join(lines),
        count=nodes,
        task=task,
    )
    (folder / "slurm.conf").write_text(text, encoding="utf-8")


def _preemption(version: str) -> str:
    """The line that has preemption send a job's own signal; it moved in Slurm 23.02."""
    number = re.search(r"(\d+)\.(\d+)", version)
    if number and (int(number[1]), int(number[2])) >= (23, 2):
        return "PreemptParameters=send_user_signal"
    return "SlurmctldParameters=preempt_send_user_signal"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _start_daemons(site: Site, daemons: list[subprocess.Popen[bytes]], nodes: int) -> None:
    """Start all daemons in the foreground, as children, and wait until the nodes are idle."""
    folder = site.folder
    site.run("mungekey", "--create", f"--keyfile={folder}/munge.key")
    files = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "pid-file", "seed-file")]
    _start(site, daemons, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
    try:
        _until((folder / "munge.socket").exists, folder, "munged", MUNGED_S)
    except AssertionError as error:
        pytest.skip(f"no Slurm here: munged does not start: {str(error).splitlines()[-1]}")
    _start(site, daemons, "slurmctld", "-D", "-c")
    for number in range(1, nodes + 1):
        _start(site, daemons, "slurmd", "-D", "-N", f"n{number}")

    def states() -> list[str]:
        return site.run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%t", check=False).stdout.split()

    _until(lambda: states() == ["idle"] * nodes, folder, "nodes")


def _start(site: Site, daemons: list[subprocess.Popen[bytes]], *command: str) -> None:
    with open(site.folder / f"daemon-{len(daemons)}.log", "wb") as log:
        daemons.append(
            subprocess.Popen(command, cwd=site.folder, env=site.environment, start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        )  # fmt: skip


def _until(true: Callable[[], bool], folder: Path, what: str, timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not true():
        if time.monotonic() > end:
            logs = [path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("daemon-*.log"))]
            raise AssertionError(f"{what}: not there after {timeout} s\n" + "\n".join(logs))
        time.sleep(0.1)


def _stop(site: Site, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End all jobs, the daemons, and whatever else this site started."""
    with contextlib.suppress(Exception):
        site.run("scancel", "--user=root", timeout=10)
        _until(lambda: not site.run("squeue", "-h").stdout.strip(), site.folder, "jobs", timeout=15)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    _kill_all(site.folder)


def _kill_all(folder: Path) -> None:
    for _ in range(3):  # what was just being started shows up in the next round
        for pid in _processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _processes(folder: Path) -> dict[int, str]:
    """Process id -> command line of what has this site's SLURM_CONF in its environment."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(entry.name)] = line
    return found
