"""Readers of units, rewrites and retrieved: against plain Python; damaged, older, of other texts, pickled, fetched."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.retrieval import stores as retrieval_stores
from data_tools.retrieval.stores import Found, RetrievedWriter
from data_tools.rewriting import stores
from data_tools.rewriting.graph import Analysis
from data_tools.rewriting.stores import RewriteWriter, UnitWriter
from tests.data.damage import patch, rewrite
from tests.helpers import make_vocabulary
from vlscale.data.companion_base import TOOLS
from vlscale.data.companion_schema import Collection, Rewrite
from vlscale.data.companions import RetrievedStore, RewriteStore, UnitStore, open_companion
from vlscale.data.reader import LocalFiles
from vlscale.data.store import TextStore
from vlscale.data.store_writer import TextWriter
from vlscale.data.verification import verify
from vlscale.errors import VlscaleError

TEXTS = 300
VOCABULARY = make_vocabulary()
KINDS = ("object", "attribute", "relation", "sentence")
STORES = {"units": UnitStore, "rewrites": RewriteStore, "retrieved": RetrievedStore}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with texts and all companions in small shards, and what they hold."""
    root, rng = tmp_path_factory.mktemp("companions"), np.random.default_rng(5)
    patcher = pytest.MonkeyPatch()
    patcher.setattr(stores, "SHARD_BYTES", 4000)
    patcher.setattr(retrieval_stores, "SHARD_BYTES", 4000)
    lengths = rng.integers(1, 12, TEXTS)
    with TextWriter(root, VOCABULARY, {}) as texts:
        for row, length in enumerate(lengths.tolist()):
            texts.write(f"t{row}", "x", rng.integers(5, 64, length))
    units, views, lists, beside = [], [], [], TextStore(root / "texts")
    with UnitWriter(root, beside, "test") as writer:
        for row, length in enumerate(lengths.tolist()):
            ends = np.append(np.flatnonzero(rng.random(length - 1) < 0.5) + 1, length)
            begins = np.append(0, ends[:-1])
            units.append(np.stack([begins, ends, rng.integers(0, 4, len(ends))], 1).astype(np.int32))
            writer.write(f"t{row}", units[-1], Analysis(()))
    with RewriteWriter(root, beside, 0) as rewrites:
        for row in range(TEXTS):
            made = [
                (Rewrite(f"{row} {n}", bool(rng.random() < 0.3), KINDS[n % 4], "a", "b"),
                 rng.integers(5, 64, rng.integers(1, 20)).tolist())
                for n in range(int(rng.integers(0, 6)))
            ]  # fmt: skip
            views.append(made)
            rewrites.write(f"t{row}", made)
    collections = (Collection(digest="a" * 64, rows=50), Collection(digest="b" * 64, rows=TEXTS))
    with RetrievedWriter(root, beside, *collections, 9) as retrieved:
        for row in range(TEXTS):
            both = [rng.permutation(most)[: rng.integers(0, 10)].astype(np.int32) for most in (50, TEXTS)]
            lists.append(both)
            retrieved.write(f"t{row}", *(Found(one, np.linspace(1, 0, len(one), dtype=np.float32)) for one in both))
    patcher.undo()
    return root, units, views, lists


@pytest.fixture
def root(written, tmp_path) -> Path:
    return shutil.copytree(written[0], tmp_path / "data")


def some_rows(count: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, TEXTS, count)


def test_units_come_as_written(written) -> None:
    root, units, _, _ = written
    store = UnitStore(root / "units")
    assert len(store.reader.index.shards) > 3
    rows = some_rows()
    for found, row in zip(store.units_of(rows), rows, strict=True):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, units[row])
    np.testing.assert_array_equal(store.lengths, [len(each) for each in units])
    assert store.units_of(np.empty(0, np.int64)) == []
    with pytest.raises(IndexError):
        store.units_of(np.array([TEXTS]))


def test_views_are_numbered_over_all_texts_and_written_in_place(written) -> None:
    root, _, views, _ = written
    store = RewriteStore(root / "rewrites")
    assert len(store.reader.index.shards) > 3
    every = [(row, ids, made.positive) for row, several in enumerate(views) for made, ids in several]
    assert store.ptr.total == len(every)
    np.testing.assert_array_equal(store.view_tokens, [len(ids) for _, ids, _ in every])
    np.testing.assert_array_equal(store.view_positive, [positive for _, _, positive in every])
    numbers = np.random.default_rng(2).integers(0, len(every), 100)
    texts = np.asarray([every[number][0] for number in numbers])
    assert np.all((store.ptr[texts] <= numbers) & (numbers < store.ptr[texts + 1]))
    sizes = store.view_tokens[numbers].astype(np.int64)
    starts = np.cumsum(sizes + 2) - sizes - 1  # between [CLS] and [SEP]
    out = np.full(int((sizes + 2).sum()), -7)
    store.write_ids(texts, numbers, out, starts)
    for number, start, size in zip(numbers, starts, sizes, strict=True):
        assert out[start : start + size].tolist() == every[number][1]
        assert out[start - 1] == out[start + size] == -7
    for row in range(TEXTS):
        found = store.rewrites(row)
        assert [(view, ids.tolist() if len(ids) else []) for view, ids in found] == views[row]
    with pytest.raises(IndexError, match="is not one of text"):
        store.write_ids(texts[:1], np.array([store.ptr[texts[:1] + 1][0]]), out, starts[:1])


