"""Reader processes: how they start, and how they end.

Workers come from a fork server, not from a fork of the training process. By the time that data is read, that process
has threads of its own (gloo or NCCL, CUDA, TensorBoard, the progress bar); a fork copies their locks in whatever state
they are, and now and then a worker hangs. The fork server is a fresh process without threads that has imported the
data code once: its start costs about what importing torch costs, each worker after that some tens of milliseconds.
Each worker also imports the main script under another name, so an entry script must import what is heavy inside its
``main()`` and be guarded by ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable

import torch


def context(modules: Iterable[str]) -> multiprocessing.context.BaseContext:
    """Return how to start workers that need ``modules``."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    # Heeded when the server starts, at the first loader of the process.
    found.set_forkserver_preload(sorted(modules))
    return found


def start(worker: int) -> None:
    """First thing in worker number ``worker``: Ctrl-C is the main process's business, and so are the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the training process is gone, killed ones included.

    PyTorch's own watch looks at the parent's id, which is the fork server's here; and the fork server lives as long as
    any of its workers.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
