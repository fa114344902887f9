"""The two ways to start a run on all hosts: DeepSpeed's own through pdsh, or plain ssh with DeepSpeed on each host."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlscale.cluster.hostfile import Host
from vlscale.cluster.remote import Place
from vlscale.errors import VlscaleError

LAUNCHERS = ("ssh", "pdsh")
ENDED = re.compile(r"^pdsh@[^:]*: ([A-Za-z0-9_.-]+): ssh exited with exit code (\d+)$")
"""What pdsh says on stderr when the command on a host has failed: host, status."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PLAIN_PATH = re.compile(r"[\w@%+=:,./-]+", re.ASCII)


@dataclass(frozen=True)
class Run:
    """What is started.

    Attributes:
        hosts: with their slots; the first is the master.
        master: address of the first host; port: that rank 0 listens on.
        script, arguments: as given.
    """

    hosts: tuple[Host, ...]
    master: str
    port: int
    script: str
    arguments: tuple[str, ...]

    @property
    def processes(self) -> int:
        """Number of ranks."""
        return sum(len(host.slots) for host in self.hosts)


def check_launcher(launcher: str, place: Place, run_words: Sequence[str]) -> None:
    """Make sure that a launcher is there and can carry the words of the command line.

    Raises:
        VlscaleError: it is not, or cannot.
    """
    for program in ("ssh", "pdsh") if launcher == "pdsh" else ("ssh",):
        if shutil.which(program, path=place.exports["PATH"]) is None:
            cure = " or use --launcher ssh" if program == "pdsh" else ""
            package = "openssh-client" if program == "ssh" else program
            raise VlscaleError(f"{program} is not on PATH; install it (Debian: apt-get install {package}){cure}")
    for word in run_words:
        if _CONTROL.search(word):
            raise VlscaleError(f"argument {ascii(word)[:100]} holds a control character; put it into a file")
    if launcher == "pdsh":
        for path in (str(place.project), place.python, run_words[0]):
            if not _PLAIN_PATH.fullmatch(path) or "%" in path:
                raise VlscaleError(f"{path}: pdsh needs paths without spaces and signs; move it, or use --launcher ssh")


def hostfile_text(run: Run) -> str:
    """Return a hostfile with the hosts of a run, for DeepSpeed; which of their slots, :func:`pdsh_command` says."""
    return "".join(f"{host.name} slots={host.slots[-1] + 1}\n" for host in run.hosts)


def pdsh_command(run: Run, place: Place, hostfile: Path) -> list[str]:
    """Return DeepSpeed's launcher, which starts pdsh; what it exports is in the file that ``DS_ENV_FILE`` names.

    Args:
        run: what is started.
        place: where.
        hostfile: holds :func:`hostfile_text`.
    """
    chosen = "@".join(f"{host.name}:{','.join(map(str, host.slots))}" for host in run.hosts)
    port = ["--ssh_port", str(place.ssh_port)] if place.ssh_port is not None else []
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--include", chosen,
        "--launcher", "pdsh", "--force_multi", "--no_ssh_check", *port,
        "--master_addr", run.master, "--master_port", str(run.port),
        run.script, *map(_through_pdsh, run.arguments),
    ]  # fmt: skip


def ssh_command(run: Run, place: Place, rank: int, run_id: dict[str, str]) -> list[str]:
    """Return the command that starts DeepSpeed's launcher of one host, ``rank`` in the order of hosts, over ssh."""
    world = json.dumps({host.name: list(host.slots) for host in run.hosts})
    words = [
        place.python, "-u", "-m", "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}", f"--node_rank={rank}",
        f"--master_addr={run.master}", f"--master_port={run.port}", run.script, *run.arguments,
    ]  # fmt: skip
    return place.ssh(run.hosts[rank].name, words, run_id)


def _through_pdsh(word: str) -> str:
    """Quote a word for DeepSpeed, which puts double quotes around words with a space, for pdsh and for the shell."""
    word = word.replace("%", "%%")
    if " " not in word:
        return shlex.quote(word)
    return re.sub(r"([\\$`])", r"\\\1", word)
