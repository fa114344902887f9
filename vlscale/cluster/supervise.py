"""Watches a run on all hosts, and leaves none of its processes behind, however it ends.

DeepSpeed's launcher alone leaves processes on the other hosts when ssh breaks, when a host goes, and when the launcher
itself is killed: ssh does not pass that on. Here an agent on every host holds a lease that the launcher renews.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vlscale.cluster import run_processes
from vlscale.cluster.launchers import ENDED
from vlscale.cluster.output import Output
from vlscale.cluster.remote import HostError, Session
from vlscale.cluster.signals import Asked

LEASE_S = 30.0
BEAT_S = 5.0
GRACE_S = 15.0
"""How long the other hosts may take to end by themselves after one has failed: they tell why, too."""

PREEMPTED = 75  # vlscale.train.resilience.PREEMPTED, without importing PyTorch
SAVING_S = 600.0
"""The same after one host has saved and stopped."""

END_S = 30.0
"""How long an agent may take to end what is left: SIGTERM, SIGKILL, and a look at what still comes."""

_REAP_S = 5.0
_STAGGER_S = 0.05
"""Between two ssh connections, so that a jump host does not refuse them."""

_MISTAKE = 2
_LINE = 1 << 20


@dataclass(frozen=True)
class Command:
    """A local process that runs one host's part, or that of all (``host`` is empty)."""

    host: str
    words: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Streams:
    """Where the launcher prints: what the run says, and on ``errors`` its own lines, too."""

    output: Output
    errors: Output


@dataclass
class _State:
    """What has become of the run so far."""

    commands: int
    say: Callable[[str], None]
    statuses: list[int] = field(default_factory=list)
    finished: int = 0
    lost: bool = False
    unheard: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int | None = None

    def note(self, status: int, host: str = "") -> None:
        """Note a status; the first host that fails is told."""
        quiet = any(self.statuses) or self.lost or self.asked is not None or not host
        if status and status != PREEMPTED and not quiet:
            what = "ssh to it broke off" if status == 255 else f"its processes ended with status {status}"
            self.say(f"{host}: {what}; the other hosts are ended, too")
        self.statuses.append(status)
        if status:
            self.wake.set()

    def deaf(self, error: OSError) -> None:
        """Note that nobody reads what the run prints: as other programs do, it ends."""
        if not self.unheard:
            self.unheard = True
            self.say(f"what the run prints cannot be passed on ({error.strerror}); the run is ended")
            self.note(1)

    def patience_s(self) -> float:
        if self.lost or self.unheard or self.asked is not None:
            return 0.0
        return SAVING_S if all(status in (0, PREEMPTED) for status in self.statuses) else GRACE_S

    def status(self) -> int:
        """The run's status: a user's mistake wins, then the first failure; 0 only if every command ended with it."""
        if self.asked is not None:
            return self.asked
        if _MISTAKE in self.statuses:
            return _MISTAKE
        failed = [status for status in self.statuses if status]
        return failed[0] if failed else int(self.lost or self.finished < self.commands)


async def supervise(
    sessions: Mapping[str, Session], commands: Sequence[Command], run_id: str, streams: Streams, asked: Asked
) -> int:
    """Run the commands to their end, and then, or when a host fails, end what is left on all hosts.

    SIGUSR2 is passed on to all ranks (save and stop); SIGINT, SIGTERM and SIGHUP end the run.

    Args:
        sessions: host -> its open session.
        commands: what starts the run.
        run_id: that the run's processes carry in their environment.
        streams: where to print.
        asked: what signals ask for.

    Returns:
        Exit status: 0, 2 for a user's mistake, 75 if the run has saved and stopped, 129, 130 or 143 after a signal, and
        otherwise that of the host that failed first.
    """
    say = streams.errors.say
    state = _State(len(commands), say)
    if not await _guarded(sessions, run_id, say):
        return 1
    watchers = [asyncio.create_task(_beat(sessions)), asyncio.create_task(_pass_stop_on(sessions, asked, say)),
                asyncio.create_task(_leave(asked, state))]  # fmt: skip
    watchers += [asyncio.create_task(_watch(host, session, state)) for host, session in sessions.items()]
    running: list[asyncio.subprocess.Process] = []
    parts: list[asyncio.Task[None]] = []
    try:
        for command in commands:
            process = await _start(command)
            running.append(process)
            parts.append(asyncio.create_task(_follow(command, process, state, streams)))
            await asyncio.sleep(_STAGGER_S)
            if state.wake.is_set():
                break
        await _ended_or_woken(parts, state)
    finally:
        for watcher in watchers:
            watcher.cancel()
        if not all(process.returncode is not None for process in running):
            run_processes.kill_launchers(run_id)  # first, or they start ranks on hosts that have just been cleared
        await _end(sessions, say)
        await _reap(running, parts, run_id)
    return state.status()


