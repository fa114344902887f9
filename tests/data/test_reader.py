"""Rows over all shards: order, first touch, open maps, repair; and the writer that streaming lends."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xxhash

from tests.data.mixed import MIXED, equal, theirs, write_mixed
from tests.helpers import make_dataset
from vlscale.data import reader as reader_module
from vlscale.data import shard
from vlscale.data.dataset import open_dataset
from vlscale.data.index import read_index
from vlscale.data.mds import open_writer
from vlscale.data.reader import LocalFiles, MdsReader
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("mds") / "data", images=14)


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_mixed(tmp_path_factory.mktemp("mixed") / "store")


def test_many_rows_at_once_keep_their_order_across_shards(mixed) -> None:
    reader = MdsReader(read_index(mixed, MIXED), True)
    expected = theirs(mixed)
    rows = np.random.default_rng(1).integers(0, len(reader), 50)
    found = reader.arrays(rows, ["f", "a", "e"], [1, 2, 1])
    for name, views in zip(("f", "a", "e"), found, strict=True):
        assert all(equal(view, expected[row][name]) for view, row in zip(views, rows, strict=True))
        assert not any(view.flags.writeable for view in views)
    assert reader.arrays(np.empty(0, np.int64), ["f"], [1]) == [[]]


@pytest.mark.parametrize("row", [-1, 21])
def test_a_row_outside_the_store_is_an_index_error(mixed, row) -> None:
    with pytest.raises(IndexError):
        MdsReader(read_index(mixed, MIXED), True).row(row)


def test_a_flipped_byte_is_found_at_first_touch_unless_unwanted(root) -> None:
    path = root / "texts" / "shard.00001.mds"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    texts = open_dataset("a", root).texts
    rows = np.arange(texts.shard_ends[1], dtype=np.int64)
    texts.input_ids(rows)
    with pytest.raises(VlscaleError, match=r"shard\.00001\.mds: damaged: its xxh64 is"):
        texts.input_ids(rows + 1)
    open_dataset("a", root, verify=False).texts.input_ids(rows + 1)


def test_a_shard_is_hashed_once_and_a_store_without_hashes_is_named(root, monkeypatch) -> None:
    hashed = []
    real = xxhash.xxh64_hexdigest

    def counting(data) -> str:
        hashed.append(len(data))
        return real(data)

    monkeypatch.setattr(shard.xxhash, "xxh64_hexdigest", counting)
    monkeypatch.setattr(reader_module, "MAX_OPEN_BYTES", 1)
    texts = open_dataset("a", root).texts
    for _ in range(3):
        texts.input_ids(np.arange(len(texts)))
    assert len(hashed) == len(texts.shard_ends) - 1 > 1
    assert len(texts._reader._open) == 1
    index = json.loads((root / "texts" / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}
    (root / "texts" / "index.json").write_text(json.dumps(index))
    with pytest.raises(VlscaleError, match="records no xxh64"):
        open_dataset("a", root).texts.input_ids(np.array([0]))
    open_dataset("a", root, verify=False).texts.input_ids(np.array([0]))


def test_a_shard_that_shrinks_or_goes_after_opening_is_named(root) -> None:
    dataset = open_dataset("a", root)
    for path in (root / "texts").glob("*.mds"):
        path.write_bytes(path.read_bytes()[:-1])
    for path in (root / "images").glob("*.mds"):
        path.unlink()
    with pytest.raises(VlscaleError, match=r"shard\.00000\.mds: \d+ bytes, expected \d+ by index\.json"):
        dataset.texts.input_ids(np.array([0]))
    with pytest.raises(VlscaleError, match=r"shard\.00000\.mds: cannot be opened"):
        dataset.images.regions(np.array([0]), 9)


def test_a_row_larger_than_a_shard_leaves_no_empty_shard(tmp_path) -> None:
    writer = open_writer(tmp_path / "s", {"a": "ndarray:float32"}, 300)
    for _ in range(3):
        writer.write({"a": np.ones(500, np.float32)})
    writer.finish()
    index = read_index(tmp_path / "s", {"a": "ndarray:float32"})
    assert [shard.samples for shard in index.shards] == [1, 1, 1]


@pytest.mark.parametrize("size", [0, -1, 1 << 40])
def test_a_shard_size_out_of_range_is_refused(tmp_path, size) -> None:
    with pytest.raises(VlscaleError, match="shard_bytes"):
        open_writer(tmp_path / "s", {"a": "int"}, size)


def test_reading_needs_no_streaming_and_writing_says_so(source, tmp_path) -> None:
    code = (
        "import sys; sys.modules['streaming'] = None\n"
        "import numpy as np\n"
        "from vlscale.data.dataset import open_dataset\n"
        "from vlscale.data.store_writer import ClassWriter\n"
        f"d = open_dataset('a', {str(source)!r})\n"
        "d.classes.probs(d.images.regions(d.texts.lengths[:3] * 0, 9)[3])\n"
        f"with ClassWriter({str(tmp_path / 'x')!r}, 3): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "VlscaleError" in done.stderr
    assert "writing needs mosaicml-streaming" in done.stderr.splitlines()[-1]


def test_open_maps_are_bounded_by_bytes_and_the_least_recently_used_go(root, monkeypatch) -> None:
    texts = open_dataset("a", root).texts
    sizes = [shard.bytes for shard in texts.reader.index.shards]
    assert len(sizes) >= 3
    monkeypatch.setattr(reader_module, "MAX_OPEN_BYTES", sizes[0] + max(sizes[1:]))
    first = texts.reader.shard(0)
    for number in range(1, len(sizes)):
        texts.reader.shard(number)
        assert texts.reader.shard(0) is first  # used again, so it stays
        assert sum(sizes[number] for number in texts.reader._open) <= reader_module.MAX_OPEN_BYTES
    assert set(texts.reader._open) == {0, len(sizes) - 1}


class Shelf(LocalFiles):
    """Files that may go, and come back, as a cache's do."""

    def __init__(self, index, failures=0):
        super().__init__(index)
        self.failures, self.repairs, self.gone = failures, 0, set()

    def present(self, number, inode):
        return number not in self.gone

    def repair(self, number, inode):
        self.repairs += 1
        path = self.path(number)
        if self.repairs >= self.failures:
            path.write_bytes(path.with_suffix(".good").read_bytes())
        return True


