"""Looking ahead where planning reads lists of candidates itself: it outlives failures, and evicts nothing needed."""

from __future__ import annotations

import time

import pytest

from tests.data.unified_data import write_all
from vlscale.data import prefetch
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.prefetch import Prefetcher
from vlscale.data.remote import CachedFiles, CacheSettings, disk_bytes
from vlscale.data.views import UNIFIED
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("unified"))


def opened(folders, cache, limit=None) -> tuple[dict[str, Dataset], Plan]:
    settings = CacheSettings(cache, limit, retries=0)
    datasets = {name: open_dataset(name, folder, True, settings) for name, folder in folders.items()}
    made = PlanSettings(seed=3, global_batch_tokens=800, micro_batch_tokens=700, window_shards=1)
    return datasets, Plan([(dataset.lengths, {UNIFIED: 1.0}) for dataset in datasets.values()], made)


def candidates(prefetcher: Prefetcher) -> CachedFiles:
    """The files of the lists that the prefetcher's own plan reads."""
    found = prefetcher._plan.sources["pairs"].beside.retrieved.reader.files
    assert isinstance(found, CachedFiles)
    return found


def test_a_failed_fetch_of_the_plan_is_tried_again_at_the_same_step(folders, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "PAUSE_S", 0.05)
    datasets, plan = opened(folders, tmp_path / "cache")
    prefetcher = Prefetcher(datasets, plan, plan.start(), [UNIFIED], steps=12)
    files = candidates(prefetcher)
    real, calls = files._fetch, []

    def shaky(file, target):
        calls.append(file.basename)
        if len(calls) in (1, 2, 4):
            raise VlscaleError("the remote does not answer")
        real(file, target)

    monkeypatch.setattr(files, "_fetch", shaky)
    prefetcher.start()
    deadline = time.monotonic() + 60
    while len(prefetcher._ahead) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(calls) >= 5
    assert [index for index, _ in prefetcher._ahead] == list(range(12))
    assert all(thread.is_alive() for thread in prefetcher._threads)
    prefetcher.close()
    (record,) = caplog.records
    assert "looking ahead pauses (VlscaleError: the remote does not answer)" in record.getMessage()


def test_a_pause_ends_when_the_prefetcher_is_closed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "PAUSE_S", 600.0)
    datasets, plan = opened(folders, tmp_path / "cache")
    prefetcher = Prefetcher(datasets, plan, plan.start(), [UNIFIED])

    def failing(file, target):
        raise VlscaleError("the remote does not answer")

    monkeypatch.setattr(candidates(prefetcher), "_fetch", failing)
    prefetcher.start()
    assert prefetcher.wait(30)  # what can be fetched has been, or has failed
    threads = prefetcher._threads
    prefetcher.close()
    assert not any(thread.is_alive() for thread in threads)


def test_the_plans_own_fetches_evict_no_shard_that_is_needed(folders, tmp_path):
    """In a cache that is full, a list is not fetched in the place of a queued shard, but once that has been used."""
    datasets, _ = opened(folders, tmp_path / "other")
    sizes = [disk_bytes(file) for file in datasets["pairs"].texts.reader.index.shards[:2]]
    lists = [disk_bytes(file) for file in datasets["pairs"].retrieved.reader.index.shards]
    datasets, plan = opened(folders, tmp_path / "cache", sum(sizes) + max(lists) - 1)
    prefetcher = Prefetcher(datasets, plan, plan.start(), [UNIFIED])
    texts, own = datasets["pairs"].texts.reader.files, candidates(prefetcher)
    queued = [("pairs", "texts", number) for number in (0, 1)]
    assert all(texts.prefetch(number) for _, _, number in queued)
    prefetcher._uses.update(queued)
    largest = lists.index(max(lists))
    with pytest.raises(VlscaleError, match="no room in the cache yet"):
        own.path(largest)
    assert all(texts.place(number).exists() for number in (0, 1))
    prefetcher._uses.clear()
    assert own.path(largest).exists()
    assert not all(texts.place(number).exists() for number in (0, 1))


def test_looking_ahead_goes_on_once_there_is_room(folders, tmp_path, monkeypatch):
    """Steps are admitted one after the other as training uses what is there, through however small a cache."""
    monkeypatch.setattr(prefetch, "PAUSE_S", 0.05)
    datasets, plan = opened(folders, tmp_path / "cache", 60_000)
    prefetcher = Prefetcher(datasets, plan, plan.start(), [UNIFIED], steps=3)
    prefetcher.start()
    position, deadline = plan.start(), time.monotonic() + 60
    for _ in range(15):
        while time.monotonic() < deadline and not any(index == position.step for index, _ in prefetcher._ahead):
            time.sleep(0.01)
        assert any(index == position.step for index, _ in prefetcher._ahead)
        _, position = plan.step(position)
        prefetcher.advance(position)
    prefetcher.close()
