"""The loader: reads, packs and prepares one rank's micro-batches in worker processes, whole steps at a time.

A thread walks the plan and deals each step; the main process hands row numbers to the workers (see ``workers.py``),
``prefetch`` micro-batches ahead per worker; they come back in order. Nothing that is drawn depends on which worker,
rank or accumulation it happens in.

Workers write batches straight into memory that is shared with this process and used again and again (see
``slots.py``), page-locked for CUDA. What does not fit travels in shared memory whose name is removed as soon as it is
opened (the ``file_descriptor`` strategy). Workers end themselves when the training process is gone: nothing is left
behind, however a process ends.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import DataLoader

from vlscale.data import workers as worker_processes
from vlscale.data.class_probs import class_probs, needs_classes
from vlscale.data.collate import collate
from vlscale.data.collate_views import collate_views
from vlscale.data.deal import PACKED, MicroBatch, Rule
from vlscale.data.feed import Feed, StepSource
from vlscale.data.packing import Block, PackedBatch
from vlscale.data.plan import Position, Step
from vlscale.data.random import Draws
from vlscale.data.slots import Slots
from vlscale.data.views import UNIFIED, parted
from vlscale.errors import VlscaleError
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset
    from vlscale.data.prefetch import Prefetcher

Window = tuple[Step, Position, list[RaggedBatch]]
_UNKNOWN_GAS = 4


class Preparer(Protocol):
    """What the loader calls of an objective."""

    needs_class_probs: bool

    def prepare(self, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
        """Mask ``batch`` and set its targets; every draw is keyed by the batch's (pass, example).

        What the batch holds may be overwritten: it has just been read, and nobody else has it.
        """
        ...

    def prepare_views(self, batch: RaggedBatch, draws: Sequence[Draws]) -> RaggedBatch:
        """Do so for a batch of task ``unified``; ``draws`` of each dataset that ``targets["source"]`` numbers."""
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
        prefetcher: fetches shards ahead of the plan; the loader starts it, tells it of progress, and closes it.
        rule: how steps are dealt.

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
        prefetcher: Prefetcher | None = None,
        rule: Rule = PACKED,
    ) -> None:
        self.last_wait_s = 0.0
        self._prefetcher = prefetcher
        self._iterator: Iterator[Any] | None = None
        _check(plan, datasets, objectives)
        used = {name: datasets[name] for names in dict(plan.pairs) for name in parted(names)}
        used_objectives = {task: objectives[task] for _, task in plan.pairs}
        self._pin = pin and torch.cuda.is_available()
        self._last: list[RaggedBatch] = []
        self._copying: deque[tuple[Any, list[RaggedBatch]]] = deque()
        count = max(workers, 1) * prefetch + 2 * (gas or _UNKNOWN_GAS)
        self._slots = Slots(count, slot_bytes(used, used_objectives, ceiling), self._pin)
        reader = _Reader(used, used_objectives, seed, max_regions, self._slots, workers > 0)
        self._feed = Feed(plan, position, rank, world_size, gas, ceiling, self._slots, rule)
        options: dict[str, Any] = {}
        if workers:
            options = {
                "prefetch_factor": prefetch,
                "worker_init_fn": worker_processes.start,
                "multiprocessing_context": worker_processes.context(reader.modules()),
            }
        loader: DataLoader[Any] = DataLoader(
            reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._feed,
            num_workers=workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # PyTorch's loader would otherwise draw from the global one
            **options,
        )
        self._iterator = iter(loader)
        if prefetcher is not None:
            prefetcher.start()
            weakref.finalize(self, prefetcher.close)

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        """Return the next window.

        Raises:
            StopIteration: the steps are at their end, or the loader is closed.
        """
        begin = time.perf_counter()
        try:
            self._hold_what_is_copied()
            first = self._next_batch()
            step, after, count = self._feed.pending.popleft()
            batches = [first, *[self._next_batch() for _ in range(count - 1)]]
        except BaseException:
            self.close()
            raise
        self.last_wait_s = time.perf_counter() - begin
        if self._pin:
            self._last = batches
        if self._prefetcher is not None:
            self._prefetcher.advance(Position(step.index, {}))
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
        packed, taken = item
        slot = packed.slot if isinstance(packed, PackedBatch) else None
        if slot is None and taken is not None:
            self._slots.release(taken)
        batch = (
            packed
            if isinstance(packed, RaggedBatch)
            else packed.unpack(None if slot is None else self._slots.lend(slot))
        )
        return batch.pin_memory() if self._pin and (slot is None or not self._slots.pinned) else batch

    def _hold_what_is_copied(self) -> None:
        """Keep the last window until the GPU has its copies: a slot must not be written to while it is read.

        Copies are issued on the current stream, between one ``next()`` and the following one.
        """
        if self._last:
            event = torch.cuda.Event()
            event.record()
            self._copying.append((event, self._last))
            self._last = []
        while self._copying and (self._copying[0][0].query() or len(self._copying) > 2):
            self._copying.popleft()[0].synchronize()

    def close(self) -> None:
        """End the workers and forget what they held ready. May be called again."""
        iterator, self._iterator = self._iterator, None
        shutdown = getattr(iterator, "_shutdown_workers", None)  # also run when the iterator is deleted
        if shutdown is not None:
            shutdown()
        self._feed.close()
        if self._last or self._copying:
            torch.cuda.synchronize()
            self._last, self._copying = [], deque()
        if self._prefetcher is not None:
            self._prefetcher.close()

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


def slot_bytes(datasets: Mapping[str, Dataset], objectives: Mapping[str, Preparer], ceiling: int) -> int:
    """Return the bytes that a micro-batch of ``ceiling`` tokens takes, rarely exceeded.

    All tokens are taken for regions, whose features are the largest; texts leave room for the targets: features of
    masked regions (mrfr), or their class probabilities (a quarter of the regions at most, commonly 15 %).
    """
    token = 0
    wanted = any(objective.needs_class_probs for objective in objectives.values())
    shown = [dataset for dataset in datasets.values() if "images" in dataset.stores]
    widest = max((dataset.images.feature_dtype.itemsize for dataset in shown), default=0)
    for dataset in shown:
        features = dataset.images.meta.feature_dim * widest
        classes = 0
        if dataset.classes is not None and wanted:
            classes = dataset.classes.dtype.itemsize * dataset.classes.meta.num_classes // 4
        token = max(token, features + classes)
    return ceiling * (token + 96) + (64 << 10)


class _Reader:
    """Runs in the workers: row numbers in, prepared batch out."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        objectives: Mapping[str, Preparer],
        seed: int,
        max_regions: int,
        slots: Slots,
        pack: bool,
    ) -> None:
        self._datasets, self._objectives = datasets, objectives
        self._max_regions, self._slots, self._pack = max_regions, slots, pack
        self._draws = {name: Draws(seed, name) for name in datasets}

    def modules(self) -> set[str]:
        """Names of the modules that a worker needs."""
        things = [self, *self._datasets.values(), *self._objectives.values()]
        return {type(thing).__module__ for thing in things} - {"__main__"}

    def __getitem__(
        self, dealt: tuple[MicroBatch, int | None]
    ) -> tuple[RaggedBatch | PackedBatch, int | None] | _Failure:
        micro, slot = dealt
        block = None if slot is None else Block(self._slots.write(slot))
        try:
            batch = self._prepared(micro, block)
        except VlscaleError as error:
            return _Failure(str(error))
        if block is None and not self._pack:
            return batch, None
        return PackedBatch.pack(batch, block, slot), slot

    def _prepared(self, micro: MicroBatch, block: Block | None) -> RaggedBatch:
        objective = self._objectives[micro.task]
        if micro.views is not None:
            units = getattr(objective, "reads_units", True)
            batch = collate_views(self._datasets, micro, self._max_regions, block, units)
            prepared = objective.prepare_views(batch, [self._draws[name] for name in micro.views.datasets])
            return self._with_probs(prepared, objective, micro.views.datasets, block)
        vocabulary = self._datasets[micro.dataset].texts.meta.vocabulary
        batch = collate(self._datasets[micro.dataset], micro, self._max_regions, vocabulary.cls, vocabulary.sep, block)
        batch = objective.prepare(batch, self._draws[micro.dataset])
        return self._with_probs(batch, objective, (micro.dataset,), block)

    def _with_probs(
        self, batch: RaggedBatch, objective: Preparer, names: Sequence[str], block: Block | None
    ) -> RaggedBatch:
        if objective.needs_class_probs:
            probs = class_probs([self._datasets[name] for name in names], batch, block)
            if probs is not None:
                batch.targets["class_probs"] = probs
        return batch


def _check(plan: StepSource, datasets: Mapping[str, Dataset], objectives: Mapping[str, Preparer]) -> None:
    for names, task in plan.pairs:
        for name in parted(names):
            if name not in datasets:
                raise VlscaleError(f"the plan needs dataset {name}, which is not open (open: {', '.join(datasets)})")
            if task not in objectives:
                raise VlscaleError(f"dataset {name}: task {task} of its mix has no objective; drop it from the mix")
            dataset = datasets[name]
            if task != UNIFIED:
                dataset.require("texts")
                dataset.require("images")
            if needs_classes(objectives[task], dataset) and dataset.classes is None:
                raise VlscaleError(
                    f"dataset {name}: task {task} needs class probabilities, but there is no classes/ store; build the "
                    f"dataset with classes, or {_without_classes(task)}"
                )
            if task == UNIFIED and dataset.num_types > 1:
                raise VlscaleError(
                    f"dataset {name}: its texts have segments of {dataset.num_types} types, which task unified does "
                    f"not know; build the texts without types"
                )


def _without_classes(task: str) -> str:
    return "set objectives.unified.visual.class_weight to 0" if task == UNIFIED else f"drop {task} from its mix"


def _identity(item: Any) -> Any:
    return item
