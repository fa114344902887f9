"""Being asked to stop: finish the step, save, and say by the exit status that there is more to do.

Schedulers announce preemption and the end of a job's time by a signal. It is *blocked* from the entry script's first
moment on, and asked for between steps (not during an evaluation or a checkpoint). So there is no handler that data
workers or compilers could inherit (what they inherit is a blocked signal, which does nothing), no system call is
interrupted, and a signal that comes while the program still starts is not lost.

SIGUSR1 is left alone: NCCL and PyTorch's tools use it.
"""

from __future__ import annotations

import signal

STOP = signal.SIGUSR2
"""Asks all processes of a run to save and stop; one process that gets it is enough."""

PREEMPTED = 75
"""Exit status after that: stopped before the end, everything saved, start me again (``EX_TEMPFAIL`` of sysexits.h)."""


def hold_stop() -> None:
    """Keep :data:`STOP` for later.

    Call it in the main thread, before anything that starts threads or processes, which importing numpy does: they
    inherit what is blocked. Linux keeps a blocked signal even where it is ignored; a thread that does not block it, as
    a library might start one, ignores it instead of ending the process.
    """
    if STOP not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        signal.signal(STOP, signal.SIG_IGN)  # before blocking: it discards what is pending
        signal.pthread_sigmask(signal.SIG_BLOCK, {STOP})


def stop_asked() -> bool:
    """Whether :data:`STOP` has come since the last call; needs :func:`hold_stop` first."""
    return signal.sigtimedwait({STOP}, 0) is not None
