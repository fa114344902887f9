"""Prefetching in the plan's order, and the reader under eviction: rows, downloads, memory, ends."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.remotes import counted, files_of, open_counting, total_bytes, write_large
from tests.data.test_loader import Masker, workers_alive
from tests.data.test_packing import equal
from tests.helpers import make_dataset
from vlscale.data import fetch
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import accumulation
from vlscale.data.loader import Loader
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.prefetch import Prefetcher, check_room
from vlscale.data.remote import CachedFiles
from vlscale.errors import VlscaleError

SETTINGS = PlanSettings(
    seed=3, global_batch_examples=100, micro_batch_tokens=4000, max_regions=6, window_shards=3, itm_replace="both"
)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Over a thousand image shards, over a hundred text shards, about 3 MB."""
    return write_large(tmp_path_factory.mktemp("large") / "data", 4000, 1 << 11, 1 << 12)


def loader_of(dataset, plan, workers, prefetcher=None):
    gas = accumulation(plan, 1)
    objectives = {"mlm": Masker(), "itm": Masker()}
    return Loader(
        {"toy": dataset}, objectives, plan, plan.start(), 0, 1, gas, 4000, workers, 2, 3, 6, prefetcher=prefetcher
    )


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_pass_under_eviction_gives_the_right_rows_and_few_downloads(large, tmp_path) -> None:
    """A cache of a tenth of the data, two workers, partners of image-text matching: at most 1.2 x the shards."""
    plain = open_dataset("toy", large)
    plan = Plan([(plain.lengths, {"mlm": 1, "itm": 1})], SETTINGS)
    limit = total_bytes(open_counting(large, tmp_path / "other", tmp_path / "unused")) // 10
    cached = open_counting(large, tmp_path / "cache", tmp_path / "log", limit)
    check_room(plan, {"toy": cached}, (), SETTINGS.window_shards)
    steps = len(plain.texts) // 100
    prefetcher = Prefetcher({"toy": cached}, plan, plan.start())
    most = 0
    with loader_of(plain, plan, 0) as expected, loader_of(cached, plan, 2, prefetcher) as loader:
        for index, ((step, _, batches), (_, _, right)) in enumerate(
            itertools.islice(zip(loader, expected, strict=True), steps)
        ):
            assert step.index == index
            for one, other in zip(batches, right, strict=True):
                equal(one, other)
            most = max(most, files_of(cached)["texts"].cache.size())
    assert most <= limit
    found = counted(tmp_path / "log")
    shards = sum(len(files.index.shards) for files in files_of(cached).values())
    assert len(found) == shards
    assert sum(found.values()) <= 1.2 * shards, sum(found.values()) / shards
    assert not threads()


def test_shards_come_in_the_plans_order_before_they_are_needed_and_within_bounds(large, tmp_path) -> None:
    plain = open_dataset("toy", large)
    plan = Plan([(plain.lengths, {"mlm": 1})], SETTINGS)
    limit = total_bytes(open_counting(large, tmp_path / "other", tmp_path / "unused")) // 5
    cached = open_counting(large, tmp_path / "cache", tmp_path / "log", limit)
    prefetcher = Prefetcher({"toy": cached}, plan, plan.start(), steps=7, threads=1)
    prefetcher.start()
    assert prefetcher.wait(60)
    files = files_of(cached)
    steps = list(itertools.islice(plan.steps(plan.start()), 30))

    def needed(step, store, rows):
        return {
            f"{store}/{files[store].place(n).name}" for n in files[store].index.ends.searchsorted(rows, "right") - 1
        }

    def of(count):
        return set().union(*(needed(s, "texts", s.texts) | needed(s, "images", s.images) for s, _ in steps[:count]))

    assert set(counted(tmp_path / "log")) == of(7)
    prefetcher.advance(steps[2][1])
    deadline = time.monotonic() + 30
    while set(counted(tmp_path / "log")) != of(10) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(counted(tmp_path / "log")) == of(10)
    for step, after in steps:
        cached.texts.input_ids(step.texts)
        prefetcher.advance(after)
    prefetcher.close()
    assert not threads()


def test_class_shards_are_fetched_only_for_tasks_that_read_them(tmp_path) -> None:
    root = make_dataset(tmp_path / "data", images=30)
    for tasks, some in (((), False), (("mrc",), True)):
        cached = open_counting(root, tmp_path / f"cache{some}", tmp_path / f"log{some}")
        plan = Plan([(cached.lengths, {"mrc": 1})], PlanSettings(1, global_batch_examples=90))
        prefetcher = Prefetcher({"toy": cached}, plan, plan.start(), tasks, steps=1)
        prefetcher.start()
        assert prefetcher.wait(60)
        prefetcher.close()
        found = {name for name in counted(tmp_path / f"log{some}") if name.startswith("classes/")}
        every = {f"classes/{shard.basename}" for shard in files_of(cached)["classes"].index.shards}
        assert found == (every if some else set())


def test_a_failed_prefetch_is_reported_by_the_reader_that_needs_the_shard(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.0)
    root = make_dataset(tmp_path / "data", images=30)
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    (root / "texts" / "shard.00002.mds").unlink()
    plan = Plan([(cached.lengths, {"mlm": 1})], PlanSettings(1, global_batch_examples=10))
    prefetcher = Prefetcher({"toy": cached}, plan, plan.start())
    loader = loader_of(cached, plan, 1, prefetcher)
    with pytest.raises(VlscaleError, match=r"shard\.00002\.mds: cannot be fetched"):
        list(itertools.islice(loader, 9))
    assert not threads()