def test_candidates_come_as_written(written) -> None:
    root, _, _, lists = written
    store, rows = RetrievedStore(root / "retrieved"), some_rows()
    for place, kind in enumerate(("images", "texts")):
        packed, counts = store.packed(kind, rows)
        expected = [lists[row][place] for row in rows]
        np.testing.assert_array_equal(packed, np.concatenate(expected))
        np.testing.assert_array_equal(counts, [len(each) for each in expected])
    for row in rows[:20].tolist():
        np.testing.assert_array_equal(store.images_of(row), lists[row][0])
        np.testing.assert_array_equal(store.texts_of(row), lists[row][1])
    np.testing.assert_array_equal(store.text_counts, [len(each) for _, each in lists])


def test_a_list_that_holds_the_original_is_refused(written) -> None:
    store = RetrievedStore(written[0] / "retrieved")
    row = next(row for row, (_, texts) in enumerate(written[3]) if len(texts) > 2)
    candidates = store.texts_of(row)
    store.check_original("texts", row, candidates, np.setdiff1d(np.arange(TEXTS), candidates))
    with pytest.raises(VlscaleError, match=rf"row {row}: texts name row {candidates[1]}.*build_retrieval again"):
        store.check_original("texts", row, candidates, candidates[1:2])


def test_companions_are_pickled_without_their_arrays_and_read_through_other_files(written) -> None:
    rows = some_rows()
    for name, kind in STORES.items():
        store = kind(written[0] / name)
        for attribute in (*kind._cached, *kind._derived):
            getattr(store, attribute)
        assert len(pickle.dumps(store)) < 20_000
        fetched = pickle.loads(pickle.dumps(kind(written[0] / name, files=LocalFiles)))
        assert fetched.digests() == store.digests()
        assert [fetched.row(int(row)).keys() for row in rows[:3]] == [store.row(int(row)).keys() for row in rows[:3]]


def test_only_side_files_that_training_reads_are_needed_from_afar(root) -> None:
    content = json.loads((root / "units" / "index.json").read_text())
    content["side_files"]["vocabulary.json"] = "0" * 16  # of the tools; not fetched
    (root / "units" / "index.json").write_text(json.dumps(content))
    UnitStore(root / "units", files=LocalFiles).reader.index.check_side_files()
    with pytest.raises(VlscaleError, match=r"vocabulary\.json"):
        UnitStore(root / "units").reader.index.check_side_files()


def test_companions_of_other_texts_are_refused(root) -> None:
    texts = TextStore(root / "texts")
    for name, kind in STORES.items():
        assert open_companion(kind, root / "nowhere", texts) is None
        assert open_companion(kind, root / name, texts) is not None
        meta = json.loads((root / name / "meta.json").read_text())
        (root / name / "meta.json").write_text(json.dumps(meta | {"fingerprint": "0" * 64}))
        with pytest.raises(VlscaleError, match=r"of vocabulary 0000.*remove .* and run python -m data_tools"):
            open_companion(kind, root / name, texts)


def test_companions_of_texts_that_are_only_as_many_are_refused(root) -> None:
    shutil.rmtree(root / "texts")
    with TextWriter(root, VOCABULARY, {}) as texts:
        for row in range(TEXTS):
            texts.write(f"t{row}", "y", [5])
    for name, kind in STORES.items():
        with pytest.raises(VlscaleError, match=rf"{name}: was made of other texts.*data_tools\.{TOOLS[name]} again"):
            open_companion(kind, root / name, TextStore(root / "texts"))


def test_rewrites_do_not_choose_their_own_vocabulary(root) -> None:
    path = root / "rewrites" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocabulary_size": 1 << 20}))
    with pytest.raises(VlscaleError, match=r"ids of 1048576 word pieces, but the vocabulary of .*texts has 64"):
        open_companion(RewriteStore, root / "rewrites", TextStore(root / "texts"))


def test_a_layout_that_does_not_name_its_texts_is_refused_with_its_cure(root) -> None:
    for name, kind in STORES.items():
        path = root / name / "meta.json"
        meta = json.loads(path.read_text())
        del meta["texts_digest"]
        path.write_text(json.dumps(meta))
        with pytest.raises(VlscaleError, match=rf"older layout.*texts_digest.*data_tools\.{TOOLS[name]} again"):
            kind(root / name)


