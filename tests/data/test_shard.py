"""One shard: against mosaicml-streaming's reader, and against damage."""

from __future__ import annotations

import contextlib
import random
import shutil
import time

import numpy as np
import pytest

from tests.data.damage import patch, rewrite
from tests.data.mixed import MIXED, equal, theirs, write_mixed
from tests.helpers import make_dataset
from vlscale.data.dataset import open_dataset
from vlscale.data.index import read_index
from vlscale.data.mds import open_writer
from vlscale.data.reader import MdsReader
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


def test_rows_equal_those_of_streaming(mixed, source) -> None:
    assert len(list(mixed.glob("*.mds"))) > 3
    readers = [(mixed, MdsReader(read_index(mixed, MIXED), True))]
    dataset = open_dataset("a", source)
    readers += [(source / name, getattr(dataset, name)._reader) for name in ("texts", "images", "classes")]
    for folder, reader in readers:
        expected = theirs(folder)
        assert len(reader) == len(expected)
        for row, values in enumerate(expected):
            found = reader.row(row)
            assert found.keys() == values.keys()
            assert all(equal(found[name], values[name]) for name in values), (folder, row)


def test_an_array_of_other_dimensions_names_shard_row_and_column(mixed) -> None:
    reader = MdsReader(read_index(mixed, MIXED), True)
    with pytest.raises(VlscaleError, match=r"shard\.00000\.mds: row 1 .*column 'f' is not an array of 2 dimensions"):
        reader.arrays(np.array([1]), ["f"], [2])


def words(*values: int) -> bytes:
    return np.array(values, "<u4").tobytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.__setitem__(slice(0, 4), words(1)), "holds 1 rows, expected"),
        (lambda c: c.__setitem__(slice(4, 8), words(0)), "offsets do not rise"),
        (lambda c: c.__setitem__(slice(8, 12), c[4:8]), "offsets do not rise"),
        (lambda c: c.__setitem__(slice(8, 12), words(2**32 - 1)), "offsets do not rise"),
        (lambda c: c.extend(b"more"), "offsets do not rise"),
        (lambda c: c.__delitem__(slice(-4, None)), "offsets do not rise"),
    ],
)
def test_a_header_that_lies_is_refused(root, edit, message) -> None:
    rewrite(root / "images", 0, edit)
    with pytest.raises(VlscaleError, match=rf"shard\.00000\.mds: .*{message}"):
        open_dataset("a", root).images.regions(np.array([0]), 9)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, bytes([2 << 2 | 3]), "does not fit its bytes"),
        (0, bytes([1 << 2]), "is not an array of 2 dimensions"),
        (0, bytes([3 << 2]), "is not an array of 2 dimensions"),
        (0, bytes([2 << 2 | 1]), "does not fit its bytes"),
        (1, b"\0", "does not fit its bytes"),
        (1, b"\xff", "does not fit its bytes"),
        (2, b"\x01", "does not fit its bytes"),
    ],
)
def test_an_array_header_that_lies_is_refused(root, at, value, message) -> None:
    images = open_dataset("a", root).images
    patch(root / "images", images._reader, 3, "features", at, value)
    with pytest.raises(VlscaleError, match=rf"row \d+ of the shard column 'features' .*{message}"):
        open_dataset("a", root).images.regions(np.array([3]), 9)


