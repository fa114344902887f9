"""The loader: reads, packs and prepares one rank's micro-batches in worker processes, whole steps at a time.

The main process walks the plan, deals each step and hands row numbers to the workers, ``prefetch`` micro-batches ahead
per worker; they come back in order. Nothing that is drawn depends on which worker, rank or accumulation it happens in.

Workers come from a fork server, not from a fork of the training process. By the time that data is read, that process
has threads of its own (gloo or NCCL, CUDA, TensorBoard, the progress bar); a fork copies their locks in whatever state
they are, and now and then a worker hangs. The fork server is a fresh process without threads that has imported the
data code once: its start costs about what importing torch costs, each worker after that some tens of milliseconds.
Each worker also imports the main script under another name, so an entry script must import what is heavy inside its
``main()`` and be guarded by ``if __name__ == "__main__"``.

Batches travel in shared memory whose name is removed as soon as it is opened (the ``file_descriptor`` strategy), and
workers end themselves when the training process is gone: nothing is left behind, however a process ends.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from vlscale.data.collate import collate
from vlscale.data.deal import MicroBatch, deal_hand, fitting_accumulation
from vlscale.data.packing import PackedBatch
from vlscale.data.plan import Position, Step
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset

Window = tuple[Step, Position, list[RaggedBatch]]


class Preparer(Protocol):
    """What the loader calls of an objective."""

    needs_class_probs: bool

    def prepare(self, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
        """Mask ``batch`` and set its targets; every draw is keyed by the batch's (pass, example)."""
        ...


class StepSource(Protocol):
    """What the loader reads of a :class:`~vlscale.data.plan.Plan` or :class:`~vlscale.data.plan.FixedSteps`."""

    pairs: list[tuple[str, str]]

    def steps(self, position: Position) -> Iterator[tuple[Step, Position]]:
        """Yield (step, position after it)."""
        ...


class Loader:
    """Iterates windows ``(Step, position after it, the rank's micro-batches)``.

    Use it as a context manager or call :meth:`close`; dropping the last reference closes it too.

    Args:
        datasets: name -> opened dataset, at least those of ``plan``.
        objectives: task -> preparer, at least those of ``plan``.
        plan: the source of steps.
        position: where to begin.
        rank: this process; world_size: their number.
        gas: micro-steps per step (see :func:`~vlscale.data.deal.accumulation`); None: the least that fits each step,
            the same on all ranks (evaluation).
        ceiling: most tokens of a micro-batch.
        workers: reader processes; 0 reads in this process.
        prefetch: micro-batches that each worker holds ready.
        seed: key of the draws that preparers make; :func:`~vlscale.data.plan.evaluation_seed` for evaluation.
        max_regions: the first n regions of an image are used.
        pin: deliver batches in page-locked memory; no effect without CUDA.

    Attributes:
        last_wait_s: seconds that the last ``next()`` waited for data.

    Raises:
        VlscaleError: a dataset, an objective or class probabilities that the plan needs are missing; while iterating,
            what a store or preparer says of a bad row, with the same text whether read here or in a worker.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        objectives: Mapping[str, Preparer],
        plan: StepSource,
        position: Position,
        rank: int,
        world_size: int,
        gas: int | None,
        ceiling: int,
        workers: int = 0,
        prefetch: int = 4,
        seed: int = 0,
        max_regions: int = 100,
        pin: bool = False,
    ) -> None:
        self.last_wait_s = 0.0
        self._iterator: Iterator[Any] | None = None
        _check(plan, datasets, objectives)
        used = {name: datasets[name] for name in dict(plan.pairs)}
        reader = _Reader(used, {task: objectives[task] for _, task in plan.pairs}, seed, max_regions, workers > 0)
        self._feed = _Feed(plan, position, rank, world_size, gas, ceiling)
        options: dict[str, Any] = {}
        if workers:
            options = {
                "prefetch_factor": prefetch,
                "worker_init_fn": _start_worker,
                "multiprocessing_context": _context(reader),
            }
        loader: DataLoader[Any] = DataLoader(
            reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._feed,
            num_workers=workers,
            collate_fn=_identity,
            pin_memory=pin and torch.cuda.is_available(),
            generator=torch.Generator(),  # PyTorch's loader would otherwise draw from the global one
            **options,
        )
        self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        """Return the next window.

        Raises:
            StopIteration: the steps are at their end, or the loader is closed.
        """
        begin = time.perf_counter()
        try:
            first = self._next_batch()
            step, after, count = self._feed.pending.popleft()
            batches = [first, *[self._next_batch() for _ in range(count - 1)]]
        except BaseException:
            self.close()
            raise
        self.last_wait_s = time.perf_counter() - begin
        return step, after, batches

    def _next_batch(self) -> RaggedBatch:
        if self._iterator is None:
            raise StopIteration
        try:
            item = next(self._iterator)
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
                raise VlscaleError(
                    f"a reader process has died ({str(error).splitlines()[0]}): it was killed or ran out of memory; "
                    f"lower data.workers, data.prefetch or batch.micro_batch_tokens, or look into the system's log"
                ) from None
            raise
        if isinstance(item, _Failure):
            raise VlscaleError(item.message)
        return item.unpack() if isinstance(item, PackedBatch) else item

    def close(self) -> None:
        """End the workers and forget what they held ready. May be called again."""
        iterator, self._iterator = self._iterator, None
        shutdown = getattr(iterator, "_shutdown_workers", None)  # also run when the iterator is deleted
        if shutdown is not None:
            shutdown()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Failure:
    """A user's mistake that a worker found. An exception would arrive wrapped in the worker's traceback."""

    message: str


class _Feed:
    """Deals steps into this rank's micro-batches, and remembers which step they belong to."""

    def __init__(
        self, plan: StepSource, position: Position, rank: int, world_size: int, gas: int | None, ceiling: int
    ) -> None:
        self._plan, self._position = plan, position
        self._rank, self._world_size, self._gas, self._ceiling = rank, world_size, gas, ceiling
        self.pending: deque[tuple[Step, Position, int]] = deque()

    def __iter__(self) -> Iterator[MicroBatch]:
        for step, after in self._plan.steps(self._position):
            gas = self._gas or fitting_accumulation(step, self._world_size, self._ceiling)
            self.pending.append((step, after, gas))
            yield from deal_hand(step, self._rank, self._world_size, gas, self._ceiling)