@pytest.mark.parametrize(("failures", "mended"), [(1, True), (3, True), (4, False)])
def test_a_damaged_file_that_can_be_had_again_is_asked_for_a_few_times(root, failures, mended) -> None:
    index = open_dataset("a", root).texts.reader.index
    path = root / "texts" / "shard.00000.mds"
    path.with_suffix(".good").write_bytes(path.read_bytes())
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    files = Shelf(index, failures)
    reader = MdsReader(index, True, files)
    if mended:
        assert reader.row(0)["id"] == "text-0"
    else:
        with pytest.raises(VlscaleError, match="damaged"):
            reader.row(0)
    assert files.repairs == min(failures, 3)


def test_maps_of_evicted_files_are_closed_when_another_is_opened(root) -> None:
    index = open_dataset("a", root).texts.reader.index
    files = Shelf(index)
    reader = MdsReader(index, True, files)
    reader.shard(0)
    reader.shard(1)
    files.gone = {0}
    reader.shard(2)
    assert set(reader._open) == {1, 2}
    assert reader._open_bytes == index.shards[1].bytes + index.shards[2].bytes


MANY = """
import os, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import numpy as np
from vlscale.data.index import read_index
from vlscale.data.reader import MdsReader, most_open
readers = [MdsReader(read_index(Path(folder), {"a": "ndarray:int32"}), True) for folder in sys.argv[1:]]
print(sum(len(reader.index.shards) for reader in readers), most_open())
draw = np.random.default_rng(0)
kept = []
for _ in range(1500):
    number = int(draw.integers(2))
    row = int(draw.integers(len(readers[number])))
    ((view,),) = readers[number].arrays(np.array([row]), ["a"], [1])
    assert view.tolist() == [number, row]
    kept = [*kept[-5:], (view, number, row)]
    assert all(view.tolist() == [number, row] for view, number, row in kept)  # their shards may be closed by now
    assert sum(len(reader._open) for reader in readers) <= 32
del readers[0]
readers[0].row(0)
del view, kept
files = [each for each in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{each}")]
names = [os.readlink(f"/proc/self/fd/{each}") for each in files]
print(sum(name.endswith(".mds") for name in names) == len(readers[0]._open))
"""


