"""Being asked to stop: finish the step, save, and say by the exit status that there is more to do.

Schedulers announce preemption and the end of a job's time by a signal. It is *blocked* from the first line of the entry
script on, and asked for between steps. So there is no handler that data workers or compilers could inherit (what they
inherit is a blocked signal, which does nothing), no system call is interrupted, and a signal that comes while the
program still starts is not lost.

SIGUSR1 is left alone: NCCL and PyTorch's tools use it.
"""

from __future__ import annotations

import signal

STOP = signal.SIGUSR2
"""Asks all processes of a run to save and stop; one process that gets it is enough."""

PREEMPTED = 75
"""Exit status after that: stopped before the end, everything saved, start me again (``EX_TEMPFAIL`` of sysexits.h)."""


def hold_stop() -> None:
    """Keep :data:`STOP` for later. Call it before any thread or process is started: they inherit what is blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})


def stop_asked() -> bool:
    """Whether :data:`STOP` has come since the last call; needs :func:`hold_stop` first."""
    return signal.sigtimedwait({STOP}, 0) is not None
