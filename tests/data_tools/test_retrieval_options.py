"""build_retrieval: what does not go together is refused, what was left is used again, and what fell short is told."""

from __future__ import annotations

import io
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_tools import build_retrieval, parts, rewrite_captions
from data_tools.build_retrieval import run
from data_tools.parts import Work
from data_tools.retrieval import searching
from data_tools.retrieval.vectors import VectorIndex, normalise
from data_tools.rewriting import building
from tests.data_tools.retrieval_data import SCENES, captions_of, tf_idf, write
from tests.data_tools.rewriting_captions import CAPTIONS
from tests.data_tools.toy_sources import tree
from tests.helpers import make_vocabulary
from vlscale.data.companions import RetrievedStore
from vlscale.data.store import ImageStore
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError

OPTIONS = ["-k", "5", "--overlap", "0"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def root(pairs, tmp_path):
    return shutil.copytree(pairs, tmp_path / "pairs")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-images", "--images", "X"],
        ["--no-images", "--pool=9"],
        ["--no-images", "--index", "flat"],
        ["--no-images", "--probes", "3"],
        ["--no-texts", "--texts", "X"],
        ["--no-texts", "--postings", "9"],
        ["--no-texts", "--text-embeddings", "X", "--caption-embeddings", "X"],
        ["--text-embeddings", "X", "--caption-embeddings", "X", "--postings", "9"],
        ["--overlap", "0", "--fill"],
        ["--overlap", "0", "--overlap-of", "share"],
        ["--overlap", "0", "--classes-from", "objects"],
        ["--index", "flat", "--probes", "3"],
        ["--class-probability", "0.5"],
    ],
)
def test_options_that_change_nothing_are_refused(root, arguments) -> None:
    with pytest.raises(VlscaleError, match=r"^--[a-z-]+ has no effect (with|where) "):
        run([str(root), *arguments])
    assert not (root / ".parts").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "cpu"],
        ["--per-kind", "0", "--any-attribute"],
        ["--ignore-regions", "--classes-from", "objects"],
    ],
)
def test_options_of_rewriting_that_change_nothing_are_refused(root, arguments) -> None:
    with pytest.raises(VlscaleError, match=r"^--[a-z-]+ has no effect with"):
        rewrite_captions.run([str(root), *arguments])


def test_a_mistyped_field_of_classes_is_not_replaced_by_others(root) -> None:
    regions = ImageStore(root / "images").region_ptr.total
    with ClassWriter(root, 2, class_names=["dog", "cat"]) as writer:
        writer.write(np.eye(2)[np.zeros(regions, int)])
    with pytest.raises(VlscaleError, match=r"none of the first 40 images has a list extra\.TYPO.*--classes-from"):
        run([str(root), "-k", "3", "--classes-from", "TYPO"])
    report = run([str(root), "-k", "3", "--classes-from", "objects"])
    assert report["classes"] == "names in extra.objects"
    assert "classes of the pairs" not in report


def with_classes(root: Path, names: list[str] | None, width: int = 3) -> Path:
    """Images whose detector has classes of these names, and a caption."""
    write(root, 3, field=None, prefix=root.name)
    with ClassWriter(root, width, class_names=names) as writer:
        writer.write(np.eye(width)[np.zeros(ImageStore(root / "images").region_ptr.total, int)])
    return root


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (["dog", "cat", "bus"], None, "numbers of the 3 in classes/, those of .* are names of the 3 in classes/"),
        (
            ["dog", "cat", "bus"],
            ["cat", "dog", "bus"],
            r"names of the 3 in .* are names of the 3 .*\(of other names\)",
        ),
        (None, 4, "numbers of the 4 in classes/, those of .* are numbers of the 3 in"),
        (None, "extra", "numbers in extra.objects, those of .* are numbers of the 3 in"),
    ],
)
def test_classes_of_different_detectors_are_not_compared(tmp_path, mine, theirs, message) -> None:
    pairs, images = with_classes(tmp_path / "a", mine), tmp_path / "b"
    if theirs == "extra":
        with ImageWriter(images, 6, codec="none") as writer:
            writer.write("x", 9, 9, np.ones((1, 6)), [[0, 0, 1, 1]], [1.0], {"objects": [0]})
    else:
        with_classes(images, None, theirs) if theirs == 4 else with_classes(images, theirs)
    with pytest.raises(VlscaleError, match=rf"classes are {message}.*--classes-from, or give --overlap 0"):
        run([str(pairs), "--images", str(images), "-k", "2"])
    report = run([str(pairs), "--images", str(images), "-k", "2", "--overlap", "0"])
    assert "classes" not in report
    assert "warning" not in report


