"""UNIMO's demo corpus: what is in it, that it is the same each time, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.build_demo_unimo import main, run
from data_tools.demo_texts import TEXTS, is_held_out, sentences
from tests.unimo_demo import OPTIONS, SCENES, small_corpus
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.errors import VlscaleError

NAMES = ("pairs", "images", "texts", "val_pairs", "val_texts")
QUICK = [
    "--scenes",
    str(SCENES),
    "--most-scenes",
    "12",
    "--sentences",
    "40",
    "--vocab-size",
    "400",
    "--neighbours",
    "3",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory)


@pytest.fixture(scope="module")
def opened(corpus: Path) -> dict[str, Dataset]:
    return {name: open_dataset(name, corpus / name) for name in NAMES}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def texts_of(dataset: Dataset) -> list[str]:
    return [dataset.texts.row(row)["text"] for row in range(len(dataset.texts))]


def test_kinds_and_companions(opened: dict[str, Dataset]) -> None:
    assert {name: dataset.kind for name, dataset in opened.items()} == {
        "pairs": "pairs",
        "images": "images",
        "texts": "texts",
        "val_pairs": "pairs",
        "val_texts": "texts",
    }
    for name in ("pairs", "val_pairs", "texts", "val_texts"):
        assert opened[name].units is not None, name
    assert opened["pairs"].rewrites is not None
    assert opened["val_pairs"].rewrites is not None
    assert opened["pairs"].retrieved is not None
    for name in ("pairs", "images", "val_pairs"):
        assert opened[name].num_classes == opened["pairs"].num_classes


def test_two_thirds_of_the_scenes_keep_their_captions(opened: dict[str, Dataset]) -> None:
    pairs, images = opened["pairs"], opened["images"]
    told = {pairs.images.row(row)["id"] for row in range(len(pairs.images))}
    withheld = {images.images.row(row)["id"] for row in range(len(images.images))}
    assert (len(told), len(withheld)) == (120, 60)
    assert not told & withheld
    source = open_dataset("train", SCENES / "train")
    assert told | withheld == {source.images.row(row)["id"] for row in range(180)}
    for dataset in (pairs, images):
        found = dataset.images.row(7)
        row = next(row for row in range(180) if source.images.row(row)["id"] == found["id"])
        one, other = (each.images.regions(np.array([at]), 100) for each, at in ((dataset, 7), (source, row)))
        assert (one[0] == other[0]).all()
        assert (one[1] == other[1]).all()
        assert dataset.classes is not None
        assert source.classes is not None
        assert (dataset.classes.probs(one[3]) == source.classes.probs(other[3])).all()


def test_nothing_held_out_is_trained_on(opened: dict[str, Dataset], corpus: Path) -> None:
    seen, held_out = texts_of(opened["texts"]), texts_of(opened["val_texts"])
    assert len(held_out) > 10
    assert not set(seen) & set(held_out)
    every = set(sentences(TEXTS, 160))
    kept_out = {each for each in every if is_held_out(each, 20)}
    assert set(held_out) & every <= kept_out
    assert not set(seen) & kept_out
    scenes = [
        {each.images.row(row)["id"] for row in range(len(each.images))}
        for each in (opened["pairs"], opened["val_pairs"])
    ]
    assert not scenes[0] & scenes[1]


def test_one_lower_case_vocabulary_spells_everything(opened: dict[str, Dataset], corpus: Path) -> None:
    vocabularies = {opened[name].texts.meta.vocabulary.fingerprint for name in NAMES if name != "images"}
    assert len(vocabularies) == 1
    vocabulary = opened["pairs"].texts.meta.vocabulary
    assert vocabulary.size == 700
    for name in ("pairs", "texts", "val_pairs", "val_texts"):
        texts = opened[name].texts
        ids, lengths = texts.input_ids(np.arange(len(texts)))
        assert vocabulary.unk not in ids
        assert lengths.max() <= 48
        assert all(text == text.lower() for text in texts_of(opened[name]))
    for file in ("CREDITS.md", "LICENSE.wordnet.txt"):
        assert (corpus / file).stat().st_size > 500


def test_retrieved_are_of_the_other_two_datasets(opened: dict[str, Dataset]) -> None:
    retrieved = opened["pairs"].retrieved
    assert retrieved is not None
    for row in (0, 100, len(opened["pairs"].texts) - 1):
        images, texts = retrieved.images_of(row), retrieved.texts_of(row)
        assert 1 <= len(images) <= 8
        assert 1 <= len(texts) <= 8
        assert 0 <= images.min() <= images.max() < len(opened["images"].images)
        assert 0 <= texts.min() <= texts.max() < len(opened["texts"].texts)


def test_the_same_options_give_the_same_bytes(tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        run([*QUICK, "--workers", workers, "--out", str(tmp_path / name)])
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments])
        assert caught.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("build_demo_unimo: error: ")
        return told.splitlines()[0]

    out = ["--out", str(tmp_path / "out")]
    assert "build the scenes first" in message(*out, "--scenes", str(tmp_path / "none"))
    (tmp_path / "manifest.json").write_text(json.dumps({"corpus": "other"}))
    assert "expected 'vlscale-demo'" in message(*out, "--scenes", str(tmp_path))
    (tmp_path / "manifest.json").write_text("[1]")
    assert "no manifest of scenes" in message(*out, "--scenes", str(tmp_path))
    texts = tmp_path / "texts"
    shutil.copytree(TEXTS, texts)
    (texts / "persuasion.txt").write_bytes(b"caf\xe9 is not UTF-8 here")
    assert "not UTF-8 (byte 3)" in message(*out, *QUICK, "--texts", str(texts))
    (texts / "persuasion.txt").unlink()
    assert "persuasion.txt: cannot be read" in message(*out, *QUICK, "--texts", str(texts))
    assert "exists already" in message("--out", str(corpus), *OPTIONS)
    assert "is no demo corpus" in message("--out", str(texts), "--overwrite", *OPTIONS)
    assert "--vocab-size" in message(*out, "--vocab-size", "100")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "texts"]


def test_a_broken_text_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlscaleError, match=r"wordnet_glosses\.txt"):
        list(sentences(tmp_path))
