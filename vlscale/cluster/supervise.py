"""Watches a run on all hosts, and leaves none of its processes behind, however it ends.

DeepSpeed's launcher alone leaves processes on the other hosts when ssh breaks, when a host goes, and when the launcher
itself is killed: ssh does not pass that on. Here an agent on every host holds a lease that the launcher renews.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from vlscale.cluster import run_processes
from vlscale.cluster.launchers import ENDED
from vlscale.cluster.remote import HostError, Session

LEASE_S = 30.0
BEAT_S = 5.0
GRACE_S = 15.0
"""How long the other hosts may take to end by themselves after one has failed: they tell why, too."""

PREEMPTED = 75  # vlscale.train.resilience.PREEMPTED, without importing PyTorch
SAVING_S = 600.0
"""The same after one host has saved and stopped."""

END_S = 25.0
_MISTAKE = 2
_LINE = 1 << 20


@dataclass(frozen=True)
class Command:
    """A local process that runs one host's part, or that of all (``host`` is empty)."""

    host: str
    words: Sequence[str]
    environment: Mapping[str, str]


@dataclass
class _State:
    """What has become of the run so far."""

    statuses: list[int] = field(default_factory=list)
    lost: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int | None = None

    def note(self, status: int) -> None:
        self.statuses.append(status)
        if status:
            self.wake.set()

    def patience_s(self) -> float:
        if self.lost or self.asked is not None:
            return 0.0
        return SAVING_S if all(status in (0, PREEMPTED) for status in self.statuses) else GRACE_S

    def status(self) -> int:
        """The run's status: a user's mistake wins, then the first failure."""
        if self.asked is not None:
            return self.asked
        if _MISTAKE in self.statuses:
            return _MISTAKE
        failed = [status for status in self.statuses if status]
        return failed[0] if failed else int(self.lost)


async def supervise(
    sessions: Mapping[str, Session], commands: Sequence[Command], run_id: str, say: Callable[[str], None]
) -> int:
    """Run the commands to their end, and then, or when a host fails, end what is left on all hosts.

    SIGUSR2 is passed on to all ranks (save and stop); SIGINT and SIGTERM end the run.

    Args:
        sessions: host -> its open session.
        commands: what starts the run.
        run_id: that the run's processes carry in their environment.
        say: prints a line.

    Returns:
        Exit status: 0, 2 for a user's mistake, 75 if the run has saved and stopped, 130 or 143 after a signal, and
        otherwise that of the host that failed first.
    """
    state = _State()
    for host, session in sessions.items():
        try:
            await session.ask(10, "guard", run_id=run_id, lease_s=LEASE_S)
        except HostError as problem:
            say(f"{host}: {problem}")
            return 1
    watchers = [asyncio.create_task(_beat(sessions))]
    watchers += [asyncio.create_task(_watch(host, session, state, say)) for host, session in sessions.items()]
    running: list[asyncio.subprocess.Process] = []
    parts: list[asyncio.Task[None]] = []
    with _signals(sessions, state, say):
        try:
            for command in commands:
                process = await _start(command)
                running.append(process)
                parts.append(asyncio.create_task(_follow(command, process, state, say)))
            await _ended_or_woken(parts, state)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await _end(sessions, say)
            await _reap(running, run_id)
    if parts:
        await asyncio.wait(parts, timeout=5)
    return state.status()


async def _ended_or_woken(parts: Sequence[asyncio.Task[None]], state: _State) -> None:
    """Wait until all commands have ended, or until one has failed and the others had their time."""
    whole = asyncio.create_task(asyncio.wait(parts))
    woken = asyncio.create_task(state.wake.wait())
    await asyncio.wait([whole, woken], return_when=asyncio.FIRST_COMPLETED)
    since = time.monotonic()
    while not whole.done() and time.monotonic() - since < state.patience_s():
        await asyncio.wait([whole], timeout=0.5)
    for task in (whole, woken):
        task.cancel()


async def _start(command: Command) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command.words,
        env=dict(command.environment),
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE,
        start_new_session=True,  # a Ctrl-C is for us alone
    )


async def _follow(
    command: Command, process: asyncio.subprocess.Process, state: _State, say: Callable[[str], None]
) -> None:
    """Pass a command's stderr on, and note when hosts end."""
    assert process.stderr is not None
    output: BinaryIO = sys.stderr.buffer
    rest = b""
    while chunk := await process.stderr.read(1 << 16):
        output.write(chunk)
        output.flush()
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[-_LINE:]
        for line in lines:
            match = ENDED.match(line.decode("utf-8", errors="replace"))
            if match and not command.host:
                _tell_end(match[1], int(match[2]), state, say)
                state.note(int(match[2]))
    status = await process.wait()
    status = 128 - status if status < 0 else status
    if command.host and status:
        _tell_end(command.host, status, state, say)
    state.note(status)


def _tell_end(host: str, status: int, state: _State, say: Callable[[str], None]) -> None:
    if any(state.statuses) or state.lost or state.asked is not None:
        return
    what = "ssh to it broke off" if status == 255 else f"its processes ended with status {status}"
    if status != PREEMPTED:
        say(f"{host}: {what}; the other hosts are ended, too")


async def _beat(sessions: Mapping[str, Session]) -> None:
    while True:
        await asyncio.gather(*(session.tell("beat") for session in sessions.values()))
        await asyncio.sleep(BEAT_S)


async def _watch(host: str, session: Session, state: _State, say: Callable[[str], None]) -> None:
    """Notice when a host does not answer any more: ssh itself asks it regularly."""
    await session.ended()
    say(f"{host}: lost (its ssh session has ended); the run is ended on all hosts")
    state.lost = True
    state.wake.set()


@contextlib.contextmanager
def _signals(sessions: Mapping[str, Session], state: _State, say: Callable[[str], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    kept: set[asyncio.Task[None]] = set()

    async def pass_on() -> None:
        say("SIGUSR2: all ranks are asked to save and stop")
        await asyncio.gather(*(session.tell("stop") for session in sessions.values()))

    def stop() -> None:
        task = asyncio.ensure_future(pass_on())
        kept.add(task)
        task.add_done_callback(kept.discard)

    def leave(number: int) -> None:
        state.asked = 128 + number
        state.wake.set()

    loop.add_signal_handler(signal.SIGUSR2, stop)
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, leave, number)
    try:
        yield
    finally:
        for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _end(sessions: Mapping[str, Session], say: Callable[[str], None]) -> None:
    """Let every agent end what the run has left on its host."""

    async def end(host: str, session: Session) -> None:
        await session.tell("end")
        try:
            left = (await session.answer(END_S)).get("left")
        except HostError:
            return  # a lost host: its agent does the same by itself when its lease runs out
        if left:
            say(f"{host}: processes {str(left)[:200]} cannot be ended; end them by hand")

    await asyncio.gather(*(end(host, session) for host, session in sessions.items()))


async def _reap(running: Sequence[asyncio.subprocess.Process], run_id: str) -> None:
    """Wait for the local processes; kill those that hang on a connection to a lost host."""
    if running:
        waiting = [asyncio.create_task(process.wait()) for process in running]
        await asyncio.wait(waiting, timeout=5)
        run_processes.kill_launchers(run_id)
        await asyncio.wait(waiting)