def test_nothing_but_empty_lists_is_a_loud_warning(root, tmp_path) -> None:
    images = tmp_path / "images"
    with ImageWriter(images, 6, codec="none") as writer:
        writer.write("x", 9, 9, np.ones((1, 6)), [[0, 0, 1, 1]], [1.0], {"objects": ["zeppelin"]})
    said = io.StringIO()
    report = run([str(root), "--images", str(images), "-k", "2"], Console(file=said, width=400))
    assert "no images were retrieved" in report["warning"]
    assert f"WARNING: {report['warning']}" in said.getvalue()
    assert "retrieved written into" in said.getvalue()
    assert "told" not in said.getvalue()
    assert report["told"]["images: empty lists"] == 2 * SCENES + 1
    assert report["classes of the pairs"] == "names in extra.objects"


def test_both_embeddings_are_looked_at_before_anything_is_gathered(root, tmp_path) -> None:
    def refused(message: str, texts: np.ndarray, captions: np.ndarray) -> None:
        files = {"text": tmp_path / "t.npy", "caption": tmp_path / "c.npy"}
        np.save(files["text"], texts)
        np.save(files["caption"], captions)
        given = [one for name, path in files.items() for one in (f"--{name}-embeddings", str(path))]
        with pytest.raises(VlscaleError, match=message):
            run([str(root), "--no-images", *given])
        assert not (root / ".parts").exists()

    good = np.ones((2 * SCENES + 1, 4), np.float32)
    refused(r"c\.npy: embeddings of width 3, but .*t\.npy has 4", good, good[:, :3])
    refused(r"t\.npy: found float32 \[3, 4\]", good[:3], good)
    bad = good.copy()
    bad[7, 1] = np.inf
    refused(r"t\.npy: row 7 has NaN or infinity", bad, good)
    refused(r"c\.npy: row 7 has NaN or infinity", good, bad)


def test_scores_are_cosines_where_not_all_texts_of_a_word_are_looked_at(root) -> None:
    run([str(root), "--no-images", "-k", "4", "--postings", "20"])
    store, captions = RetrievedStore(root / "retrieved"), captions_of(root)
    cosines, seen = tf_idf(captions, captions), 0
    for row in range(len(captions)):
        found, count = store.row(row), int(store.text_counts[row])
        seen += count
        np.testing.assert_allclose(found["text_scores"][:count], cosines[row][found["texts"][:count]], atol=1e-5)
        assert (np.diff(np.round(found["text_scores"][:count], 5)) <= 0).all()
    assert seen > 3 * SCENES


