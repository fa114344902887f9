"""A host as the launcher sees it: one ssh session with an agent at its far end, and what ssh's complaints mean."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.cluster.agent import MARK, MAX_LINE

CONNECT_S = 10
ALIVE_S = 6
SSH_OPTIONS = (
    "-oBatchMode=yes", f"-oConnectTimeout={CONNECT_S}", f"-oServerAliveInterval={ALIVE_S}", "-oServerAliveCountMax=3",
    # The user's shared connections and forwarded ports are for logging in: the first would outlive the run.
    "-oControlPath=none", "-oClearAllForwardings=yes", "-oLogLevel=ERROR",
)  # fmt: skip
"""For every connection; a host that is silent is lost after 18 to 24 s, before its agent's lease runs out."""

_NO_FOLDER, _NO_PYTHON = 90, 91
_NOISE_LINES = 1000
_TAIL = 4096


class HostError(Exception):
    """What is wrong with a host, to be told after its name."""


class CrowdedError(HostError):
    """Too many connections at once; a little later it may work."""


@dataclass(frozen=True)
class Place:
    """What all hosts have in common.

    Attributes:
        project: folder that everything is started in.
        exports: name -> value of the environment; see :func:`vlscale.cluster.exports.exported`.
        ssh_port: None is ssh's own.
        python: the Python that runs everything.
    """

    project: Path
    exports: Mapping[str, str]
    ssh_port: int | None = None
    python: str = sys.executable

    def ssh(self, host: str, words: list[str], more: Mapping[str, str] | None = None) -> list[str]:
        """Return the command that runs ``words`` on a host, in the project's folder and environment."""
        variables = [f"{name}={value}" for name, value in {**self.exports, **(more or {})}.items()]
        script = _plain(
            f"cd {shlex.quote(str(self.project))} 2>/dev/null || exit {_NO_FOLDER}; "
            f"test -x {shlex.quote(self.python)} || exit {_NO_PYTHON}; "
            f"exec env {shlex.join([*variables, *words])}"
        )
        port = ["-p", str(self.ssh_port)] if self.ssh_port is not None else []
        # The login shell need not be a POSIX shell.
        return ["ssh", "-T", "-x", *SSH_OPTIONS, *port, "--", host,
                f"exec sh -c {shlex.quote(script)}"]  # fmt: skip


def _plain(script: str) -> str:
    """Write a script so that every login shell passes it on as it is: csh reads ``!`` in quotes, fish reads ``\\``."""
    if not re.search(r"[!\\]", script):
        return script
    return f'eval "$(echo {base64.b64encode(script.encode()).decode()} | base64 -d)"'


