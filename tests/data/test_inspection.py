"""What inspection counts, decodes and verifies, against values computed another way."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.data.damage import patch, rewrite
from tests.data.toy import toy_lengths
from tests.helpers import make_dataset
from vlscale.data.dataset import open_dataset
from vlscale.data.index import record_side_files
from vlscale.data.inspection import describe_histogram, facts, find_stores, length_histograms, open_stores
from vlscale.data.plan_figures import plan_figures
from vlscale.data.reader import MdsReader
from vlscale.data.rows import decoded_rows, feature_summary, image_problem, parse_rows
from vlscale.data.source import PlanSettings
from vlscale.data.survey import Histogram
from vlscale.data.verification import MOST_LISTED, Verification, verify
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("inspection") / "toy", images=20, texts_without_image=3)


@pytest.fixture
def toy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "toy")
    return tmp_path / "toy"


def reader(folder: Path) -> MdsReader:
    (store,) = [store for _, store in open_stores(folder)]
    return store.reader


def test_facts_count_what_is_there(whole: Path) -> None:
    found, dataset = facts(open_stores(whole)), open_dataset("toy", whole)
    assert found["fingerprint"] == dataset.fingerprint
    images, texts, classes = (found["stores"][kind] for kind in ("images", "texts", "classes"))
    assert (images["rows"], texts["rows"]) == (20, 63)
    assert images["regions"] == classes["rows"] == sum(len(dataset.images.row(row)["conf"]) for row in range(20))
    assert texts["tokens"] == sum(len(dataset.texts.row(row)["input_ids"]) for row in range(63))
    for kind in ("images", "texts", "classes"):
        shards = list((whole / kind).glob("*.mds"))
        assert found["stores"][kind]["shards"] == len(shards) > 1
        assert found["stores"][kind]["bytes"] == sum(path.stat().st_size for path in shards)
        assert found["stores"][kind]["shards_without_hash"] == 0
    assert images["columns"]["features"] == "ndarray:float16"
    assert images["raw_feature_bytes"] == images["regions"] * 8 * 2
    assert found["vocabulary"]["special"]["mask"] == [4, "[MASK]"]
    assert (found["texts_without_image"], found["images_without_text"]) == (3, 0)
    json.dumps(found, allow_nan=False)


def test_images_that_no_text_refers_to_are_counted(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a", images=9, texts_per_image=1)
    other = make_dataset(tmp_path / "b", images=30, texts_per_image=1)
    shutil.rmtree(root / "classes")
    shutil.rmtree(root / "images")
    shutil.copytree(other / "images", root / "images")
    refs = open_dataset("a", root).texts.image_refs
    assert facts(open_stores(root))["images_without_text"] == 30 - len(set(refs.tolist()))


def test_histograms_are_those_of_the_rows(whole: Path) -> None:
    found, lengths = length_histograms(open_stores(whole)), open_dataset("toy", whole).lengths
    first = [lengths.image_refs[lengths.image_ptr[row]] if row < 60 else -1 for row in range(63)]
    joint = [lengths.tokens[row] + 2 + (lengths.regions[image] if image >= 0 else 0) for row, image in enumerate(first)]
    for name, values in (("tokens", lengths.tokens), ("regions", lengths.regions), ("joint", joint)):
        assert np.array_equal(found[name].counts, np.bincount(values))


def test_a_description_agrees_with_numpy() -> None:
    values = np.random.default_rng(0).integers(3, 90, 1000).astype(np.int32)
    histogram = Histogram()
    histogram.add(values)
    found = describe_histogram(histogram)
    assert found["mean"] == pytest.approx(values.mean())
    assert (found["count"], found["total"], found["least"], found["most"]) == (1000, values.sum(), 3, 89)
    for share, value in found["quantiles"].items():
        assert value == np.quantile(values, float(share), method="inverted_cdf")
    bins = found["bins"]
    assert sum(count for *_, count in bins) == 1000
    assert [low for low, *_ in bins[1:]] == [high + 1 for _, high, _ in bins[:-1]]
    assert (bins[0][0], bins[-1][1]) == (3, 89)
    assert describe_histogram(Histogram())["count"] == 0


@pytest.mark.parametrize(
    ("asked", "expected"), [("0", [0]), ("3:6", [3, 4, 5]), ("8:", [8, 9]), (":2", [0, 1]), ("9:10", [9])]
)
def test_row_ranges(asked: str, expected: list[int]) -> None:
    assert list(parse_rows(asked, 10, "here")) == expected


@pytest.mark.parametrize("asked", ["", ":", "10", "3:11", "4:4", "5:4", "-1", "a", "1:2:3", "\uff11"])
def test_wrong_row_ranges(asked: str) -> None:
    with pytest.raises(VlscaleError, match="--rows"):
        parse_rows(asked, 10, "here")


def test_more_rows_than_people_read_are_refused() -> None:
    with pytest.raises(VlscaleError, match="65 rows, more than 64"):
        parse_rows("0:65", 100, "here")


def test_decoded_rows(whole: Path) -> None:
    dataset, stores = open_dataset("toy", whole), open_stores(whole)
    (found,) = decoded_rows(stores, "4", 100)
    row = dataset.texts.row(4)
    assert (found["id"], found["text"], found["extra"]) == ("text-4", row["text"], {"row": 4})
    assert " ".join(found["tokens"]) == row["text"]
    assert [image["id"] for image in found["images"]] == row["images"] == ["image-1", "image-2"]
    image = dataset.images.row(1)
    assert found["images"][0]["count"] == len(image["conf"])
    region = found["images"][0]["regions"][-1]
    assert region["box"] == pytest.approx(image["boxes"][-1].tolist(), abs=1e-6)
    assert region["features"]["mean"] == pytest.approx(image["features"][-1].astype(float).mean(), abs=1e-6)
    probs = dataset.classes.probs(dataset.images.region_ptr[2:3] - 1)[0]  # type: ignore[union-attr]
    assert [index for index, *_ in region["classes"]] == np.argsort(-probs)[:5].tolist()
    assert len(decoded_rows(stores, "4", 1)[0]["images"][0]["regions"]) == 1
    assert decoded_rows(stores, "62", 9)[0]["images"] == []


def test_feature_summary() -> None:
    found = feature_summary(np.array([0, 0, 3, -1], np.float16))
    assert found == {"mean": 0.5, "std": 1.5, "least": -1.0, "most": 3.0, "zeros": 0.5}


def test_image_problems() -> None:
    row: dict[str, Any] = {
        "features": np.ones((2, 3), np.float16),
        "boxes": np.array([[0, 0, 1, 1]] * 2, np.float32),
        "conf": np.ones(2, np.float32),
    }
    assert image_problem(row, 2, 3) is None
    assert "features [2, 3], expected [3, 3]" in str(image_problem(row, 3, 3))
    assert "conf" in str(image_problem(row | {"conf": np.ones(3)}, 2, 3))
    assert "NaN" in str(image_problem(row | {"features": np.full((2, 3), np.nan)}, 2, 3))
    assert "is not x1 < x2" in str(image_problem(row | {"boxes": np.zeros((2, 4))}, 2, 3))


@pytest.mark.parametrize("kind", ["texts", "images", "classes"])
def test_a_store_alone_is_found_and_verified(whole: Path, kind: str) -> None:
    assert find_stores(whole / kind) == {kind: whole / kind}
    report = verify(whole / kind, rows=True)
    assert report.problems == []
    assert report.rows == len(reader(whole / kind))


def test_a_whole_dataset_verifies(whole: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = verify(whole, rows=True, progress=lambda *what: seen.append(what))
    assert (report.found, report.stores) == (0, 3)
    assert report.shards == len(list(whole.glob("*/*.mds")))
    assert report.bytes == sum(path.stat().st_size for path in whole.glob("*/*.mds"))
    assert report.rows == 63 + 20 + len(reader(whole / "classes"))
    assert {what for what, done, total in seen if done == total} >= {"texts: hashes", "images: rows", "classes: rows"}


def test_every_damaged_shard_is_listed(toy: Path) -> None:
    flipped, cut, lost, *_ = sorted((toy / "images").glob("*.mds"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    lost.unlink()
    last = sorted((toy / "classes").glob("*.mds"))[-1]
    last.write_bytes(b"")
    report = verify(toy)
    for path, what in ((flipped, "xxh64"), (cut, "bytes, expected"), (lost, "is missing"), (last, "0 bytes, expected")):
        assert sum(str(path) in problem and what in problem for problem in report.problems) == 1, what
    assert report.found == len(report.problems) == 4


def test_a_shard_without_a_hash_cannot_be_verified(toy: Path) -> None:
    index = json.loads((toy / "texts/index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"] = {}
    (toy / "texts/index.json").write_text(json.dumps(index))
    (problem,) = verify(toy).problems
    assert "records no xxh64" in problem
    assert facts(open_stores(toy))["stores"]["texts"]["shards_without_hash"] == 1


def _pack(folder: Path) -> Path:
    """Compress the first shard, as a store for a remote is written; returns the compressed file."""
    index = json.loads((folder / "index.json").read_text())
    raw = folder / index["shards"][0]["raw_data"]["basename"]
    packed = raw.with_name(f"{raw.name}.gz")
    packed.write_bytes(gzip.compress(raw.read_bytes()))
    file = {"basename": packed.name, "bytes": packed.stat().st_size}
    index["shards"][0]["zip_data"] = file | {"hashes": {"xxh64": xxhash.xxh64_hexdigest(packed.read_bytes())}}
    index["shards"][0]["compression"] = "gz"
    (folder / "index.json").write_text(json.dumps(index))
    raw.unlink()
    return packed


def test_compressed_shards_are_hashed(toy: Path) -> None:
    packed = _pack(toy / "texts")
    report = verify(toy, rows=True)
    assert (report.problems, report.packed) == ([], ["texts"])
    found = facts(open_stores(toy, toy.parent / "cache"))
    assert found["stores"]["texts"]["compressed_bytes"] == packed.stat().st_size
    packed.write_bytes(packed.read_bytes()[:-1] + b"x")
    (problem,) = verify(toy).problems
    assert str(packed) in problem


@pytest.mark.parametrize("name", ["../../outside.mds", "/etc/passwd", "a\0b", ""])
def test_names_that_leave_the_folder_are_not_followed(toy: Path, name: str) -> None:
    (toy.parent / "outside.mds").write_bytes(b"secret")
    index = json.loads((toy / "texts/index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (toy / "texts/index.json").write_text(json.dumps(index))
    report = verify(toy)
    assert report.found == 1
    assert "not a plain file name" in report.problems[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"shards": 3, "version": 2}', '{"shards": [1, {}]}'])
def test_a_damaged_index_is_a_problem(toy: Path, content: str) -> None:
    (toy / "images/index.json").write_text(content)
    report = verify(toy, rows=True)
    assert report.found == 1
    assert "images/index.json" in report.problems[0]


def test_side_files_of_another_store_are_problems(toy: Path) -> None:
    refs = np.load(toy / "texts/image_refs.npy")
    np.save(toy / "texts/image_refs.npy", refs + 19)
    assert "image_refs.npy: xxh64 is" in verify(toy).problems[0]
    record_side_files(toy / "texts")
    assert "refers to image row" in verify(toy).problems[0]


def test_a_dataset_may_lack_what_nothing_refers_to(toy: Path) -> None:
    shutil.rmtree(toy / "texts")
    assert verify(toy, rows=True).found == 0
    (toy / "images").rename(toy.parent / "images")
    (problem,) = verify(toy, rows=True).problems
    assert "images: is missing, but the other stores refer to it" in problem


def test_texts_without_their_images_are_a_problem(toy: Path) -> None:
    shutil.rmtree(toy / "images")
    shutil.rmtree(toy / "classes")
    assert "images: is missing" in verify(toy).problems[0]


def _swap_refs(root: Path) -> None:
    refs = np.load(root / "texts/image_refs.npy")
    refs[0] = 7
    np.save(root / "texts/image_refs.npy", refs)


def _longer(root: Path) -> None:
    lengths = np.load(root / "texts/lengths.npy")
    lengths[5] += 1
    np.save(root / "texts/lengths.npy", lengths)


def _another_count(root: Path) -> None:
    lengths = np.load(root / "images/lengths.npy")
    lengths[[2, 3]] = lengths[2] + 1, lengths[3] - 1
    np.save(root / "images/lengths.npy", lengths)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_swap_refs, ["texts: row 0: refers to image 'image-0', but image_refs.npy to row 7"]),
        (_longer, ["texts: row 5: input_ids"]),
        (_another_count, ["images: row 2: features", "images: row 3: features"]),
        (
            lambda root: patch(root / "texts", reader(root / "texts"), 9, "input_ids", -4, b"\xff\xff\0\0"),
            ["texts: row 9: input_ids span", "outside the vocabulary of 64"],
        ),
        (
            lambda root: patch(root / "images", reader(root / "images"), 4, "features", -2, b"\xff\xff"),
            ["images: row 4: features contain NaN"],
        ),
        (
            lambda root: patch(root / "classes", reader(root / "classes"), 17, "probs", 0, b"\0\x7c"),
            ["classes: row 17: probabilities"],
        ),
        (
            lambda root: rewrite(root / "images", 0, lambda content: content.__setitem__(slice(4, 8), b"\xff" * 4)),
            ["shard.00000.mds: the row offsets do not rise"],
        ),
    ],
)
def test_rows_that_contradict_side_files(toy: Path, damage: Callable[[Path], Any], expected: list[str]) -> None:
    damage(toy)
    for part in ("texts", "images"):  # whoever did it kept the books
        record_side_files(toy / part)
    assert verify(toy).found == 0 or "offsets" in expected[0]
    report = verify(toy, rows=True)
    for words in expected:
        assert any(words in problem for problem in report.problems), (words, report.problems)


def test_the_list_of_problems_is_bounded() -> None:
    report = Verification()
    for number in range(3 * MOST_LISTED):
        report.add(f"problem\n {number}")
    assert report.found == 3 * MOST_LISTED
    assert len(report.problems) == MOST_LISTED
    assert report.problems[1] == "problem 1"


def test_a_shard_that_cannot_be_read_is_one_problem(toy: Path) -> None:
    rewrite(toy / "texts", 1, lambda content: content.__setitem__(slice(4, 8), b"\xff" * 4))
    report = verify(toy, rows=True)
    assert report.found == 1
    assert "texts/shard.00001.mds: the row offsets" in report.problems[0]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("gas", [1, 2, 5])
def test_figures_of_a_plan(world_size: int, gas: int) -> None:
    lengths = toy_lengths(images=300, shard=200)
    found = plan_figures(lengths, "mlm", PlanSettings(5, micro_batch_tokens=400), world_size, gas)
    assert (found.world_size, found.accumulation) == (world_size, gas)
    assert found.texts == len(lengths)
    assert found.examples >= found.texts
    assert found.tokens.shape == (found.steps, world_size * gas)
    assert found.tokens.max() <= 400
    assert found.fill == pytest.approx(found.tokens.mean() / 400)
    assert found.fill > 0.85
    assert found.steps - 1 < found.steps_per_pass <= found.steps
    assert 1 <= found.straggler_mean <= found.straggler_most < 1.1
    assert found.padding == 0 < found.padding_if_padded < 1
    described = found.to_json()
    assert described["micro_batches"]["most"] == found.tokens.max()
    json.dumps(described, allow_nan=False)


def test_the_global_batch_is_the_largest_that_surely_fits() -> None:
    lengths = toy_lengths(images=300, shard=200)
    settings = PlanSettings(5, micro_batch_tokens=400)
    found = plan_figures(lengths, "mlm", settings, 2, 3)
    more = replace(settings, global_batch_tokens=found.global_batch_tokens + 1)
    assert plan_figures(lengths, "mlm", more, 2).accumulation == 4


def test_a_given_global_batch_decides_the_accumulation() -> None:
    lengths = toy_lengths(images=300, shard=200)
    settings = PlanSettings(5, global_batch_tokens=4000, micro_batch_tokens=500, max_text_tokens=12)
    found = plan_figures(lengths, "itm", settings, world_size=2)
    assert found.accumulation >= 4
    assert found.left_out == int((lengths.tokens > 12).sum()) > 0
    assert found.tokens.sum(1).max() <= 4000


def test_a_long_pass_is_cut() -> None:
    lengths = toy_lengths(images=300, shard=200)
    whole = plan_figures(lengths, "mlm", PlanSettings(5, micro_batch_tokens=200), gas=1)
    part = plan_figures(lengths, "mlm", PlanSettings(5, micro_batch_tokens=200), gas=1, most_steps=3)
    assert part.steps == 3
    assert part.examples < part.texts
    assert part.steps_per_pass == pytest.approx(whole.steps_per_pass, rel=0.2)


def test_packed_fill_and_balance_on_the_demo() -> None:
    """The issue's bounds for a packed plan (fill, padding, straggler factor), on the checked-in demo."""
    dataset = open_stores(Path(__file__).resolve().parents[1] / "fixtures/demo/train").dataset
    assert dataset is not None
    found = plan_figures(dataset.lengths, "mlm", PlanSettings(1, micro_batch_tokens=2000), world_size=4, gas=2)
    assert found.fill >= 0.97
    assert found.padding <= 0.015
    assert found.straggler_most <= 1.02