class _Reader:
    """Runs in the workers: row numbers in, prepared batch out."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        objectives: Mapping[str, Preparer],
        seed: int,
        max_regions: int,
        pack: bool,
    ) -> None:
        self._datasets, self._objectives = datasets, objectives
        self._max_regions, self._pack = max_regions, pack
        self._draws = {name: Draws(seed, name) for name in datasets}

    def modules(self) -> set[str]:
        """Names of the modules that a worker needs."""
        things = [self, *self._datasets.values(), *self._objectives.values()]
        return {type(thing).__module__ for thing in things} - {"__main__"}

    def __getitem__(self, micro: MicroBatch) -> RaggedBatch | PackedBatch | _Failure:
        try:
            batch = self._prepared(micro)
        except VlscaleError as error:
            return _Failure(str(error))
        return PackedBatch.pack(batch) if self._pack else batch

    def _prepared(self, micro: MicroBatch) -> RaggedBatch:
        dataset, objective = self._datasets[micro.dataset], self._objectives[micro.task]
        vocabulary = dataset.vocabulary
        batch = collate(dataset, micro, self._max_regions, vocabulary.cls, vocabulary.sep)
        batch = objective.prepare(batch, self._draws[micro.dataset])
        if objective.needs_class_probs:
            assert dataset.classes is not None
            rows = batch.region_rows[batch.targets["region_positions"]]
            batch.targets["class_probs"] = torch.from_numpy(dataset.classes.probs(rows.numpy()))
        return batch


def _check(plan: StepSource, datasets: Mapping[str, Dataset], objectives: Mapping[str, Preparer]) -> None:
    for name, task in plan.pairs:
        if name not in datasets:
            raise VlscaleError(f"the plan needs dataset {name}, which is not open (open: {', '.join(datasets)})")
        if task not in objectives:
            raise VlscaleError(f"dataset {name}: task {task} of its mix has no objective; drop it from the mix")
        if objectives[task].needs_class_probs and datasets[name].classes is None:
            raise VlscaleError(
                f"dataset {name}: task {task} needs class probabilities, but there is no classes/ store; build the "
                f"dataset with classes, or drop {task} from its mix"
            )


def _context(reader: _Reader) -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Heeded when the server starts, at the first loader of the process.
    context.set_forkserver_preload(sorted(reader.modules()))
    return context


def _start_worker(worker: int) -> None:
    """First thing in a worker: Ctrl-C is the main process's business, and so are the cores."""
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


def _identity(item: Any) -> Any:
    return item
