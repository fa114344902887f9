"""Readers of the three stores: what was written comes back, and every damage is named."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from tests.data.damage import patch
from tests.helpers import make_dataset, make_vocabulary
from vlscale.data.dataset import open_dataset
from vlscale.data.index import record_side_files
from vlscale.data.store import ClassStore
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError

BOX = [[0.1, 0.2, 0.5, 0.6]]
STORES = ("texts", "images", "classes")


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


def test_what_is_written_comes_back(tmp_path) -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((3, 4)).astype(np.float32)
    boxes = np.array([[0, 0, 1, 1], [0.25, 0.5, 0.5, 1], [0, 0.1, 0.2, 0.3]], np.float32)
    with ImageWriter(tmp_path, 4, "float32", source="test") as images:
        assert images.write("x", 640, 480, features, boxes, [0.5, 0.25, 1], {"split": "train"}) == 0
        assert images.write("y", 10, 20, features[:1], BOX) == 1
    with TextWriter(tmp_path, make_vocabulary(), images.rows, tokenizer_json="{}") as texts:
        texts.write("0", "a dog", [5, 6, 7], ["x", "y"], {"answer": [1, 2]})
        texts.write("1", "", [63], ["y"])
        texts.write("2", "no image", np.array([9, 9], np.uint16))
    with ClassWriter(tmp_path, 2, "float32", ["background", "dog"]) as classes:
        classes.write(np.array([[1, 0], [0.5, 0.5], [0.25, 0.75]]))
        classes.write(np.array([[0, 1]], np.float16))

    found = open_dataset("d", tmp_path)
    row = found.images.row(0)
    assert np.array_equal(row["features"], features)
    assert np.array_equal(row["boxes"], boxes)
    assert row["conf"].tolist() == [0.5, 0.25, 1]
    assert (row["id"], row["width"], row["height"], row["extra"]) == ("x", 640, 480, {"split": "train"})
    assert found.images.row(1)["conf"].tolist() == [1]
    assert found.texts.row(0)["images"] == ["x", "y"]
    assert found.texts.row(0)["extra"] == {"answer": [1, 2]}
    assert found.texts.row(0)["text"] == "a dog"
    assert found.texts.tokenizer_path == tmp_path / "texts" / "tokenizer.json"
    assert found.classes is not None
    assert found.classes.meta.class_names == ["background", "dog"]
    assert found.classes.probs(np.array([3, 0, 2])).tolist() == [[0, 1], [1, 0], [0.25, 0.75]]
    assert (found.feature_dim, found.num_classes, len(found)) == (4, 2, 3)
    assert found.vocabulary == make_vocabulary()
    lengths = found.lengths
    assert lengths.tokens.tolist() == [3, 1, 2]
    assert lengths.image_ptr.tolist() == [0, 2, 3, 3]
    assert lengths.image_refs.tolist() == [0, 1, 1]
    assert lengths.regions.tolist() == [3, 1]
    assert lengths.text_shards.tolist() == [0, 3]
    assert lengths.name == "d"


def test_batches_equal_rows(dataset) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(dataset.texts), 25)
    ids, lengths = dataset.texts.input_ids(rows)
    assert (ids.dtype, lengths.dtype) == (np.int64, np.int32)
    expected = [dataset.texts.row(int(row))["input_ids"] for row in rows]
    assert np.array_equal(ids, np.concatenate(expected))
    assert lengths.tolist() == [len(row) for row in expected]

    rows = rng.integers(-1, len(dataset.images), 25)
    rows[3] = -1
    for limit in (1, 4, 100):
        features, boxes, counts, region_rows = dataset.images.regions(rows, limit)
        assert (features.dtype, boxes.dtype, counts.dtype) == (np.float16, np.float32, np.int32)
        assert features.shape == (counts.sum(), dataset.feature_dim)
        cut = [dataset.images.row(int(row)) for row in rows if row >= 0]
        assert np.array_equal(features, np.concatenate([image["features"][:limit] for image in cut]))
        assert np.array_equal(boxes, np.concatenate([image["boxes"][:limit] for image in cut]))
        assert counts[rows >= 0].tolist() == [min(limit, len(image["boxes"])) for image in cut]
        assert not counts[rows < 0].any()
        pointer = np.concatenate([[0], np.cumsum(dataset.images.lengths)])
        own = [pointer[row] + np.arange(count) for row, count in zip(rows, counts, strict=True) if row >= 0]
        assert np.array_equal(region_rows, np.concatenate(own))
        probs = dataset.classes.probs(region_rows)
        assert probs.dtype == np.float16
        expected = [dataset.classes.row(int(row))["probs"] for row in region_rows]
        assert np.array_equal(probs, np.array(expected))


def test_nothing_asked_nothing_read(dataset) -> None:
    none = np.empty(0, np.int64)
    ids, lengths = dataset.texts.input_ids(none)
    assert (ids.shape, ids.dtype, lengths.shape) == ((0,), np.int64, (0,))
    for rows in (none, np.array([-1, -1])):
        features, boxes, counts, region_rows = dataset.images.regions(rows, 3)
        assert features.shape == (0, dataset.feature_dim)
        assert boxes.shape == (0, 4)
        assert counts.tolist() == [0] * len(rows)
        assert region_rows.shape == (0,)
    assert dataset.classes.probs(none).shape == (0, dataset.num_classes)


def test_empty_stores_are_stores(tmp_path) -> None:
    """A corpus of texts alone has an images store without rows."""
    with ImageWriter(tmp_path, 4) as images:
        pass
    with TextWriter(tmp_path, make_vocabulary(), images.rows) as texts:
        texts.write("0", "alone", [5, 6])
    before = open_dataset("d", tmp_path).fingerprint
    with ClassWriter(tmp_path, 3):
        pass
    found = open_dataset("d", tmp_path)
    assert (found.num_classes, len(found.images), found.lengths.image_ptr.tolist()) == (3, 0, [0, 0])
    assert found.fingerprint != before
    assert found.images.regions(np.array([-1]), 5)[0].shape == (0, 4)


def test_packed_arrays_may_be_written_to(dataset) -> None:
    """Masking writes into the batch; the store must not change and not refuse."""
    for _ in range(2):
        features, boxes, *_ = dataset.images.regions(np.array([0]), 5)
        ids, _ = dataset.texts.input_ids(np.array([0]))
        assert ids[0] != 4
        assert features[0].any()
        ids[0], features[0], boxes[0] = 4, 0, 0


@pytest.mark.parametrize("row", [-1, 10_000])
def test_rows_outside_a_store_are_index_errors(dataset, row) -> None:
    with pytest.raises(IndexError):
        dataset.texts.input_ids(np.array([row]))
    with pytest.raises(IndexError):
        dataset.classes.probs(np.array([row]))


class Batches(TorchDataset):
    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        rows = np.arange(index, 10 + index)
        features, *_, region_rows = self.dataset.images.regions(rows % len(self.dataset.images), 7)
        return self.dataset.texts.input_ids(rows)[0], features, self.dataset.classes.probs(region_rows)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same(source, start) -> None:
    batches = Batches(open_dataset("small", source))
    expected = [batches[index] for index in range(len(batches))]  # the shards are open before the workers start
    loader = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=60)
    for found, wanted in zip(loader, expected, strict=True):
        assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_pickle_holds_no_data(source) -> None:
    dataset = open_dataset("small", source)
    before = dataset.lengths, dataset.fingerprint, dataset.images.regions(np.array([2]), 9)
    small = pickle.dumps(dataset)
    assert len(small) < 6000
    assert b"memmap" not in small
    again = pickle.loads(small)
    assert again.fingerprint == before[1]
    assert np.array_equal(again.lengths.tokens, before[0].tokens)
    assert np.array_equal(again.images.regions(np.array([2]), 9)[0], before[2][0])


def test_the_fingerprint_follows_content_not_name_or_place(source, root) -> None:
    before = open_dataset("small", source).fingerprint
    assert len(before) == 64
    assert open_dataset("other", root, verify=False).fingerprint == before
    other = make_dataset(root.parent / "other", texts_without_image=2, seed=1)
    assert open_dataset("small", other).fingerprint != before
    for part, name in (("texts", "image_refs"), ("texts", "lengths"), ("images", "lengths")):
        path = root / part / f"{name}.npy"
        good = np.load(path)
        changed = good.copy()
        changed[:2] = changed[1::-1] if changed[0] != changed[1] else [1, 2]
        np.save(path, changed)
        assert open_dataset("small", root, verify=False).fingerprint != before, name
        np.save(path, good)
    assert open_dataset("small", root).fingerprint == before
    path = root / "texts" / "meta.json"
    meta = json.loads(path.read_text())
    meta["vocabulary"]["random_range"] = [6, 64]
    path.write_text(json.dumps(meta))
    record_side_files(path.parent)
    assert open_dataset("small", root).fingerprint != before
    shutil.rmtree(root / "classes")
    without = open_dataset("small", root)
    assert (without.classes, without.num_classes) == (None, None)


def side(root, name, edit) -> None:
    array = np.load(root / name)
    np.save(root / name, edit(array))


def put(index, value):
    def edit(array):
        array[index] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("texts/lengths.npy", put(4, 0), r"text row 4 has 0 tokens, expected at least 1"),
        ("images/lengths.npy", put(3, 0), r"image row 3 has 0 regions, expected at least 1"),
        ("texts/lengths.npy", lambda a: a[:-1], "entries, expected 38"),
        ("texts/lengths.npy", lambda a: a.astype(np.int64), "expected one dimension of int32"),
        ("texts/image_refs.npy", put(7, 12), r"text row 6 refers to image row 12, but images/ has 12 rows"),
        ("texts/image_refs.npy", put(0, -1), r"text row 0 refers to image row -1"),
        ("texts/image_refs.npy", lambda a: a[:-1], r"image_ptr.npy: does not rise from 0 to the \d+ entries"),
        ("texts/image_ptr.npy", put(2, 1_000), "image_ptr.npy: does not rise"),
        ("texts/image_ptr.npy", put(0, 1), "image_ptr.npy: does not rise"),
        ("texts/image_ptr.npy", lambda a: a[1:], "entries, expected 39"),
        ("images/lengths.npy", put(0, 50), r"classes: \d+ rows, but the images have \d+ regions"),
    ],
)
def test_side_files_that_do_not_fit_are_named(root, name, edit, message) -> None:
    side(root, name, edit)
    with pytest.raises(VlscaleError, match=message):
        open_dataset("small", root)


def test_a_dataset_without_a_store_is_named(root) -> None:
    shutil.rmtree(root / "images")
    with pytest.raises(VlscaleError, match="images is no folder, but texts refer to images"):
        open_dataset("small", root)
    shutil.rmtree(root / "texts")
    with pytest.raises(VlscaleError, match=r"dataset small: .*texts is no folder, nor is images"):
        open_dataset("small", root)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        *((part, name) for part in STORES for name in ("meta.json", "index.json", "shard.00000.mds")),
        *((part, "lengths.npy") for part in ("texts", "images")),
        *(("texts", name) for name in ("image_refs.npy", "image_ptr.npy")),
    ],
)
def test_each_missing_file_is_named(root, part, name) -> None:
    (root / part / name).unlink()
    with pytest.raises(VlscaleError, match=rf"{part}/{name}.* is missing"):
        open_dataset("small", root)


def test_lengths_that_lie_about_a_row_are_found_when_it_is_read(root) -> None:
    side(root, "texts/lengths.npy", put(5, 60))
    side(root, "images/lengths.npy", lambda a: put([0, 1], [a[0] + 1, a[1] - 1])(a))
    dataset = open_dataset("small", root, verify=False)
    with pytest.raises(VlscaleError, match=r"texts: row 5: \d+ tokens, but lengths.npy says 60"):
        dataset.texts.input_ids(np.array([3, 5]))
    with pytest.raises(VlscaleError, match=r"images: row 1: boxes \[\d, 4\], expected \[\d, 4\] by lengths.npy"):
        dataset.images.regions(np.array([4, 1]), 5)


def test_a_feature_width_other_than_meta_is_named(root) -> None:
    path = root / "images" / "meta.json"
    path.write_text(path.read_text().replace('"feature_dim": 8', '"feature_dim": 16'))
    with pytest.raises(
        VlscaleError, match=r"row 2: features \[\d, 8\].*expected \[\d, 16\].*meta.json \(feature_dim\)"
    ):
        open_dataset("small", root, verify=False).images.regions(np.array([2]), 5)


@pytest.mark.parametrize(
    "name",
    ["texts/lengths.npy", "texts/image_refs.npy", "texts/image_ptr.npy", "images/lengths.npy", "images/meta.json"],
)
def test_a_flipped_bit_beside_the_shards_is_found_when_the_dataset_is_opened(root, name) -> None:
    """A reference to the next image is as well formed as the right one; only its hash tells."""
    path = root / name
    content = bytearray(path.read_bytes())
    place = content.rindex(b'"source": ""') + 11 if name.endswith("json") else len(content) - 8
    content[place:place] = b"x" if name.endswith("json") else b""
    if not name.endswith("json"):
        content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(VlscaleError, match=rf"{name}: |classes: \d+ rows, but the images") as error:
        open_dataset("small", root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "old", "new", "column"),
    [
        ("images", '"float16"', '"float32"', "features"),
        ("classes", '"float16"', '"float32"', "probs"),
        ("classes", '"num_classes": 7', '"num_classes": 8', "probs"),
    ],
)
def test_a_meta_that_contradicts_the_index_is_named(root, part, old, new, column) -> None:
    path = root / part / "meta.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(VlscaleError, match=f"column '{column}' has the encoding .*, expected .* meta.json"):
        open_dataset("small", root)


HALF = {"nan": np.float16("nan").tobytes(), "inf": np.float16("inf").tobytes(), "negative": np.float16(-0.5).tobytes()}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_features_that_are_not_finite_name_their_row(root, value) -> None:
    patch(root / "images", open_dataset("small", root).images._reader, 5, "features", -2, HALF[value])
    images = open_dataset("small", root).images
    images.regions(np.array([4, 6]), 9)
    images.regions(np.array([5]), int(images.lengths[5]) - 1)  # the bad region is not used
    with pytest.raises(VlscaleError, match=r"images: row 5: features contain NaN or infinity"):
        images.regions(np.array([4, -1, 6, 5, 7]), 9)


@pytest.mark.parametrize("corner", [(0, -0.1), (2, 1.5), (3, float("nan")), (0, 1.0), (3, 0.0), (1, float("-inf"))])
def test_boxes_that_are_not_boxes_name_their_row(root, corner) -> None:
    place, value = corner
    at = -16 + 4 * place  # the last region
    reader = open_dataset("small", root).images._reader
    patch(root / "images", reader, 9, "boxes", at, np.float32(value).tobytes())
    with pytest.raises(VlscaleError, match=r"images: row 9: box \[.*\] is not x1 < x2, y1 < y2 inside 0..1"):
        open_dataset("small", root).images.regions(np.array([0, 9, 1]), 9)


@pytest.mark.parametrize("value", HALF)
def test_probabilities_that_are_none_name_their_row(root, value) -> None:
    patch(root / "classes", ClassStore(root / "classes")._reader, 11, "probs", 4, HALF[value])
    classes = ClassStore(root / "classes")
    classes.probs(np.array([10, 12]))
    with pytest.raises(VlscaleError, match=r"classes: row 11: probabilities are NaN or outside 0..1"):
        classes.probs(np.array([10, 11]))


@pytest.mark.parametrize("token", [-1, 64, 2**31 - 1])
def test_a_token_outside_the_vocabulary_names_its_row(root, token) -> None:
    patch(root / "texts", open_dataset("small", root).texts._reader, 7, "input_ids", -4, np.int32(token).tobytes())
    with pytest.raises(VlscaleError, match=rf"texts: row 7: token id {token} is outside the vocabulary of 64"):
        open_dataset("small", root).texts.input_ids(np.array([1, 7, 2]))
