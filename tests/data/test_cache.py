"""The cache's folder: what is kept, what goes, and what a killed process leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.data.remotes import counted, open_counting, total_bytes, write_large
from vlscale.data import reader
from vlscale.data.cache import ShardCache
from vlscale.errors import VlscaleError

SIZE = 100


def place(cache: ShardCache, number: int) -> Path:
    return cache.folder / "key" / "images" / f"{number}.mds"


def get(cache: ShardCache, number: int, keep=(), size: int = SIZE) -> bool:
    path = place(cache, number)
    return cache.get(path, size, size, lambda target: target.write_bytes(bytes([number % 256]) * size), keep)


def held(cache: ShardCache) -> set[int]:
    return {int(path.stem) for path in cache.folder.glob("*/*/*.mds")}


def test_the_shards_used_longest_ago_go_first(tmp_path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2):
        get(cache, number)
    assert cache.use(place(cache, 0), SIZE)
    get(cache, 3)
    assert held(cache) == {0, 2, 3}
    assert cache.size() == 3 * SIZE
    get(cache, 4, size=2 * SIZE)
    assert held(cache) == {3, 4}


def test_shards_that_are_kept_never_make_room_for_later_ones(tmp_path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2):
        get(cache, number)
    assert not get(cache, 3, keep=[place(cache, number) for number in (0, 1, 2)])
    assert held(cache) == {0, 1, 2}
    assert get(cache, 3, keep=[place(cache, 0), place(cache, 2)])
    assert held(cache) == {0, 2, 3}
    assert get(cache, 4)  # a reader has to go on; what was kept counts as used, 0 and 2 before 3
    assert 3 in held(cache)


def test_a_shard_larger_than_the_limit_is_named(tmp_path) -> None:
    with pytest.raises(VlscaleError, match=r"data\.cache_limit 50 bytes is less than 0\.mds alone needs, 100 bytes"):
        get(ShardCache(tmp_path / "cache", 50), 0)


def test_without_a_limit_nothing_goes(tmp_path) -> None:
    cache = ShardCache(tmp_path / "cache", None)
    for number in range(20):
        get(cache, number)
    assert held(cache) == set(range(20))


def test_a_failed_fetch_leaves_nothing(tmp_path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)

    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise VlscaleError("broken")

    with pytest.raises(VlscaleError, match="broken"):
        cache.get(place(cache, 0), SIZE, SIZE, fail)
    assert not list((cache.folder / "key" / "images").iterdir())


def fetch_and_hang(folder: Path, started) -> None:
    def hang(target: Path) -> None:
        target.write_bytes(b"half")
        started.set()
        time.sleep(60)

    cache = ShardCache(folder, 3 * SIZE)
    cache.get(place(cache, 0), SIZE, 2 * SIZE, hang)


def test_a_killed_process_leaves_no_lock_no_room_and_no_half_file_that_is_believed(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    started = context.Event()
    process = context.Process(target=fetch_and_hang, args=(tmp_path / "cache", started))
    process.start()
    assert started.wait(60)
    cache = ShardCache(tmp_path / "cache", 3 * SIZE)
    get(cache, 1)
    get(cache, 2)
    assert held(cache) == {2}  # the other's fetch has reserved the rest
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    get(cache, 3)
    get(cache, 4)
    assert held(cache) == {2, 3, 4}
    get(cache, 0)
    assert place(cache, 0).read_bytes() == bytes(SIZE)
    assert not list(cache.folder.glob("*/*/.part-*"))


def thrash(folder: Path, seed: int, failures) -> None:
    cache = ShardCache(folder, 5 * SIZE)
    draw = random.Random(seed)
    for _ in range(150):
        number = draw.randrange(1, 20)
        get(cache, number)
        try:
            content = place(cache, number).read_bytes()
        except FileNotFoundError:  # evicted by another process: allowed
            continue
        if content != bytes([number]) * SIZE:
            failures.put(number)
        taken = cache.size()
        if taken > 5 * SIZE:
            failures.put(f"{taken} bytes")


def test_many_processes_on_one_small_cache_stay_within_it_and_never_see_a_wrong_byte(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    failures = context.Queue()
    processes = [context.Process(target=thrash, args=(tmp_path / "cache", seed, failures)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert failures.empty()


def mapped_but_deleted(folder: Path) -> int:
    """Bytes on disk, less a page a shard, of this process's maps of shards in ``folder`` that are no longer there."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0].startswith(str(folder)) and name[0].endswith(".mds (deleted)"):
            begin, end = (int(edge, 16) for edge in place.split("-"))
            found += end - begin - 4096
    return found


def test_what_the_disk_holds_is_bounded_by_the_limit_though_one_store_idles(tmp_path) -> None:
    """Live shards and those evicted but mapped; blocks are larger than bytes by less than one page a shard."""
    root = write_large(tmp_path / "data", 800, 1 << 16, 1 << 14, feature_dim=256)
    everything = total_bytes(open_counting(root, tmp_path / "other", tmp_path / "unused"))
    limit = everything // 4
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log", limit)
    texts, images = cached.texts.reader, cached.images.reader
    for number in range(len(texts.index.shards)):
        texts.shard(number)
    for number in range(len(images.index.shards)):
        images.shard(number)
        live = list(cached.root.glob("*/*.mds"))
        taken = sum(path.stat().st_blocks * 512 - 4096 for path in live) + mapped_but_deleted(cached.root)
        assert taken <= limit, (number, taken, limit)
        assert texts._open_bytes + images._open_bytes <= limit // 2
    assert not mapped_but_deleted(cached.root)
    assert len(counted(tmp_path / "log")) >= 40
    (path,) = [images.files.path(number) for number in list(images._open)[:1]]
    path.unlink()
    assert mapped_but_deleted(cached.root)
    time.sleep(reader.LOOK_S)
    images.row(len(images) - 1)  # no other shard is mapped for that
    assert not mapped_but_deleted(cached.root)