def test_a_changed_search_keeps_what_was_gathered(root, monkeypatch) -> None:
    twin = shutil.copytree(root, root.parent / "twin")
    run([str(twin), "-k", "9", "--overlap", "0.3", "--fill", "--pool", "20", "--postings", "30"])
    with monkeypatch.context() as patch:
        patch.setattr(build_retrieval, "build_beside", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([str(root), *OPTIONS])
    gathered = root / ".parts" / "collections-merged"
    before = tree(gathered)
    with monkeypatch.context() as patch:
        patch.setattr(build_retrieval, "put_together", lambda *_: 1 / 0)
        run([str(root), "-k", "9", "--overlap", "0.3", "--fill", "--pool", "20", "--postings", "30"])
    assert before
    assert tree(root / "retrieved") == tree(twin / "retrieved")


def test_arrays_of_a_part_go_once_they_are_put_together(root, monkeypatch) -> None:
    monkeypatch.setattr(building, "PART_ROWS", 16)
    monkeypatch.setattr(build_retrieval, "PART_ROWS", 16)
    for share in ("1/2", "0/2"):
        assert run([str(root), *OPTIONS, "--shard", share]) is None
    work = Work(root, "collections")
    assert len(list(work.folder.glob("collections-0*"))) == 9
    assert [path.name for path in work.folder.glob("collections-0*/*")] == ["result.json"] * 9
    assert run([str(root), *OPTIONS, "--shard", "1/2"]) is None
    assert run([str(root), *OPTIONS, "--merge"])["rows"] == 2 * SCENES + 1


def test_a_share_waits_for_the_one_that_puts_the_collections_together(root, monkeypatch) -> None:
    monkeypatch.setattr(parts, "LOCK_SECONDS", 0.1)
    work, held, said = Work(root, "collections"), threading.Event(), io.StringIO()

    def hold() -> None:
        with work.lock("merge"):
            held.set()
            deadline = time.monotonic() + 60
            while "puts the collections together; waiting" not in said.getvalue() and time.monotonic() < deadline:
                time.sleep(0.05)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    assert run([str(root), *OPTIONS, "--shard", "0/1"], Console(file=said, width=400)) is None
    thread.join()
    assert said.getvalue().count("waiting until it has ended") == 1
    assert "share 0/1 of retrieved is built" in said.getvalue()
    assert run([str(root), *OPTIONS, "--merge"])["rows"] == 2 * SCENES + 1


def test_what_a_run_leaves_that_was_killed_at_its_end_is_removed_by_the_next(root, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build_retrieval, "clean", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([str(root), *OPTIONS])
    assert (root / ".parts" / "collections-merged").exists()
    with pytest.raises(VlscaleError, match=r"retrieved: exists already and is not overwritten; remove it to build it"):
        run([str(root), *OPTIONS])
    assert not (root / ".parts").exists()
    assert (root / "retrieved").exists()


def repeated(root: Path, copies: int) -> Path:
    """Images of one region each; the first caption stands with ``copies`` of them, the others once."""
    rng = np.random.default_rng(0)
    with ImageWriter(root, 6, codec="none") as images:
        for number in range(copies + 20):
            features = rng.standard_normal((1, 6))
            images.write(f"i{number}", 9, 9, features, [[0, 0, 1, 1]], [1.0], {"objects": ["dog"]})
    with TextWriter(root, make_vocabulary(), images.rows) as texts:
        for number in range(copies + 20):
            text = "a kite" if number < copies else f"{CAPTIONS[number % len(CAPTIONS)]} {number}"
            texts.write(f"t{number}", text, [5], [f"i{number}"])
    return root


def test_a_frequent_text_does_not_slow_the_others_down(tmp_path, monkeypatch) -> None:
    root, depths = repeated(tmp_path / "data", 200), []
    embeddings = np.random.default_rng(1).standard_normal((220, 5)).astype(np.float32)
    np.save(tmp_path / "e.npy", embeddings)
    given = ["--text-embeddings", str(tmp_path / "e.npy"), "--caption-embeddings", str(tmp_path / "e.npy")]
    real = VectorIndex.nearest

    def nearest(self, queries, count):
        depths.append((len(queries), count))
        return real(self, queries, count)

    monkeypatch.setattr(VectorIndex, "nearest", nearest)
    report = run([str(root), "--no-images", "-k", "4", *given])
    assert sorted(depths) == [(20, 8), (200, 256)]
    assert not any("rows of their own" in name for name in report["told"])
    store, units = RetrievedStore(root / "retrieved"), normalise(embeddings)
    for row in (0, 199, 200, 219):
        own = range(200) if row < 200 else [row]
        order = [one for one in np.argsort(-(units @ units[row]), kind="stable") if one not in own]
        assert store.texts_of(row).tolist() == order[:4]


def test_lists_that_are_not_looked_for_deep_enough_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(searching, "MOST_OWN", 50)
    root = repeated(tmp_path, 200)
    report = run([str(root), "--no-images", "-k", "4"])
    assert report["told"]["texts: lists of texts with more than 50 rows of their own"] == 200
    assert report["told"]["texts: candidates"] > 0
