"""Our own stdout and stderr: a reader that pauses may stop what is printed, but not the launcher."""

from __future__ import annotations

import asyncio
import os
import select
from contextlib import suppress


class Output:
    """A stream that is written to in a thread, one piece after the other.

    A pipe to a pager, or a terminal after Ctrl-S, takes nothing for minutes; written to directly, it would stop the
    event loop, and with it the renewing of the leases.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._turn = asyncio.Lock()
        self._said: set[asyncio.Task[None]] = set()

    async def write(self, data: bytes) -> None:
        """Write, and wait until that has been done.

        Raises:
            OSError: nobody reads any more.
        """
        async with self._turn:
            await asyncio.to_thread(_write, self._descriptor, data)

    def say(self, line: str) -> None:
        """Print a line of the launcher's own, without waiting."""
        task = asyncio.create_task(self._say(line))
        self._said.add(task)
        task.add_done_callback(self._said.discard)

    async def drain(self) -> None:
        """Wait until all lines have been printed."""
        await asyncio.gather(*self._said)

    async def _say(self, line: str) -> None:
        with suppress(OSError):
            await self.write(f"vlscale launch: {line}\n".encode(errors="replace"))


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # another process of the same terminal or pipe has set O_NONBLOCK
            select.select([], [descriptor], [], 1.0)
