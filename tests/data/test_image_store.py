"""Reading regions straight to their place: checks, codecs, counters, and side files of any length."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest

from tests.data.damage import patch
from tests.helpers import make_dataset
from vlscale.data import chunks, store_base
from vlscale.data.dataset import open_dataset
from vlscale.data.image_store import ImageStore
from vlscale.data.offsets import Offsets
from vlscale.data.store_writer import ImageWriter
from vlscale.errors import VlscaleError

BOX = [[0.1, 0.2, 0.5, 0.6]]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("store") / "data", texts_without_image=2)


@pytest.fixture
def root(source, tmp_path):
    """A private copy that may be damaged."""
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture(scope="module")
def dataset(source):
    return open_dataset("small", source)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_offsets_are_the_running_sum(count) -> None:
    lengths = np.random.default_rng(count).integers(0, 100, count).astype(np.int32)
    whole = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    offsets = Offsets(lengths)
    assert (len(offsets), offsets.total) == (count + 1, whole[-1])
    assert np.array_equal(offsets[:], whole)
    assert np.array_equal(offsets[np.array([[0, count], [count, 0]])], whole[[[0, count], [count, 0]]])
    for outside in (-1, count + 1):
        with pytest.raises(IndexError):
            offsets[np.array([0, outside])]


def test_offsets_of_several_chunks(monkeypatch) -> None:
    monkeypatch.setattr("vlscale.data.offsets.CHUNK", 128)
    lengths = np.arange(1000, dtype=np.int32)
    assert np.array_equal(Offsets(lengths)[1:], np.cumsum(lengths))


@pytest.mark.parametrize(("at", "value"), [(700, 0), (99, -3)])
def test_checks_at_opening_look_at_every_chunk(monkeypatch, tmp_path, at, value) -> None:
    monkeypatch.setattr(store_base, "slices", partial(chunks.slices, size=100))
    lengths = np.ones(800, np.int32)
    store_base.check_lengths(tmp_path, lengths, "text", "tokens")
    lengths[at] = value
    with pytest.raises(VlscaleError, match=f"text row {at} has {value} tokens"):
        store_base.check_lengths(tmp_path, lengths, "text", "tokens")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_value_that_is_not_finite_is_found_and_no_other(tmp_path, dtype) -> None:
    """All bit patterns of float16, and those around the edges of float32."""
    if dtype == "float16":
        values = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    else:
        edges = np.array([0, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x80000000, 0xFF7FFFFF], np.uint32)
        values = np.concatenate([edges, np.array([0xFF800000, 0xFF800001, 0xFFFFFFFF], np.uint32)]).view(np.float32)
    with ImageWriter(tmp_path, 1, dtype, codec="none") as images:
        images.write("x", 1, 1, np.ones((1, 1)), BOX)
    store = ImageStore(tmp_path / "images")
    for value in values:
        raw = np.full(40, 1.5, dtype)
        raw[17] = value
        if np.isfinite(value):
            store._check_finite(0, raw.view(np.uint8))
        else:
            with pytest.raises(VlscaleError, match="row 0: features contain NaN or infinity"):
                store._check_finite(0, raw.view(np.uint8))


def test_bytes_read_are_counted(source) -> None:
    dataset = open_dataset("small", source)
    rows = np.array([0, 3, 3, -1])
    features, boxes, _, region_rows = dataset.images.regions(rows, 4)
    assert dataset.images.bytes_read == features.nbytes + boxes.nbytes
    assert dataset.classes.bytes_read == 0
    probs = dataset.classes.probs(region_rows[::2])
    assert dataset.classes.bytes_read == probs.nbytes
    ids, _ = dataset.texts.input_ids(np.arange(3))
    assert dataset.texts.bytes_read == 4 * len(ids)


def test_rows_are_written_where_the_caller_says(dataset) -> None:
    rows = np.array([5, -1, 0, 5])
    counts = dataset.images.counts_of(rows, 3)
    total = int(counts.sum())
    memory = np.full((total + 2, 8), -7, np.float16)
    boxes = np.full((total + 2, 4), -7, np.float32)
    dataset.images.write_regions(rows, counts, memory[1:-1], boxes[1:-1])
    expected = dataset.images.regions(rows, 3)
    assert np.array_equal(memory[1:-1], expected[0])
    assert np.array_equal(boxes[1:-1], expected[1])
    assert (memory[[0, -1]] == -7).all()
    assert (boxes[[0, -1]] == -7).all()
    texts = np.array([3, 20, 3])
    ids, lengths = dataset.texts.input_ids(texts)
    spaced = np.full(lengths.sum() + 6, -7)
    places = np.cumsum(lengths + 2) - (lengths + 1)
    dataset.texts.write_ids(texts, spaced, places)
    assert np.array_equal(spaced[spaced != -7], ids)
    assert spaced[places - 1].tolist() == [-7] * 3


@pytest.mark.parametrize("codec", ["lossless", "uint8"])
def test_coded_features_are_decoded_to_their_place(source, tmp_path, codec) -> None:
    plain = open_dataset("small", source)
    coded = open_dataset("small", make_dataset(tmp_path / "coded", images=12, codec=codec))
    rows = np.array([5, -1, 0, 5, 11])
    for limit in (1, 4, 100):
        (one, *rest), (two, *others) = plain.images.regions(rows, limit), coded.images.regions(rows, limit)
        assert one.dtype == two.dtype
        assert np.array_equal(one, two) if codec == "lossless" else np.abs(one - two).max() < 0.02
        for mine, theirs in zip(rest, others, strict=True):
            assert np.array_equal(mine, theirs)
    row = coded.images.row(5)
    assert np.array_equal(row["features"], coded.images.regions(np.array([5]), 100)[0])
    assert np.array_equal(row["boxes"], plain.images.row(5)["boxes"])


def test_damaged_coded_features_name_their_row(tmp_path) -> None:
    root = make_dataset(tmp_path / "data", images=12, codec="lossless")
    index = json.loads((root / "images" / "index.json").read_text())
    assert "vlscale_features:lossless:float16" in index["shards"][0]["column_encodings"]
    reader = open_dataset("small", root).images.reader
    patch(root / "images", reader, 9, "features", 0, b"\xff")
    damaged = open_dataset("small", root).images
    with pytest.raises(VlscaleError, match=r"row 9: features cannot be decoded \(version 255 .* as \d+ regions"):
        damaged.regions(np.array([9]), 2)
    with pytest.raises(VlscaleError, match="column 'features' cannot be decoded"):
        damaged.row(9)
