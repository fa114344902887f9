"""build_retrieval: against plain NumPy; originals are never candidates; shares, kills, and bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from data_tools import build_retrieval
from data_tools.build_retrieval import run
from data_tools.retrieval import vectors
from data_tools.retrieval.detected import Detections
from data_tools.rewriting import building
from data_tools.rewriting.replacing import normalised
from tests.data_tools.retrieval_data import SCENES, WIDTH, captions_of, features_of, objects_of, tf_idf, write
from tests.data_tools.toy_sources import tree
from tests.helpers import make_vocabulary
from vlscale.data.companions import RetrievedStore, open_companion
from vlscale.data.store import ImageStore, TextStore
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def root(pairs, tmp_path):
    return shutil.copytree(pairs, tmp_path / "pairs")


def test_images_are_the_most_similar_of_those_whose_classes_overlap(root) -> None:
    report = run([str(root), "-k", "5", "--no-texts", "--overlap", "0.5"])
    store, vectors_, objects = RetrievedStore(root / "retrieved"), features_of(root), objects_of(root)
    cosines, shorter = vectors_ @ vectors_.T, 0
    for row in range(2 * SCENES):
        scene = row // 2
        overlap = np.asarray([len(objects[scene] & each) / len(objects[scene] | each) for each in objects])
        allowed = [one for one in np.argsort(-cosines[scene], kind="stable") if overlap[one] >= 0.5 and one != scene]
        assert store.images_of(row).tolist() == allowed[:5]
        np.testing.assert_allclose(
            store.row(row)["image_scores"][: len(allowed[:5])], cosines[scene][allowed[:5]], atol=1e-3
        )
        shorter += len(allowed) < 5
    assert store.images_of(2 * SCENES).tolist() == []
    assert shorter > 0
    assert report["told"]["images: shorter lists than asked for"] == shorter + 1
    assert report["told"]["images: texts that have no image"] == 1
    assert report["told"]["images: empty lists"] >= 1
    assert store.meta.text_collection is None
    assert store.meta.image_collection.digest == ImageStore(root / "images").reader.index.digest
    assert store.meta.image_collection.rows == SCENES


def test_lists_are_filled_up_on_request_and_classes_may_not_count(root, tmp_path) -> None:
    twin = shutil.copytree(root, tmp_path / "twin")
    report = run([str(root), "-k", "7", "--no-texts", "--fill", "--overlap-of", "share", "--overlap", "1"])
    run([str(twin), "-k", "7", "--no-texts", "--overlap", "0"])
    objects, cosines, filled = objects_of(root), features_of(root) @ features_of(root).T, 0
    for row in range(2 * SCENES):
        scene = row // 2
        order = [one for one in np.argsort(-cosines[scene], kind="stable") if one != scene]
        every = [one for one in order if objects[scene] <= objects[one]]
        expected = [*every, *(one for one in order if one not in every)][:7]
        assert RetrievedStore(root / "retrieved").images_of(row).tolist() == expected
        assert RetrievedStore(twin / "retrieved").images_of(row).tolist() == order[:7]
        filled += max(0, 7 - len(every))
    assert report["told"]["images: candidates that fill up lists"] == filled > 0


def test_texts_are_the_nearest_by_tf_idf_and_never_the_original(root) -> None:
    report = run([str(root), "-k", "6", "--no-images"])
    store, captions = RetrievedStore(root / "retrieved"), captions_of(root)
    cosines = tf_idf(captions, captions)
    for row, text in enumerate(captions):
        own = [
            other
            for other, theirs in enumerate(captions)
            if normalised(theirs) == normalised(text) or (other // 2 == row // 2 and max(row, other) < 2 * SCENES)
        ]
        found = store.texts_of(row)
        assert not set(found) & set(own)
        store.check_original("texts", row, found, np.asarray(own))
        allowed = np.setdiff1d(np.flatnonzero(cosines[row] > 0), own)
        best = np.sort(cosines[row][allowed])[::-1][:6]
        np.testing.assert_allclose(cosines[row][found], best, atol=1e-5)
        np.testing.assert_allclose(store.row(row)["text_scores"][: len(best)], best, atol=1e-5)
    assert len(captions) > len({normalised(text) for text in captions})  # some stand twice
    assert report["told"]["texts: candidates"] == store.text_counts.sum()
    assert store.meta.image_collection is None


def test_other_collections_share_ids_and_texts_with_the_pairs(root, tmp_path) -> None:
    images = write(tmp_path / "images", 25, seed=3, prefix="i", texts=False)  # the same ids: the same images
    texts = write(tmp_path / "texts", 30, seed=20, prefix="other")
    report = run([str(root), "--images", str(images), "--texts", str(texts), "-k", "10", "--overlap", "0"])
    store = open_companion(RetrievedStore, root / "retrieved", TextStore(root / "texts"))
    assert store is not None
    assert store.meta.image_collection.digest == ImageStore(images / "images").reader.index.digest
    assert store.meta.text_collection.digest == TextStore(texts / "texts").reader.index.digest
    cosines, theirs = features_of(root) @ features_of(images).T, captions_of(texts)
    others = tf_idf(theirs, captions_of(root))
    for row, text in enumerate(captions_of(root)[:-1]):
        order = [one for one in np.argsort(-cosines[row // 2], kind="stable") if one != row // 2]
        assert store.images_of(row).tolist() == order[:10]
        found = store.texts_of(row)
        assert normalised(text) not in {normalised(theirs[one]) for one in found}
        allowed = [one for one in np.flatnonzero(others[row] > 0) if normalised(theirs[one]) != normalised(text)]
        np.testing.assert_allclose(others[row][found], np.sort(others[row][allowed])[::-1][:10], atol=1e-5)
    assert report["rows"] == 2 * SCENES + 1


def test_given_embeddings_replace_tf_idf(root, tmp_path) -> None:
    rng, rows = np.random.default_rng(1), 2 * SCENES + 1
    embeddings = rng.standard_normal((rows, 5)).astype(np.float32)
    embeddings[3] = 0
    np.save(tmp_path / "e.npy", embeddings)
    given = ["--text-embeddings", str(tmp_path / "e.npy"), "--caption-embeddings", str(tmp_path / "e.npy")]
    run([str(root), "--no-images", "-k", "4", *given])
    store, captions = RetrievedStore(root / "retrieved"), captions_of(root)
    units = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    for row in (0, 1, 7, 30, 79):
        own = [
            one for one in range(rows) if one // 2 == row // 2 or normalised(captions[one]) == normalised(captions[row])
        ]
        order = [one for one in np.argsort(-(units @ units[row]), kind="stable") if one not in own]
        assert store.texts_of(row).tolist() == order[:4]


def test_more_candidates_than_there_are_give_all_and_are_counted(root) -> None:
    report = run([str(root), "-k", "1000", "--overlap", "0"])
    store = RetrievedStore(root / "retrieved")
    for row in range(2 * SCENES):
        assert sorted(store.images_of(row)) == [one for one in range(SCENES) if one != row // 2]
    assert report["told"]["images: shorter lists than asked for"] == 2 * SCENES + 1
    assert report["told"]["texts: shorter lists than asked for"] == 2 * SCENES + 1


def test_shares_processes_and_kills_change_no_byte(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(building, "PART_ROWS", 16)
    monkeypatch.setattr(build_retrieval, "PART_ROWS", 16)
    twin = shutil.copytree(root, tmp_path / "twin")
    run([str(root), "-k", "8"])
    for share in ("1/2", "0/2"):
        done = run([str(twin), "-k", "8", "--shard", share])
        assert done is None
    assert not (twin / ".parts" / "retrieved-00001").exists()  # share 1 had to wait for the other
    with pytest.raises(VlscaleError, match="not built yet"):
        run([str(twin), "-k", "8", "--merge"])
    with pytest.raises(VlscaleError, match="k was 8, now 9"):
        run([str(twin), "-k", "9", "--shard", "1/2"])
    left = twin / ".parts" / ".retrieved-00001.tmp-somewhere-1"
    left.mkdir()
    (left / "half").write_text("a killed process wrote this")
    assert run([str(twin), "-k", "8", "--shard", "1/2", "--workers", "2"]) is None
    run([str(twin), "-k", "8", "--merge"])
    assert tree(root / "retrieved") == tree(twin / "retrieved")
    assert not (twin / ".parts").exists()
    with pytest.raises(VlscaleError, match="exists already"):
        run([str(twin), "-k", "8"])


def test_an_inverted_file_that_is_searched_whole_finds_the_same(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(vectors, "_TRAINING_PER_LIST", 8)
    twin, third = (shutil.copytree(root, tmp_path / name) for name in ("twin", "third"))
    options = ["-k", "5", "--no-texts", "--pool", "30"]
    run([str(root), *options])
    for folder in (twin, third):
        run([str(folder), *options, "--index", "ivf", "--probes", "1000"])
    exact, inverted = (RetrievedStore(folder / "retrieved") for folder in (root, twin))
    for row in range(2 * SCENES):
        assert exact.images_of(row).tolist() == inverted.images_of(row).tolist()
    assert tree(twin / "retrieved") == tree(third / "retrieved")


def test_a_large_inverted_file_is_projected_and_still_finds_most(tmp_path) -> None:
    rng = np.random.default_rng(0)
    found = vectors.normalise(rng.standard_normal((3000, 8)) @ rng.standard_normal((8, 300)))
    vectors.build_index(found, tmp_path / "large.faiss")
    index = vectors.VectorIndex(found, tmp_path / "large.faiss", 16)
    exact = vectors.VectorIndex(found, None, 1)
    same = [
        len(set(one[0]) & set(other[0])) / 20
        for one, other in zip(index.nearest(found[:50], 20), exact.nearest(found[:50], 20), strict=True)
    ]
    assert np.mean(same) > 0.8


def test_classes_of_a_detector_count_where_extra_tells_none(tmp_path) -> None:
    root = write(tmp_path / "data", 12, field=None)
    with pytest.raises(VlscaleError, match=r"no detected classes are known.*--classes-from"):
        run([str(root), "-k", "3"])
    images, rng = ImageStore(root / "images"), np.random.default_rng(2)
    best = rng.integers(0, 3, images.region_ptr.total)
    with ClassWriter(root, 4, class_names=["dog", "cat", "bus", "unsure"]) as writer:
        for one in best:
            writer.write(np.eye(4)[[one]] * 0.6 + 0.1)
    run([str(root), "-k", "3", "--no-texts", "--overlap", "1"])
    store, ptr = RetrievedStore(root / "retrieved"), images.region_ptr
    sets = [set(best[ptr[row] : ptr[row + 1]].tolist()) for row in range(12)]
    assert sum(store.image_counts) > 0
    for row in range(24):
        assert all(sets[one] == sets[row // 2] for one in store.images_of(row))


def test_names_come_before_numbers_and_numbers_are_not_taken_for_names(tmp_path) -> None:
    with ImageWriter(tmp_path, 2, codec="none") as images:
        for name, objects in (("a", [3, 0, None, True]), ("b", None), ("c", [3, 3])):
            boxes = np.tile([0, 0, 1, 1], (2, 1))
            images.write(name, 9, 9, np.ones((2, 2)), boxes, np.ones(2), {"objects": objects, "things": ["x", None]})
    numbers, names = Detections(tmp_path).open(), Detections(tmp_path, "things").open()
    assert numbers.known and not numbers.named  # noqa: PT018
    assert numbers.classes([0, 1, 2]) == [["0", "3"], [], ["3"]]
    assert names.named and names.classes([1]) == [["x"]]  # noqa: PT018
    assert (numbers.source, names.source) == ("numbers in extra.objects", "names in extra.things")
    with pytest.raises(VlscaleError, match=r"none of the first 3 images has a list extra\.nothing"):
        Detections(tmp_path, "nothing").open()
    with ClassWriter(tmp_path, 4, class_names=["dog", "cat", "bus", "man"]) as classes:
        classes.write(np.eye(4)[[1, 1, 2, 0, 3, 1]] * 0.9)
    assert Detections(tmp_path).open().classes([0, 1, 2]) == [["cat"], ["bus", "dog"], ["cat", "man"]]
    assert Detections(tmp_path, "things").open().classes([0]) == [["x"]]
    assert Detections(tmp_path, "objects").open().classes([0]) == [["0", "3"]]  # a field that is asked for is taken
    assert Detections(tmp_path).open().source == "names of the 4 in classes/"


def test_mistakes_are_one_line(root, tmp_path, capsys) -> None:
    def fails(message: str, *options: str) -> None:
        with pytest.raises(VlscaleError, match=message):
            run([str(root), *options])

    with pytest.raises(SystemExit) as stopped:
        build_retrieval.main([str(root), "-k", "0"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    fails("nothing would be retrieved", "--no-images", "--no-texts")
    fails("belong together", "--caption-embeddings", str(tmp_path / "e.npy"))
    fails(r"images: is missing", "--images", str(tmp_path))
    fails(r"texts: is missing", "--texts", str(tmp_path))
    np.save(tmp_path / "short.npy", np.ones((3, 4), np.float32))
    given = ["--text-embeddings", str(tmp_path / "short.npy"), "--caption-embeddings", str(tmp_path / "short.npy")]
    fails(r"short\.npy: found float32 \[3, 4\], expected float16 or float32 \[81, E\]", "--no-images", *given)
    bad = np.ones((81, 4), np.float32)
    bad[5, 1] = np.nan
    np.save(tmp_path / "short.npy", bad)
    fails(r"short\.npy: row 5 has NaN", "--no-images", *given)
    (tmp_path / "short.npy").write_bytes(b"not an array")
    fails(r"short\.npy: not a plain \.npy array", "--no-images", *given)
    with ImageWriter(tmp_path / "wide", WIDTH + 1, codec="none") as images:
        images.write("x", 9, 9, np.ones((1, WIDTH + 1)), [[0, 0, 1, 1]], [1.0], {"objects": ["dog"]})
    fails("features of width 7.*of one detector", "--images", str(tmp_path / "wide"))
    with TextWriter(tmp_path / "empty", make_vocabulary(), {}):
        pass
    fails("has no texts", "--texts", str(tmp_path / "empty"))
    assert not (root / "retrieved").exists()


def test_an_image_without_regions_is_in_no_store(root, tmp_path) -> None:
    lengths = np.load(root / "images" / "lengths.npy")
    lengths[4] = 0
    np.save(root / "images" / "lengths.npy", lengths)
    with pytest.raises(VlscaleError, match=r"image row 4 has 0 regions, expected at least 1"):
        run([str(root)])
    with (
        pytest.raises(VlscaleError, match="regions"),
        ImageWriter(tmp_path / "none", WIDTH, codec="none") as images,
    ):
        images.write("x", 9, 9, np.ones((0, WIDTH)), np.ones((0, 4)))


def test_texts_without_words_and_images_without_classes_are_counted(tmp_path) -> None:
    with ImageWriter(tmp_path, WIDTH, codec="none") as images:
        for name, objects in (("a", ["dog"]), ("b", []), ("c", ["dog"])):
            features = np.zeros((1, WIDTH)) if name == "c" else np.ones((1, WIDTH))
            images.write(name, 9, 9, features, [[0, 0, 1, 1]], [1.0], {"objects": objects})
    with TextWriter(tmp_path, make_vocabulary(), images.rows) as writer:
        for name, text in (("a", "a dog"), ("b", "..."), ("c", "the dog")):
            writer.write(name, text, [5], [name])
    told = run([str(tmp_path), "-k", "2"])["told"]
    assert told["texts of the collection without words"] == 1
    assert told["images of the collection without detected classes"] == 1
    assert told["images of the collection whose mean feature is zero"] == 1
    store = RetrievedStore(tmp_path / "retrieved")
    assert [store.images_of(row).tolist() for row in range(3)] == [[2], [], [0]]
    assert [store.texts_of(row).tolist() for row in range(3)] == [[2], [], [0]]
    assert json.loads((tmp_path / "report-retrieved.json").read_text())["told"] == told