async def _guarded(sessions: Mapping[str, Session], run_id: str, say: Callable[[str], None]) -> bool:
    """Let every agent stand guard; whether all do."""

    async def guard(host: str, session: Session) -> bool:
        try:
            await session.ask(10, "guard", run_id=run_id, lease_s=LEASE_S)
        except HostError as problem:
            say(f"{host}: {problem}")
            return False
        return True

    return all(await asyncio.gather(*(guard(host, session) for host, session in sessions.items())))


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
        stdout=asyncio.subprocess.PIPE,  # never our own: ssh sets O_NONBLOCK on what it is given
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is for us alone
    )


async def _follow(command: Command, process: asyncio.subprocess.Process, state: _State, streams: Streams) -> None:
    """Pass on what a command prints, and note how it, or the hosts it speaks of, end."""

    def hear(line: str) -> None:
        match = ENDED.match(line)
        if match and not command.host:
            state.note(int(match[2]), match[1])

    assert process.stdout is not None
    assert process.stderr is not None
    await asyncio.gather(
        _pass_on(process.stdout, streams.output, state, None), _pass_on(process.stderr, streams.errors, state, hear)
    )
    status = await process.wait()
    state.note(128 - status if status < 0 else status, command.host)
    state.finished += 1


async def _pass_on(
    stream: asyncio.StreamReader, output: Output, state: _State, hear: Callable[[str], None] | None
) -> None:
    rest = b""
    while chunk := await stream.read(1 << 16):
        if hear:
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-_LINE:]
            for line in lines:
                hear(line.decode("utf-8", errors="replace"))
        try:
            await output.write(chunk)
        except OSError as error:
            state.deaf(error)


async def _beat(sessions: Mapping[str, Session]) -> None:
    while True:
        await asyncio.gather(*(session.tell("beat") for session in sessions.values()))
        await asyncio.sleep(BEAT_S)


async def _watch(host: str, session: Session, state: _State) -> None:
    """Notice when a host does not answer any more: ssh itself asks it regularly."""
    await session.ended()
    state.say(f"{host}: lost (its ssh session has ended); the run is ended on all hosts")
    state.lost = True
    state.wake.set()


async def _pass_stop_on(sessions: Mapping[str, Session], asked: Asked, say: Callable[[str], None]) -> None:
    await asked.stop.wait()
    say("SIGUSR2: all ranks are asked to save and stop")
    await asyncio.gather(*(session.tell("stop") for session in sessions.values()))


async def _leave(asked: Asked, state: _State) -> None:
    await asked.end.wait()
    state.asked = asked.status
    state.wake.set()


async def _end(sessions: Mapping[str, Session], say: Callable[[str], None]) -> None:
    """Let every agent end what the run has left on its host."""

    async def end(host: str, session: Session) -> None:
        await session.tell("end")
        try:
            left = (await session.answer(END_S)).get("left")
        except HostError:
            return  # a lost host: its agent does the same by itself when its lease runs out
        if isinstance(left, list) and left:
            pids = ", ".join(str(pid) for pid in left[:20] if isinstance(pid, int))
            say(f"{host}: processes {pids} cannot be ended; end them by hand")

    await asyncio.gather(*(end(host, session) for host, session in sessions.items()))


async def _reap(
    running: Sequence[asyncio.subprocess.Process], parts: Sequence[asyncio.Task[None]], run_id: str
) -> None:
    """Wait for the local processes and their last words; kill those that hang on a connection to a lost host."""
    if not parts:
        return
    waiting = [asyncio.create_task(process.wait()) for process in running]
    await asyncio.wait([*waiting, *parts], timeout=_REAP_S)
    run_processes.kill_launchers(run_id)
    await asyncio.wait([*waiting, *parts], timeout=_REAP_S)
    for task in (*waiting, *parts):
        task.cancel()