def test_rows_of_other_texts_are_found_by_verification(tmp_path) -> None:
    with TextWriter(tmp_path, VOCABULARY, {}) as texts:
        for row in range(5):
            texts.write(f"t{row}", "x", [5] * (row + 1))
    beside, nothing = TextStore(tmp_path / "texts"), Found(np.empty(0, np.int32), np.empty(0, np.float32))
    with (
        UnitWriter(tmp_path, beside, "test") as units,
        RewriteWriter(tmp_path, beside, 0) as rewrites,
        RetrievedWriter(tmp_path, beside, None, Collection(digest="b" * 64, rows=5), 1) as retrieved,
    ):
        for row in (0, 1, 3, 2, 4):
            units.write(f"t{row}", np.asarray([[0, row + 1, 0]]), Analysis(()))
            rewrites.write(f"t{row}", [])
            retrieved.write(f"t{row}", nothing, nothing)
    report = verify(tmp_path, rows=True)
    assert report.found == 6
    for name in ("rewrites", "retrieved"):
        assert sum(f"{name}: row 2: is of text 't3', expected 't2'" in one for one in report.problems) == 1
    assert sum("units: row 3: units of 3 word pieces, but the text has 4" in one for one in report.problems) == 1


def test_an_older_layout_is_refused_with_its_cure(root) -> None:
    path = root / "rewrites" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["vocabulary_size"]
    path.write_text(json.dumps(meta | {"version": 1}))
    with pytest.raises(VlscaleError, match=r"version 1 of the layout, but 2 .*data_tools\.rewrite_captions again"):
        RewriteStore(root / "rewrites")
    for broken in ("[1]", "{", json.dumps(meta | {"version": "2"})):
        path.write_text(broken)
        with pytest.raises(VlscaleError, match=r"meta\.json"):
            RewriteStore(root / "rewrites")


@pytest.mark.parametrize(
    ("store", "name", "values", "message"),
    [
        ("rewrites", "view_tokens.npy", 0, "entry 0 is 0, expected at least 1"),
        ("rewrites", "view_positive.npy", 2, r"entry 0 is 2, expected 0\.\.1"),
        ("rewrites", "lengths.npy", -1, "entry 0 is -1, expected at least 0"),
        ("units", "lengths.npy", 0, "entry 0 is 0, expected at least 1"),
        ("retrieved", "image_counts.npy", 51, r"entry 0 is 51, expected 0\.\.50"),
        ("retrieved", "text_counts.npy", None, "299 entries, expected 300"),
    ],
)
def test_damaged_side_files_are_named(root, store, name, values, message) -> None:
    path = root / store / name
    array = np.load(path)
    if values is None:
        array = array[:-1]
    else:
        array[0] = values
    np.save(path, array)
    with pytest.raises(VlscaleError, match=rf"{name}: {message}"):
        STORES[store](root / store)
    path.unlink()
    with pytest.raises(VlscaleError, match=rf"{name}: is missing"):
        STORES[store](root / store)


def test_damaged_rows_are_named(written, root) -> None:
    _, units, views, lists = written
    store = UnitStore(root / "units")
    row = next(row for row, each in enumerate(units) if len(each) > 2)
    patch(root / "units", store.reader, row, "units", -12, np.array([0], "<i4").tobytes())
    with pytest.raises(VlscaleError, match=rf"row {row}: unit .* does not go on at"):
        UnitStore(root / "units").units_of(np.array([0, row]))

    rewrites = RewriteStore(root / "rewrites")
    row = next(row for row, each in enumerate(views) if len(each) > 1)
    patch(root / "rewrites", rewrites.reader, row, "input_ids", -4, np.array([64], "<i4").tobytes())
    last = int(rewrites.ptr[row + 1]) - 1
    out = np.empty(100, np.int64)
    with pytest.raises(VlscaleError, match=rf"row {row}: token id 64 is outside the vocabulary of 64"):
        RewriteStore(root / "rewrites").write_ids(np.array([row]), np.array([last]), out, np.array([0]))
    again = RewriteStore(root / "rewrites")
    again.__dict__["view_tokens"] = again.view_tokens + 1
    with pytest.raises(VlscaleError, match=rf"row {row}: .* word pieces, but view_tokens.npy says"):
        again.write_ids(np.array([row]), np.array([last]), out, np.array([0]))
    with pytest.raises(VlscaleError, match=rf"row {row}: views do not fit view_tokens.npy"):
        again.rewrites(row)

    retrieved = RetrievedStore(root / "retrieved")
    row = next(row for row, (each, _) in enumerate(lists) if len(each) > 1)
    other = int(lists[row][0][-2])
    for value, message in ((50, "name row 50 of 50"), (other, f"name row {other} twice"), (-1, "name row -1 of 50")):
        patch(root / "retrieved", retrieved.reader, row, "images", -4, np.array([value], "<i4").tobytes())
        with pytest.raises(VlscaleError, match=rf"row {row}: images {message}"):
            RetrievedStore(root / "retrieved").images_of(row)
    again = RetrievedStore(root / "retrieved")
    again.__dict__["image_counts"] = again.image_counts + 1
    with pytest.raises(VlscaleError, match=rf"row {row}: \d+ images, expected"):
        again.images_of(row)


def test_a_flipped_byte_of_a_shard_is_seen(root) -> None:
    for name, kind in STORES.items():
        rewrite(root / name, 0, lambda content: None)  # leaves it as it is
        path = next((root / name).glob("shard.00000.mds"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(VlscaleError, match="damaged"):
            kind(root / name).row(0)
