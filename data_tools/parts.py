"""Parts of a build under ``ROOT/.parts``: each appears under its name only when it is complete, so that a build can be
killed at any moment and continued by the same command, and several machines can build different parts.

    images.json          what the build was begun with; another source or other options are refused
    images-00017/        part 17, complete
    .images-00017.tmp-*  part 17, being built
    images-merged/       everything, complete, on its way to ROOT
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_tools.fingerprint import first_difference
from data_tools.under_way import count_in, shared_counts
from vlscale.errors import VlscaleError

LOCK_SECONDS = 10.0
"""How long another process's lock is waited for: workers of a killed process are gone long before."""

MAX_MANIFEST = 1 << 30


class PartBuilder(Protocol):
    """Builds one part; pickled into worker processes."""

    def build(self, number: int, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Fill the empty ``folder`` and return what result.json should say (JSON types).

        Raises:
            VlscaleError: a bad row, or the source cannot be read.
        """
        ...


@dataclass(frozen=True)
class Run:
    """How a build runs; nothing here changes what comes out.

    Attributes:
        root: the dataset's folder.
        workers: processes; 1 is this process alone.
        shard: ``(i, n)`` builds the parts i, i + n, i + 2n, ... and does not merge; None builds all and merges.
        merge: builds nothing, and merges what array jobs have built.
    """

    root: Path
    workers: int = 1
    shard: tuple[int, int] | None = None
    merge: bool = False

    def numbers(self, parts: int) -> range:
        """Parts that this run builds."""
        if self.merge:
            return range(0)
        first, step = self.shard or (0, 1)
        return range(first, parts, step)


class Work:
    """The work folder of one build.

    Args:
        root: the dataset's folder.
        kind: ``images`` or ``texts``.
    """

    def __init__(self, root: Path, kind: str) -> None:
        self.root = root
        self.kind = kind
        self.folder = root / ".parts"
        self.manifest = self.folder / f"{kind}.json"
        self.merged = self.folder / f"{kind}-merged"

    def part(self, number: int) -> Path:
        """Folder of a complete part."""
        return self.folder / f"{self.kind}-{number:05d}"

    def result(self, number: int) -> dict[str, Any] | None:
        """What the builder returned for a part; None if it is not complete."""
        path = self.part(number) / "result.json"
        return read_json(path) if path.exists() else None

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Record what the build is begun with, or compare it with what is recorded.

        Raises:
            VlscaleError: another build is in progress here, or the folder cannot be written.
        """
        found = self.recorded()
        if found is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                temporary = self.folder / f".{self.kind}.json.tmp-{_process()}"
                temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                try:
                    os.link(temporary, self.manifest)
                except FileExistsError:
                    pass  # another array job was faster
                except OSError:  # no hard links here
                    os.replace(temporary, self.manifest)
                temporary.unlink(missing_ok=True)
            except OSError as error:
                raise VlscaleError(f"{self.folder}: cannot be written ({error.strerror})") from None
            found = read_json(self.manifest)
        difference = first_difference(found, json.loads(json.dumps(manifest)))
        if difference:
            raise VlscaleError(
                f"{self.manifest}: this build was begun otherwise: {difference}; continue with the same source and "
                f"options, or remove {self.folder}/{self.kind}* and begin again"
            )

    def recorded(self) -> dict[str, Any] | None:
        """What the build in progress was begun with; None if there is none."""
        for path in (self.manifest, self.merged / "manifest.json"):
            if path.exists():
                return read_json(path)
        return None

    @contextmanager
    def lock(self, name: str, exclusive: bool = True, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold a lock among the processes that work on this build; it ends with the process.

        Args:
            name: of the lock.
            exclusive: nobody else holds it; otherwise others who do not ask for that may.
            waiting: called when another process has held it for 10 s, and then it is waited for without limit; None
                raises.

        Raises:
            VlscaleError: another process has held it for 10 s.
        """
        path = self.folder / f".{self.kind}-{name}.lock"
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            deadline, told = time.monotonic() + LOCK_SECONDS, False
            while True:
                try:
                    fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told and time.monotonic() > deadline:
                        if waiting is None:
                            raise VlscaleError(
                                f"{path}: another process works on {self.kind} {name}; wait until it has ended"
                            ) from None
                        waiting()
                        told = True
                    time.sleep(0.1)
                except OSError:
                    break  # a file system without locks: renames still keep parts whole
            yield

    def build(self, number: int, part: Mapping[str, Any], builder: PartBuilder) -> dict[str, Any]:
        """Build one part unless it is complete, and return its result.

        Raises:
            VlscaleError: see :class:`PartBuilder`; another process builds the part; or it cannot be written.
        """
        with self.lock(f"{number:05d}"):
            found = self.result(number)
            if found is not None:
                return found
            for left in self.folder.glob(f".{self.kind}-{number:05d}.tmp-*"):  # by a killed process
                shutil.rmtree(left)
            temporary = self.folder / f".{self.kind}-{number:05d}.tmp-{_process()}"
            try:
                temporary.mkdir()
                result = builder.build(number, part, temporary)
                (temporary / "result.json").write_text(json.dumps(result), encoding="utf-8")
                os.rename(temporary, self.part(number))
            except OSError as error:
                raise VlscaleError(f"{temporary}: cannot be written ({error})") from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return result

    def rebuild_later(self, number: int) -> None:
        """Take away a complete part: renamed first, so that it is never there by half."""
        left = self.folder / f".{self.kind}-{number:05d}.tmp-old-{_process()}"
        os.rename(self.part(number), left)
        shutil.rmtree(left)

    def build_all(
        self,
        parts: Sequence[Mapping[str, Any]],
        numbers: Sequence[int],
        builder: PartBuilder,
        workers: int,
        done: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """Build the parts that are not complete, ``workers`` at a time; ``done(number, result)`` after each.

        Raises:
            VlscaleError: see :meth:`build`; or a worker process has died.
        """
        missing = []
        for number in numbers:
            found = self.result(number)
            if found is None:
                missing.append(number)
            else:
                done(number, found)
        if workers == 1 or len(missing) < 2:
            for number in missing:
                done(number, self.build(number, parts[number], builder))
            return
        with worker_pool(min(workers, len(missing)), str(self.folder), _begin_worker, self, builder) as pool:
            _drain(pool, missing, parts, done)


@contextmanager
def worker_pool(
    workers: int, where: str, begin: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, also when it is killed; what still waits when the block ends is cancelled.

    Args:
        workers: how many.
        where: beginning of the error.
        begin: called with ``arguments`` in each process first.

    Raises:
        VlscaleError: a process has died.
    """
    context = multiprocessing.get_context("spawn")
    setup = (os.getpid(), shared_counts(), begin, arguments)
    with ProcessPoolExecutor(workers, context, _begin_process, setup) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise VlscaleError(
                f"{where}: a worker process was killed, perhaps for memory; give the same command again, with fewer "
                f"--workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _drain(
    pool: ProcessPoolExecutor,
    missing: Sequence[int],
    parts: Sequence[Mapping[str, Any]],
    done: Callable[[int, dict[str, Any]], None],
) -> None:
    """Keep a few parts ahead of the workers, so that a million parts are not all pickled at once."""
    waiting = list(reversed(missing))
    running: dict[Future[dict[str, Any]], int] = {}
    while waiting or running:
        while waiting and len(running) < 64:
            number = waiting.pop()
            running[pool.submit(_build_in_worker, number, parts[number])] = number
        ready, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(ready, key=running.__getitem__):
            done(running.pop(future), future.result())


_worker: dict[str, Any] = {}
"""The build that a worker process works on; opened sources are kept from part to part."""


def _begin_worker(work: Work, builder: PartBuilder) -> None:
    _worker.update(work=work, builder=builder)


def _begin_process(parent: int, counts: Any, begin: Callable[..., None] | None, arguments: Sequence[Any]) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    count_in(counts)
    if begin is not None:
        begin(*arguments)


def _end_with(parent: int) -> None:
    """End this process soon after its parent was killed, so that it does not build on beside the next run."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _build_in_worker(number: int, part: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = _worker["work"].build(number, part, _worker["builder"])
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that this package wrote.

    Raises:
        VlscaleError: it is missing or damaged.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise ValueError("too large")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise VlscaleError(f"{path}: cannot be read ({error}); remove its folder and begin again") from None
    return found


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"
