"""Prefetching: shards are fetched before a step needs them, because the plan says which it will be.

One process per node looks ahead: the node's processes share the cache, and the examples of a step are dealt over all of
them. Threads of that process walk a second iterator over the same plan, a bounded number of steps and bytes ahead of
training, and put what the steps need into the cache, in that order. Shards that a coming step needs are never evicted
for a later one. A fetch that fails here is not an error yet: the reader that needs the shard tries again, and says so.
What is none of the remote's doing (no memory, a bug) is warned of once, and the shard is left to the reader as well.
Planning itself reads lists of candidates (task ``unified``): where these cannot be fetched, looking ahead pauses and
goes on at the same step.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.dataset import Dataset
from vlscale.data.feed import StepSource, own_plan
from vlscale.data.plan import Plan, Position, Step
from vlscale.data.remote import CachedFiles, disk_bytes
from vlscale.data.views import UNIFIED, Role, Views, parted
from vlscale.errors import VlscaleError

_log = logging.getLogger(__name__)

Wanted = tuple[str, str, int]
"""(dataset, store, shard)"""

FETCHED_AHEAD = 1000
"""Most steps ahead of training whose shards are fetched."""

CACHE_SHARE = 0.9
"""Part of the cache's limit that shards of the current step and those ahead may fill."""

THREADS = 4
PAUSE_S = 2.0
"""Until planning is tried again after its first failure; twice as long after each further one."""
_LONGEST_PAUSE_S = 60.0
_END_S = 5.0


class Prefetcher:
    """Fetches the shards of coming steps. Start it once, tell it of progress, close it.

    Args:
        datasets: name -> opened dataset; those that are not in a cache are left alone.
        plan: the source of steps; a :class:`Plan` is not shared with other threads, but copied.
        position: where training begins.
        class_tasks: tasks that read class probabilities.
        steps: most steps to look ahead.
        threads: shards fetched at a time.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        plan: StepSource,
        position: Position,
        class_tasks: Collection[str] = (),
        steps: int = FETCHED_AHEAD,
        threads: int = THREADS,
    ) -> None:
        self._needs = {name: _Needs(dataset, class_tasks) for name, dataset in datasets.items() if is_cached(dataset)}
        self._plan, self._position = own_plan(plan), position
        if isinstance(self._plan, Plan):
            _fetch_beside(self._plan, self._keep)
        self._steps, self._count = steps, threads
        limits = [files.cache.limit for needs in self._needs.values() for files in needs.files.values()]
        known = [limit for limit in limits if limit is not None]
        self._limit = int(min(known) * CACHE_SHARE) if known else None
        self._ahead: deque[tuple[int, frozenset[Wanted]]] = deque()
        self._uses: Counter[Wanted] = Counter()
        self._bytes = 0
        self._todo: OrderedDict[Wanted, None] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._walked = False
        self._busy = 0
        self._reported = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to fetch; nothing happens if no dataset is in a cache."""
        if not self._needs or self._threads:
            return
        self._threads = [threading.Thread(target=self._walk, name="prefetch plan", daemon=True)]
        self._threads += [
            threading.Thread(target=self._work, name=f"prefetch {number}", daemon=True) for number in range(self._count)
        ]
        for thread in self._threads:
            thread.start()

    def advance(self, position: Position) -> None:
        """Training has come to ``position``: what only earlier steps needed may be evicted now."""
        with self._changed:
            while self._ahead and self._ahead[0][0] < position.step:
                for wanted in self._ahead.popleft()[1]:
                    self._uses[wanted] -= 1
                    if not self._uses[wanted]:
                        del self._uses[wanted]
                        self._todo.pop(wanted, None)
                        self._bytes -= self._size(wanted)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; a transfer under way is given a moment and then left to its own end. May be repeated."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_END_S)
        self._threads = []

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything that may be fetched now has been, or has failed; for tests and benchmarks."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closed or (self._walked and not self._todo and not self._busy), timeout_s
            )

    def _size(self, wanted: Wanted) -> int:
        name, store, number = wanted
        return disk_bytes(self._needs[name].files[store].index.shards[number])

    def _walk(self) -> None:
        pause = PAUSE_S
        try:
            while True:
                try:
                    for step, after in self._plan.steps(self._position):
                        if not self._admit(step.index, self._wanted(step)):
                            return
                        self._position, pause = after, PAUSE_S
                    return
                except _NoRoomError:
                    pause = PAUSE_S
                except VlscaleError as error:  # if it is there to stay, training walks the same plan and meets it too
                    self._report(f"looking ahead pauses ({_of(error)})")
                if not self._rest(pause):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_S)
        except Exception as error:
            self._report(f"looking ahead ends, shards are fetched when they are needed ({_of(error)})")
        finally:
            with self._changed:
                self._walked = True
                self._changed.notify_all()

    def _rest(self, seconds: float) -> bool:
        """Wait a while. False: closed."""
        with self._changed:
            self._walked = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed, seconds)
            self._walked = False
            return not self._closed

    def _wanted(self, step: Step) -> frozenset[Wanted]:
        """The shards that a step needs, of all its datasets that are in a cache."""
        found: set[Wanted] = set()
        for number, name in enumerate(parted(step.dataset)):
            if name in self._needs:
                found |= self._needs[name].of(step, number)
        return frozenset(found)

    def _admit(self, index: int, wanted: frozenset[Wanted]) -> bool:
        """Wait until there is room for a step's shards, and queue them. False: closed."""
        sizes = {each: self._size(each) for each in wanted}

        def fits() -> bool:
            if self._closed or not self._ahead:
                return True
            new = sum(size for each, size in sizes.items() if each not in self._uses)
            return len(self._ahead) < self._steps and (self._limit is None or self._bytes + new <= self._limit)

        with self._changed:
            self._walked = not fits()
            if self._walked:
                self._changed.notify_all()
                self._changed.wait_for(fits)
                self._walked = False
            if self._closed:
                return False
            self._ahead.append((index, wanted))
            for each in sorted(wanted):
                if each not in self._uses:
                    self._todo[each] = None
                    self._bytes += sizes[each]
                self._uses[each] += 1
            self._changed.notify_all()
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._todo))
                if self._closed:
                    return
                wanted, _ = self._todo.popitem(last=False)
                self._busy += 1
            fetched = True  # whatever happens, the reader that needs it tries again, and says what is wrong
            try:
                fetched = self._fetch(wanted)
            except VlscaleError:
                pass
            except Exception as error:
                name, store, number = wanted
                self._report(f"{name}: {store} shard {number} is left to its readers ({_of(error)})")
            finally:
                with self._changed:
                    self._busy -= 1
                    if not fetched and wanted in self._uses:
                        self._todo[wanted] = None
                        self._changed.wait(1.0)
                    self._changed.notify_all()

    def _fetch(self, wanted: Wanted) -> bool:
        """Have a shard in the cache. False: there is no room for it beside those that are needed before."""
        name, store, number = wanted
        return self._needs[name].files[store].prefetch(number, self._keep())

    def _keep(self) -> list[Path]:
        """Where the shards are that the present step and those ahead need."""
        with self._changed:
            return [self._needs[name].files[store].place(number) for name, store, number in self._uses]

    def _report(self, problem: str) -> None:
        with self._changed:
            first, self._reported = not self._reported, True
        if first:
            _log.warning("prefetch: %s; later ones are not reported", problem)


