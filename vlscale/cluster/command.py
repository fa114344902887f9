"""``vlscale launch``: check every host of a hostfile, then run a script on all of them, and leave nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import resource
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vlscale.cluster.exports import deepspeed_environment, exported, ssh_environment
from vlscale.cluster.hostfile import read_hostfile, select
from vlscale.cluster.inputs import Needs, needs_of
from vlscale.cluster.launchers import LAUNCHERS, Run, check_launcher, hostfile_text, pdsh_command, ssh_command
from vlscale.cluster.output import Output
from vlscale.cluster.preflight import check
from vlscale.cluster.remote import SSH_OPTIONS, Place, Session
from vlscale.cluster.run_processes import LAUNCHER_VARIABLE, VARIABLE
from vlscale.cluster.signals import asked
from vlscale.cluster.supervise import PREEMPTED, Command, Streams, supervise
from vlscale.errors import VlscaleError

MASTER_PORT = 29500
HOSTFILE, EXPORTS = "hostfile", "exports"
OPEN_FILES = 16_384
_ADDRESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,252}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--hostfile", type=Path, metavar="FILE", required=True, help="`host slots=N` per line")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="ssh",
        help="ssh: DeepSpeed's launcher of each host over ssh; pdsh: DeepSpeed's own for all hosts (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--include", default="", metavar="SPEC", help="hosts and slots to use: NAME[:SLOT,SLOT][@...]")
    parser.add_argument("--exclude", default="", metavar="SPEC", help="hosts and slots to leave out, written likewise")
    parser.add_argument(
        "--export", action="append", default=[], metavar="NAME", help="environment variable that travels, too"
    )
    parser.add_argument("--master_addr", default="", metavar="ADDRESS", help="of the first host; default: found out")
    parser.add_argument("--master_port", type=int, default=MASTER_PORT, metavar="PORT", help="(%(default)s)")
    parser.add_argument("--ssh_port", type=int, metavar="PORT", help="default: ssh's own")
    parser.add_argument("--dry-run", action="store_true", help="check the hosts, print the commands, start nothing")
    parser.add_argument("script", metavar="SCRIPT", help="e.g. launch/pretrain.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the run's exit status.

    Raises:
        VlscaleError: an argument or the hostfile is wrong. What is wrong with hosts is told in a line each.
    """
    for option, port in (("--master_port", args.master_port), ("--ssh_port", args.ssh_port)):
        if port is not None and not 1 <= port <= 65535:
            raise VlscaleError(f"{option} {port}: expected 1 to 65535")
    if args.master_addr and not _ADDRESS.fullmatch(args.master_addr):
        raise VlscaleError(f"--master_addr {ascii(args.master_addr)[:100]}: expected a name or an address")
    hosts = select(read_hostfile(args.hostfile), args.include, args.exclude)
    project = Path.cwd()
    place = Place(project, exported(os.environ, tuple(args.export), project), args.ssh_port)
    check_launcher(args.launcher, place, [args.script, *args.arguments])
    if len({len(host.slots) for host in hosts}) == 1:  # for messages about ranks that never came
        place = replace(place, exports={**place.exports, "VLSCALE_HOSTS": ",".join(host.name for host in hosts)})
    job = Run(hosts, args.master_addr, args.master_port, args.script, tuple(args.arguments))
    needs = replace(needs_of(Path(args.script), args.arguments), posix_shell=args.launcher == "pdsh")
    _raise_open_files()
    return asyncio.run(_run(job, place, needs, args.launcher, args.dry_run))


async def _run(job: Run, place: Place, needs: Needs, launcher: str, dry_run: bool) -> int:
    sessions: dict[str, Session] = {}
    streams = Streams(Output(sys.stdout.fileno()), Output(sys.stderr.fileno()))
    with asked() as signalled:
        try:
            checked = await signalled.unless(check(job.hosts, place, needs, job.master, job.port, sessions))
            if checked is None:
                streams.errors.say("stopped by a signal; nothing was started")
                return PREEMPTED if signalled.status is None else signalled.status
            for problem in checked.problems:
                streams.errors.say(f"error: {problem}")
            if checked.problems:
                streams.errors.say(f"nothing was started ({len(checked.problems)} problems)")
                return 2
            job = replace(job, master=checked.master)
            streams.errors.say(
                f"{len(job.hosts)} hosts checked, {job.processes} processes, master {job.master}:{job.port}"
            )
            run_id = secrets.token_hex(8)
            with _private_folder(job, place, run_id) as folder:
                commands = _commands(job, place, launcher, run_id, folder)
                if dry_run:
                    for command in commands:
                        await streams.output.write(f"{shlex.join(command.words)}\n".encode())
                    return 0
                return await supervise(sessions, commands, run_id, streams, signalled)
        finally:
            await asyncio.gather(*(session.close() for session in sessions.values()))
            await streams.errors.drain()


def _commands(job: Run, place: Place, launcher: str, run_id: str, folder: Path) -> list[Command]:
    if launcher == "pdsh":
        environment = {**deepspeed_environment(os.environ, place.exports), LAUNCHER_VARIABLE: run_id}
        options = f"{environment.get('PDSH_SSH_ARGS_APPEND', '')} {' '.join(SSH_OPTIONS)}".strip()
        environment |= {"PDSH_SSH_ARGS_APPEND": options, "DS_ENV_FILE": str(folder / EXPORTS)}
        return [Command("", pdsh_command(job, place, folder / HOSTFILE), environment)]
    environment = {**ssh_environment(os.environ), LAUNCHER_VARIABLE: run_id}
    return [
        Command(host.name, ssh_command(job, place, rank, {VARIABLE: run_id}), environment)
        for rank, host in enumerate(job.hosts)
    ]


@contextmanager
def _private_folder(job: Run, place: Place, run_id: str) -> Iterator[Path]:
    """What DeepSpeed's launcher reads: which hosts, and what to export; only this user can read it."""
    with tempfile.TemporaryDirectory(prefix="vlscale-launch-") as name:
        folder = Path(name)
        (folder / HOSTFILE).write_text(hostfile_text(job), encoding="utf-8")
        lines = [f"{name}={value}\n" for name, value in {**place.exports, VARIABLE: run_id}.items()]
        descriptor = os.open(folder / EXPORTS, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)
        yield folder


def _raise_open_files() -> None:
    """Every host takes six descriptors, more than the usual 1,024 allow for a few hundred hosts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