def test_a_thread_that_meets_what_it_does_not_know_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog) -> None:
    root = make_dataset(tmp_path / "data", images=30)
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    real, failed = CachedFiles.prefetch, []

    def shaky(files, number, keep=()):
        if len(failed) < 2:
            failed.append(number)
            raise MemoryError("of pages")
        return real(files, number, keep)

    monkeypatch.setattr(CachedFiles, "prefetch", shaky)
    plan = Plan([(cached.lengths, {"mlm": 1})], PlanSettings(1, global_batch_examples=10))
    prefetcher = Prefetcher({"toy": cached}, plan, plan.start(), threads=2)
    prefetcher.start()
    assert prefetcher.wait(30)
    assert len(failed) == 2
    shards = sum(len(files_of(cached)[store].index.shards) for store in ("texts", "images"))
    assert len(counted(tmp_path / "log")) == shards - 2
    assert all(thread.is_alive() for thread in prefetcher._threads[1:])
    prefetcher.close()
    (record,) = caplog.records
    assert "is left to its readers (MemoryError: of pages)" in record.getMessage()


def test_threads_end_with_the_loader_however_it_ends(tmp_path) -> None:
    root = make_dataset(tmp_path / "data", images=30)
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    plan = Plan([(cached.lengths, {"mlm": 1})], PlanSettings(1, global_batch_examples=10))
    loader = loader_of(cached, plan, 0, Prefetcher({"toy": cached}, plan, plan.start()))
    next(loader)
    assert threads()
    with pytest.raises(ZeroDivisionError), loader:
        raise ZeroDivisionError
    assert not threads()
    loader.close()
    loader = loader_of(cached, plan, 0, Prefetcher({"toy": cached}, plan, plan.start()))
    next(loader)
    del loader
    assert not threads()


def test_local_data_start_no_thread(tmp_path) -> None:
    dataset = open_dataset("toy", make_dataset(tmp_path / "data", images=30))
    plan = Plan([(dataset.lengths, {"mlm": 1})], PlanSettings(1, global_batch_examples=10))
    with loader_of(dataset, plan, 0, Prefetcher({"toy": dataset}, plan, plan.start())) as loader:
        next(loader)
        assert not threads()


def test_a_limit_that_cannot_hold_two_windows_is_refused_with_the_cure(large, tmp_path) -> None:
    plain = open_dataset("toy", large)
    plan = Plan([(plain.lengths, {"mlm": 1})], SETTINGS)
    cached = open_counting(large, tmp_path / "cache", tmp_path / "log", 100_000)
    with pytest.raises(
        VlscaleError, match=r"cannot hold two windows of 3 text .* raise it to (\d+), or lower"
    ) as caught:
        check_room(plan, {"toy": cached}, (), 3)
    enough = int(str(caught.value).split("raise it to ")[1].split(",")[0])
    cached = open_counting(large, tmp_path / "cache", tmp_path / "log", enough)
    check_room(plan, {"toy": cached}, (), 3)
    check_room(plan, {"toy": plain}, (), 3)
    everything = total_bytes(cached)
    cached = open_counting(large, tmp_path / "cache", tmp_path / "log", int(everything / 0.9) + 1)
    check_room(plan, {"toy": cached}, (), 1000)


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a process: ``RssFile`` are pages of mapped files, ``RssAnon`` and ``RssShmem`` the rest."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Rss")]
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in lines}


def test_memory_of_a_worker_is_bounded_by_the_cache_over_three_passes(tmp_path) -> None:
    """Data ten times the cache: what a worker holds follows the limit, and does not grow from pass to pass."""
    root = write_large(tmp_path / "data", 6000, 1 << 19, 1 << 13, feature_dim=4096, texts=1)
    plain = open_dataset("toy", root)
    settings = PlanSettings(seed=3, global_batch_examples=25, max_regions=6, window_shards=1, micro_batch_tokens=4000)
    plan = Plan([(plain.lengths, {"mlm": 1})], settings)
    everything = total_bytes(open_counting(root, tmp_path / "other", tmp_path / "unused"))
    limit = everything // 10
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log", limit)
    check_room(plan, {"toy": cached}, (), settings.window_shards)
    prefetcher = Prefetcher({"toy": cached}, plan, plan.start())
    pass_steps, files, others = len(plain.texts) // 25, [], []
    with loader_of(cached, plan, 1, prefetcher) as loader:
        next(loader)
        (worker,) = workers_alive()
        start = resident(worker.pid)
        for _ in range(3):
            seen = []
            for _ in range(pass_steps):
                next(loader)
                seen.append(resident(worker.pid))
            files.append(max(each["RssFile"] for each in seen) - start["RssFile"])
            others.append(max(each["RssAnon"] + each["RssShmem"] for each in seen))
    read = sum(counted(tmp_path / "log").values())
    shards = sum(len(store.index.shards) for store in files_of(cached).values())
    assert read > 2.5 * shards  # the cache cannot hold more: each pass has to fetch
    assert max(files) <= limit < everything // 9, (files, limit)
    assert others[2] < others[0] + (16 << 20) < others[0] + everything // 10, others


def test_needs_name_the_shards_of_every_row(large, tmp_path) -> None:
    cached = open_counting(large, tmp_path / "cache", tmp_path / "log")
    plan = Plan([(cached.lengths, {"itm": 1})], SETTINGS)
    prefetcher = Prefetcher({"toy": cached}, plan, plan.start())
    step, _ = next(iter(plan.steps(plan.start())))
    found = prefetcher._needs["toy"].of(step)
    ends = {name: files.index.ends for name, files in files_of(cached).items()}
    for store, rows in (("texts", step.texts), ("images", step.images)):
        assert {n for _, s, n in found if s == store} == set((np.searchsorted(ends[store], rows, "right") - 1).tolist())