class _NoRoomError(VlscaleError):
    """There is no room beside the shards that are needed before."""


class _Keeping(CachedFiles):
    """The files of a store, whose fetching evicts nothing that ``keep()`` names."""

    def __init__(self, files: CachedFiles, keep: Callable[[], Collection[Path]]) -> None:
        super().__init__(files.index, files.source, files.cache, files.fetcher)
        self._keep = keep

    def path(self, number: int) -> Path:
        """Return shard ``number``'s path, after fetching it if it is not there.

        Raises:
            VlscaleError: it cannot be fetched, or not yet.
        """
        if not self.prefetch(number, self._keep()):
            raise _NoRoomError(f"{self.place(number)}: no room in the cache yet")
        return self.place(number)


def _fetch_beside(plan: Plan, keep: Callable[[], Collection[Path]]) -> None:
    """Have what ``plan`` itself reads fetched without evicting what ``keep()`` names; the plan is nobody else's."""
    for source in plan.sources.values():
        reader = getattr(source.beside.retrieved, "reader", None)
        if reader is not None and isinstance(reader.files, CachedFiles):
            reader.files = _Keeping(reader.files, keep)


def _of(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class _Needs:
    """Which shards of one dataset a step needs."""

    def __init__(self, dataset: Dataset, class_tasks: Collection[str]) -> None:
        self._dataset, self._class_tasks = dataset, frozenset(class_tasks)
        readers = {name: store.reader for name, store in dataset.stores.items()}
        self.files = {name: files for name, reader in readers.items() if isinstance(files := reader.files, CachedFiles)}
        self._ends = {name: reader.ends for name, reader in readers.items()}

    def of(self, step: Step, number: int = 0) -> frozenset[Wanted]:
        """Shards of the step's texts, of their images and, if its task reads them, of the class probabilities.

        Args:
            step: the step.
            number: which of its datasets this is, where there are several.
        """
        if step.views is None:
            found = self._of_rows(step.texts, step.images, step.task)
        else:
            found = self._of_views(step, step.views, number)
        name = self._dataset.name
        return frozenset((name, store, shard) for store, shards in found.items() for shard in shards.tolist())

    def _of_rows(self, texts: NDArray[np.int64], images: NDArray[np.int64], task: str) -> dict[str, NDArray[np.int64]]:
        rows = {"texts": texts[texts >= 0], "images": images[images >= 0]}
        found = {store: self._shards(store, each) for store, each in rows.items() if store in self._ends}
        if task in self._class_tasks and "classes" in self._ends:
            found["classes"] = self.class_shards(rows["images"])
        return found

    def _of_views(self, step: Step, views: Views, number: int) -> dict[str, NDArray[np.int64]]:
        """Rewritten captions and units too; class probabilities only of images that are masked."""
        mine, rewritten = views.source == number, views.view >= 0
        found = self._of_rows(step.texts[mine & ~rewritten], step.images[mine], "")
        beside = {
            "rewrites": mine & rewritten,
            "units": mine & ((views.role == Role.BIDIRECTIONAL) | (views.role == Role.SEQ2SEQ)),
            "retrieved": mine & (views.role == Role.PAIR),
        }
        for store, rows in beside.items():
            if store in self._ends:
                found[store] = self._shards(store, step.texts[rows])
        if step.task in self._class_tasks and "classes" in self._ends:
            found["classes"] = self.class_shards(step.images[mine & (views.role == Role.VISUAL)])
        return found

    def block_bytes(self, begin: int, end: int, tasks: Collection[str]) -> int:
        """Bytes of the shards that the texts ``begin`` to ``end`` and their images need for some tasks."""
        lengths, rows = self._dataset.lengths, np.arange(begin, end)
        images = np.unique(lengths.first_image(rows))
        images = images[images >= 0]
        wanted = {"texts": rows, "images": images}
        if UNIFIED in tasks:
            wanted |= dict.fromkeys(("units", "rewrites", "retrieved"), rows)
        found = {store: self._shards(store, each) for store, each in wanted.items() if store in self._ends}
        if self._class_tasks & set(tasks) and "classes" in self._ends:
            found["classes"] = self.class_shards(images)
        shards = {store: self.files[store].index.shards for store in found}
        return sum(disk_bytes(shards[store][number]) for store, numbers in found.items() for number in numbers.tolist())

    def _shards(self, store: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.unique(np.searchsorted(self._ends[store], rows, side="right") - 1)

    def class_shards(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """All shards that hold a region of one of the images."""
        pointer = self._dataset.images.region_ptr
        first = np.searchsorted(self._ends["classes"], pointer[images], side="right") - 1
        last = np.searchsorted(self._ends["classes"], pointer[images + 1] - 1, side="right") - 1
        return np.unique(np.concatenate([first, last, *_between(first, last)]))


def _between(first: NDArray[np.int64], last: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Shards that lie wholly inside one image's regions; with any sensible shard size there are none."""
    for place in np.flatnonzero(last > first + 1).tolist():
        yield np.arange(first[place] + 1, last[place])


def class_tasks(objectives: Mapping[str, Any]) -> list[str]:
    """Tasks whose objective reads class probabilities."""
    return [task for task, objective in objectives.items() if objective.needs_class_probs]


def is_cached(dataset: Dataset) -> bool:
    """Are the dataset's shards fetched when they are needed?"""
    return any(isinstance(store.reader.files, CachedFiles) for store in dataset.stores.values())


def check_room(plan: Plan, datasets: Mapping[str, Dataset], class_tasks: Collection[str], window_shards: int) -> None:
    """Refuse a cache that cannot hold the window that is read and the next one: every shard would come many times.

    Raises:
        VlscaleError: ``data.cache_limit`` is too small.
    """
    total, limit = 0, None
    for name, source in plan.sources.items():
        if not is_cached(datasets[name]):
            continue
        dataset = datasets[name]
        needs = _Needs(dataset, class_tasks)
        limit = next(iter(needs.files.values())).cache.limit
        if limit is None:
            return
        blocks = np.sort([needs.block_bytes(*edges, source.mix) for edges in pairwise(source.survey.edges.tolist())])
        everything = sum(disk_bytes(file) for files in needs.files.values() for file in files.index.shards)
        windows = min(2 * int(blocks[::-1][:window_shards].sum()), everything)
        total += everything if name in plan.drawn_from else windows
    if limit is not None and total > limit * CACHE_SHARE:
        least = int(total / CACHE_SHARE) + 1
        whole = f", and {', '.join(sorted(plan.drawn_from))} whole for retrieved views" if plan.drawn_from else ""
        raise VlscaleError(
            f"data.cache_limit {limit} bytes cannot hold two windows of {window_shards} text shards and their images"
            f"{whole}, up to {total} bytes; raise it to {least}, or lower data.window_shards"
        )