def test_dimensions_whose_product_overflows_are_refused(tmp_path) -> None:
    writer = open_writer(tmp_path / "s", {"a": "ndarray:float16"}, 1 << 20)
    writer.write({"a": np.ones((1, 16), np.float16)})  # 3 + 32 bytes; as uint64 dimensions: 17 + 18
    writer.finish()
    reader = MdsReader(read_index(tmp_path / "s", {"a": "ndarray:float16"}), True)
    for dimensions in ((2**63, 2), (2**32, 2**32), (2**64 - 1, 2**64 - 1), (9, 2**64 // 9), (2, 4)):
        head = bytes([2 << 2 | 3]) + np.array(dimensions, "<u8").tobytes()
        patch(tmp_path / "s", reader, 0, "a", 0, head)
        damaged = MdsReader(read_index(tmp_path / "s", {"a": "ndarray:float16"}), True)
        with pytest.raises(VlscaleError, match="does not fit its bytes"):
            damaged.arrays(np.array([0]), ["a"], [2])
    patch(tmp_path / "s", reader, 0, "a", 0, bytes([2 << 2 | 3]) + np.array((3, 3), "<u8").tobytes())
    (views,) = MdsReader(read_index(tmp_path / "s", {"a": "ndarray:float16"}), True).arrays(np.array([0]), ["a"], [2])
    assert views[0].shape == (3, 3)


def test_text_that_is_not_text_and_json_that_is_not_json_are_refused(root) -> None:
    texts = open_dataset("a", root).texts
    patch(root / "texts", texts._reader, 0, "text", 0, b"\xff")
    patch(root / "texts", texts._reader, 1, "extra", 0, b"[")
    damaged = open_dataset("a", root).texts
    with pytest.raises(VlscaleError, match="column 'text' is not valid str"):
        damaged.row(0)
    with pytest.raises(VlscaleError, match="column 'extra' is not valid json"):
        damaged.row(1)


READ = {
    "texts": lambda store, rows: store.input_ids(rows),
    "images": lambda store, rows: store.regions(rows, 5),
    "classes": lambda store, rows: store.probs(rows),
}


@pytest.mark.parametrize("store", READ)
def test_random_damage_of_a_shard_is_an_error_or_harmless(root, store) -> None:
    """With hashes off, any bytes may come: VlscaleError is the only exception, and nothing crashes."""
    folder = root / store
    path = folder / "shard.00000.mds"
    good = path.read_bytes()
    rng = random.Random(3)
    refused = 0
    for trial in range(250):
        damaged = bytearray(good)
        # The first half aims at the counts, offsets and row headers, the rest at anything.
        reach = 64 if trial < 125 else len(damaged)
        for _ in range(rng.choice((1, 2, 9))):
            damaged[rng.randrange(reach)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        opened = getattr(open_dataset("a", root, verify=False), store)
        rows = np.arange(opened._reader.ends[1])
        try:
            READ[store](opened, rows)
        except VlscaleError:
            refused += 1
        with contextlib.suppress(VlscaleError):
            for row in rows.tolist():
                opened.row(row)
    assert refused > 60


def test_packed_ids_are_faster_than_rows_one_by_one(source) -> None:
    """A ratio, with a wide margin: the hot path must not decode row by row."""
    texts = open_dataset("a", source).texts
    rows = np.random.default_rng(0).integers(0, len(texts), 512)

    def seconds(read) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            read()
            times.append(time.perf_counter() - begin)
        return min(times)

    one_by_one = seconds(lambda: [texts.row(int(row))["input_ids"] for row in rows])
    assert seconds(lambda: texts.input_ids(rows)) * 4 < one_by_one


def test_values_are_gathered_from_any_byte(tmp_path):
    root = make_dataset(tmp_path / "d")
    store = open_dataset("a", root).images
    shard = store.reader.shard(0)
    rows = np.arange(len(shard.offsets) - 1)
    (starts, shapes), (box_starts, box_shapes) = shard.shapes(rows, ["features", "boxes"], [2, 2])
    views, boxes = shard.arrays(rows, ["features", "boxes"], [2, 2])
    assert shapes.tolist() == [list(view.shape) for view in views]
    assert box_shapes[:, 1].tolist() == [4] * len(rows)
    assert shard.elements(starts, np.dtype("<f2")).tolist() == [view[0, 0] for view in views]
    assert {int(start) % 2 for start in box_starts} == {0, 1}  # aligned and not
    first = shard.elements(box_starts, np.dtype("V16")).view(np.float32).reshape(-1, 4)
    assert np.array_equal(first, [box[0] for box in boxes])
    last = len(shard.bytes) - 4
    assert shard.elements(np.array([last]), np.dtype("<u4")).tobytes() == shard.bytes[last:].tobytes()
    with pytest.raises(IndexError):
        shard.elements(np.array([last + 1]), np.dtype("<u4"))