def test_few_open_files_are_enough_for_many_shards_of_several_stores(tmp_path) -> None:
    for number in range(2):
        writer = open_writer(tmp_path / str(number), {"a": "ndarray:int32"}, 1)
        for row in range(150):
            writer.write({"a": np.array([number, row], np.int32)})
        writer.finish()
    code = [sys.executable, "-c", MANY, str(tmp_path / "0"), str(tmp_path / "1")]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["300", "32", "True"], done.stderr


def failing_open(monkeypatch, number: int, times: int) -> list[str]:
    """Let opening a shard fail ``times`` times; returns the paths that failed."""
    real, failed = os.open, []

    def fail(path, *rest, **more):
        if str(path).endswith(".mds") and len(failed) < times:
            failed.append(str(path))
            raise OSError(number, os.strerror(number))
        return real(path, *rest, **more)

    monkeypatch.setattr(shard.os, "open", fail)
    return failed


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.EMFILE, r"ulimit -n"), (errno.ENOMEM, r"vm\.max_map_count"), (errno.EACCES, r"right to read it")],
)
def test_what_fails_on_this_side_is_named_and_leaves_the_file_alone(root, monkeypatch, number, cure) -> None:
    files = Shelf(open_dataset("a", root).texts.reader.index)
    failing_open(monkeypatch, number, 10**6)
    with pytest.raises(VlscaleError, match=rf"shard\.00000\.mds: cannot be opened \(.*\); .*{cure}") as caught:
        MdsReader(files._index, True, files).row(0)
    assert files.repairs == 0
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_store_without_hashes_is_not_fetched_again(root) -> None:
    index = json.loads((root / "texts" / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}
    (root / "texts" / "index.json").write_text(json.dumps(index))
    files = Shelf(open_dataset("a", root).texts.reader.index)
    with pytest.raises(VlscaleError, match="records no xxh64"):
        MdsReader(files._index, True, files).row(0)
    assert files.repairs == 0


def test_where_no_more_files_can_be_opened_the_older_half_is_closed(root, monkeypatch) -> None:
    texts, images = open_dataset("a", root).texts.reader, open_dataset("a", root).images.reader
    monkeypatch.setattr(reader_module, "_readers", reader_module._Readers())
    texts.shard(0)
    images.shard(0)
    images.shard(1)
    texts.shard(1)
    failed = failing_open(monkeypatch, errno.EMFILE, 1)
    texts.shard(2)
    assert len(failed) == 1
    assert (set(texts._open), set(images._open)) == ({1, 2}, {1})


def test_a_shard_cut_short_while_it_is_mapped_is_named_or_fetched_again(root) -> None:
    texts = open_dataset("a", root).texts
    path = root / "texts" / "shard.00000.mds"
    good = path.read_bytes()
    path.with_suffix(".good").write_bytes(good)
    files = Shelf(texts.reader.index)
    cached = MdsReader(texts.reader.index, True, files)
    cached.row(0)
    texts.row(0)
    os.truncate(path, len(good) - 1)  # of the last page, so that without the check nothing worse than a wrong row comes
    with pytest.raises(VlscaleError, match=rf"{len(good) - 1} bytes, expected {len(good)} by index\.json; restore"):
        texts.row(0)
    assert cached.row(0)["id"] == "text-0"
    assert files.repairs == 1
    path.write_bytes(good)
    assert texts.row(0)["id"] == "text-0"
