"""The processes of a run: who is who, what they add up, and how they fail together.

Control messages (counts, checks, errors) are small and are read by Python. They travel over gloo, also beside NCCL, so
that reading them never waits for a GPU.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from vlscale.errors import VlscaleError, one_line_errors, report_error

_HEAD_START_S = 3.0


@dataclass(frozen=True)
class Gathered:
    """Rows of all processes: ``rows`` [sum of counts, ..], and the ``counts`` of each rank."""

    rows: Tensor
    counts: list[int]


@dataclass
class Processes:
    """The processes of this run, seen from one of them.

    Attributes:
        rank: this process; world_size: their number.
        device: where this process computes.
        group: gloo group for control messages; None is the default group.
        program: name that errors are printed under.
        hosts: host of each rank.
    """

    rank: int
    world_size: int
    device: torch.device
    group: Any = None
    program: str = "vlscale"
    hosts: list[str] = field(default_factory=list)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sums of ``values`` over all processes, in float64."""
        packed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(packed, group=self.group)
        return packed.tolist()

    def gather(self, item: Any) -> list[Any]:
        """Return every process's ``item``, in the order of ranks (plain Python objects of this program only)."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, item, group=self.group)
        return found

    def gather_rows(self, rows: Tensor) -> Gathered:
        """Return the rows [n, ..] of all processes, one process after the other; n may differ, nothing else.

        Rows on a CPU travel as control messages do, others over the processes' own links.
        """
        mine = torch.tensor([rows.shape[0]])
        sizes = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(sizes, mine, group=self.group)
        counts = [int(size) for size in sizes]
        if not any(counts):
            return Gathered(rows, counts)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group=self.group if rows.device.type == "cpu" else None)
        return Gathered(torch.cat([part[:count] for part, count in zip(found, counts, strict=True)]), counts)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.total([0.0])

    def fail_together(self, message: str | None) -> None:
        """Raise the first process's message in all processes, if any has one; only the main one prints it.

        Raises:
            VlscaleError: some process has a message.
        """
        found = self.gather(message)
        failed = [(rank, text) for rank, text in enumerate(found) if text is not None]
        if not failed:
            return
        rank, text = failed[0]
        host = f" on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else ""
        where = "" if len(failed) == self.world_size else f"[rank {rank}{host}] "
        error = VlscaleError(f"{where}{text}")
        if self.main:
            report_error(self.program, error)
        error.reported = True
        raise error

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Run a block in all processes: if it fails in one with a :class:`VlscaleError`, it fails in all.

        The block must not itself communicate, except in a way that fails in all processes alike.
        """
        try:
            yield
        except VlscaleError as error:
            if error.reported:
                raise
            self.fail_together(str(error))
        else:
            self.fail_together(None)


@contextmanager
def launched(program: str) -> Iterator[None]:
    """Run an entry script: a user's mistake becomes one line and status 2, and the process group is left at the end.

    Before the processes know of each other they all fail alike. The first of each machine speaks, and by exiting makes
    the launcher end the others, which wait for that; one that is still there after a while failed alone, and speaks.

    A process group that is there already is the caller's, and stays.
    """
    connected = dist.is_initialized()
    with one_line_errors(program):
        try:
            yield
        except VlscaleError as error:
            if not error.reported and not dist.is_initialized() and os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(_HEAD_START_S)
            raise
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            if dist.is_initialized() and not connected:
                dist.destroy_process_group()


def run_and_exit(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and end the process without taking Python down piece by piece.

    Threads of the process group may still be letting go of tensors, for which they need an interpreter; one that is
    being finalised makes them abort the process, now and then, after all work is done.
    """
    status: Any = 0
    try:
        main()
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
