"""Signals to the launcher, from the first check to the end of the last process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
STOP = signal.SIGUSR2  # vlscale.train.resilience.STOP, without importing PyTorch


class Asked:
    """What signals have asked for.

    Attributes:
        stop: SIGUSR2 has come: save and stop.
        end: SIGINT, SIGTERM or SIGHUP has come.
        status: what it means as an exit status, 128 + its number.
    """

    def __init__(self) -> None:
        self.stop, self.end = asyncio.Event(), asyncio.Event()
        self.status: int | None = None

    async def unless(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do some work; when a signal comes, or has come, give it up and return None."""
        task = asyncio.ensure_future(work)
        signalled = [asyncio.create_task(event.wait()) for event in (self.stop, self.end)]
        try:
            await asyncio.wait([task, *signalled], return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for one in (task, *signalled):
                one.cancel()
            await asyncio.gather(task, *signalled, return_exceptions=True)

    def _end(self, number: int) -> None:
        self.status = 128 + number
        self.end.set()


@contextlib.contextmanager
def asked() -> Iterator[Asked]:
    """Note signals instead of dying of them.

    SIGHUP is left ignored where it is, as under nohup. SIGTSTP is ignored: a launcher that is stopped by Ctrl-Z would
    not renew its leases.
    """
    found, loop = Asked(), asyncio.get_running_loop()
    ending = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ending.append(signal.SIGHUP)
    loop.add_signal_handler(STOP, found.stop.set)
    for number in ending:
        loop.add_signal_handler(number, found._end, number)
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        yield found
    finally:
        signal.signal(signal.SIGTSTP, before)
        for number in (STOP, *ending):
            loop.remove_signal_handler(number)