class Session:
    """One ssh session with the agent of a host. Made by :meth:`open`; :meth:`close` it whatever happens."""

    def __init__(self, host: str, place: Place, process: asyncio.subprocess.Process) -> None:
        self.host, self._place, self._process = host, place, process
        self._complaints = b""
        self._drain = asyncio.create_task(self._keep_complaints())

    @classmethod
    async def open(cls, host: str, place: Place) -> Session:
        """Start the agent; whether that works is seen when it is asked.

        Raises:
            HostError: there is no ssh here.
        """
        command = place.ssh(host, [place.python, "-u", "-m", "vlscale.cluster.agent"])
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, limit=MAX_LINE, start_new_session=True
            )
        except OSError as error:
            cure = "; install openssh-client" if error.errno == errno.ENOENT else ""
            raise HostError(f"ssh cannot be started ({error.strerror}){cure}") from None
        return cls(host, place, process)

    async def ask(self, timeout_s: float, do: str, **more: Any) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            HostError: ssh failed, the agent did not answer in time, or what it said is no answer.
        """
        await self.tell(json.dumps({"do": do, **more}))
        return await self.answer(timeout_s)

    async def answer(self, timeout_s: float) -> dict[str, Any]:
        """Return the next answer; raises as :meth:`ask` does."""
        try:
            return await asyncio.wait_for(self._answer(), timeout_s)
        except asyncio.TimeoutError:
            raise HostError(
                f"no answer within {timeout_s:.0f} s; is it up, and does `ssh {self.host} true` come back?"
            ) from None

    async def tell(self, line: str) -> None:
        """Send a line; one that cannot be sent is lost."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            self._process.stdin.write(f"{line}\n".encode())
            await asyncio.wait_for(self._process.stdin.drain(), 5)

    async def ended(self) -> int:
        """Wait until the session has ended; returns ssh's status."""
        return await self._process.wait()

    async def close(self) -> None:
        """End ssh, and with it the agent."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._discard(), 5)
        self._drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._drain

    async def _discard(self) -> None:
        """Read what is still in the pipe: before that, asyncio does not take a process for ended."""
        assert self._process.stdout is not None
        while await self._process.stdout.read(1 << 16):
            pass
        await self._process.wait()

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            for _ in range(_NOISE_LINES):
                line = (await self._process.stdout.readline()).decode("utf-8", errors="replace")
                if not line:
                    await self._process.wait()
                    await asyncio.wait({self._drain}, timeout=2)
                    raise self._explain()
                _, mark, text = line.partition(MARK)  # a login shell may have printed something before, without an end
                if mark:
                    found = json.loads(text)
                    if isinstance(found, dict):
                        return found
                    break
        except (ValueError, RecursionError):  # a line without end, or no JSON
            pass
        raise HostError("its agent's answer cannot be read; does its login shell print something on stdout?")

    async def _keep_complaints(self) -> None:
        assert self._process.stderr is not None
        while more := await self._process.stderr.read(_TAIL):
            self._complaints = (self._complaints + more)[-_TAIL:]

    def _explain(self) -> HostError:
        status, python = self._process.returncode, self._place.python
        if status == _NO_FOLDER:
            return HostError(f"has no folder {self._place.project}; every host needs the project at the same path")
        if status == _NO_PYTHON:
            return HostError(f"has no Python at {python}; every host needs the environment at the same path")
        complaints = self._complaints.decode("utf-8", errors="replace")
        kind = CrowdedError if _meaning(complaints) is _CROWDED else HostError
        return kind(explain_ssh(complaints, self.host, status))


_CROWDED = (
    r"kex_exchange_identification|Connection (closed|reset) by",
    "ssh is refused before it begins; if too many connections come at once, raise MaxStartups in sshd_config there and "
    "on the jump host",
)
_MEANINGS = (
    (r"REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed; make sure that it is the right host, then "
     "`ssh-keygen -R {host}` and `ssh {host}` once"),
    (r"Host key verification failed", "its host key is not known; `ssh {host}` once by hand, or use ssh-keyscan"),
    (r"Permission denied", "ssh refuses without a password; give it your key with `ssh-copy-id {host}`"),
    (r"Could not resolve hostname", "its name cannot be resolved; mend the hostfile, /etc/hosts or the name server"),
    (r"Connection refused", "nobody answers on ssh's port; start sshd there, or give --ssh_port"),
    (r"timed out|No route to host|Network is unreachable", "unreachable; is it up, and on this network?"),
    (r"No module named '?vlscale", "its Python has no vlscale; install it there, or share the project's folder"),
    _CROWDED,
)  # fmt: skip


def _meaning(complaints: str) -> tuple[str, str] | None:
    return next((known for known in _MEANINGS if re.search(known[0], complaints)), None)


def explain_ssh(complaints: str, host: str, status: int | None) -> str:
    """Return what ssh's stderr means, with the cure; what is not known is told as it is, in one line."""
    known = _meaning(complaints)
    if known:
        return known[1].format(host=host)
    last = next((line for line in reversed(complaints.splitlines()) if line.strip()), "it said nothing")
    said = "".join(letter if letter.isprintable() else " " for letter in last).strip()[:200]
    return f"ssh or the agent ended with status {status}: {said}; try `ssh {host} true`"
