"""UNIMO's report: each question asked of a model that knows the answer and of one that does not, and a whole run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tests.unimo_demo import small_corpus, small_recipe
from vlscale.config import Recipe, resolved
from vlscale.data.dataset import open_dataset
from vlscale.errors import VlscaleError
from vlscale.models.generation import Generated
from vlscale.models.registry import build_model
from vlscale.models.unimo import UnimoForPretraining
from vlscale.ragged import RaggedBatch
from vlscale.report.evaluate import evaluate_run
from vlscale.report.heldout import HeldOut, open_heldout
from vlscale.report.runs import load_models, read_recipe
from vlscale.report.unimo_batches import make_batch, with_specials
from vlscale.report.unimo_captions import caption_images, judge
from vlscale.report.unimo_evaluate import evaluate_unimo, open_unimo_heldout
from vlscale.report.unimo_retrieval import recalls, retrieve_alone, similarities
from vlscale.report.unimo_table import ROWS
from vlscale.report.unimo_words import SHARE, masked_pieces

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory)


@pytest.fixture(scope="module")
def recipe(corpus: Path) -> Recipe:
    return small_recipe(corpus, steps=1, width=16, layers=1)


@pytest.fixture(scope="module")
def model(corpus: Path, recipe: Recipe) -> UnimoForPretraining:
    torch.manual_seed(99)
    data = open_dataset("pairs", corpus / "pairs")
    facts = {"vocab_size": data.texts.meta.vocabulary.size, "feature_dim": data.feature_dim}
    built = build_model(recipe.model, **facts, num_classes=data.num_classes)
    assert isinstance(built, UnimoForPretraining)
    return built.eval()


@pytest.fixture(scope="module")
def heldout(corpus: Path) -> HeldOut:
    return open_heldout(open_dataset("val_pairs", corpus / "val_pairs"), 3, 48, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, model: UnimoForPretraining) -> Path:
    """A run folder as training leaves it, of a model that learnt nothing."""
    folder = tmp_path_factory.mktemp("unimo-run")
    model.save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved(recipe)))
    return folder


def answering_as(model: UnimoForPretraining, **methods: Callable[..., Any]) -> UnimoForPretraining:
    """A copy of a model some of whose methods are replaced."""
    copy = UnimoForPretraining(model.config).eval()
    for name, method in methods.items():
        object.__setattr__(copy, name, method)
    return copy


def test_similar_scores_give_recall_and_ties_give_chance() -> None:
    images = np.arange(20)
    perfect, none = recalls(np.eye(20), images), recalls(np.zeros((20, 20)), images)
    assert {name: found.mean for name, found in perfect.items()} == dict.fromkeys(perfect, 1.0)
    assert {name: found.mean for name, found in none.items()} == {
        name: pytest.approx(found.chance) for name, found in none.items()
    }
    assert [none[f"i2t_r{rank}"].chance for rank in (1, 5, 10)] == [0.05, 0.25, 0.5]
    lopsided = np.eye(20)
    lopsided[:, 0] = 2  # every text likes image 0 best; every image still likes its own text best, but the first
    found = recalls(lopsided, images)
    assert found["t2i_r1"].mean == pytest.approx(1 / 20)
    assert found["i2t_r1"].mean == pytest.approx((19 + 1 / 20) / 20)


def test_similarities_are_those_of_pre_training(model: UnimoForPretraining) -> None:
    generator = torch.Generator().manual_seed(1)
    text_QH, image_CH = (torch.rand(count, model.config.hidden_size, generator=generator) for count in (5, 7))
    with torch.no_grad():
        fused = similarities(model, text_QH, image_CH, "mul_fc")
        one = model.match_pooled(text_QH[3:4], image_CH[6:7])
        assert fused.shape == (5, 7)
        torch.testing.assert_close(fused[3, 6], one[0])
        dot, cosine = (similarities(model, text_QH, image_CH, kind) for kind in ("dot", "cosine"))
    torch.testing.assert_close(dot[2, 4], text_QH[2] @ image_CH[4])
    torch.testing.assert_close(cosine[2, 4], dot[2, 4] / (text_QH[2].norm() * image_CH[4].norm()))


def test_retrieval_encodes_each_alone(model: UnimoForPretraining, heldout: HeldOut) -> None:
    """A model that pools what it is told of an image and a caption finds all; one of random weights is at chance."""
    captions = heldout.captions()
    assert len(captions) == 120
    shown = {int(heldout.first_image[row]): number for number, row in enumerate(captions)}
    ids = {tuple(text.tolist()): number for number, text in enumerate(with_specials(heldout.dataset, captions))}
    eye = torch.eye(len(captions))

    def pool_image(encoded: Any) -> torch.Tensor:
        return eye[[shown[image] for image in encoded.images.tolist()]]

    def pool_text(encoded: Any) -> torch.Tensor:
        assert not encoded.boxes.shape[0]
        texts = encoded.input_ids.split(encoded.text_lengths.tolist())
        return eye[[ids[tuple(text.tolist())] for text in texts]]

    oracle = answering_as(model, encode=lambda batch: batch, pool_image=pool_image, pool_text=pool_text)
    assert retrieve_alone(oracle, heldout, "dot")["t2i_r1"].mean > 0.95  # some scenes have equal captions
    guessed = retrieve_alone(model, heldout, "cosine")
    assert guessed["i2t_r1"].extra["candidates"] == 120
    assert guessed["t2i_r10"].mean < 0.25


def test_masked_pieces_are_asked_for_one_by_one(model: UnimoForPretraining, corpus: Path) -> None:
    texts = open_dataset("val_texts", corpus / "val_texts")
    vocabulary = texts.texts.meta.vocabulary
    counts = np.bincount(texts.texts.input_ids(np.arange(len(texts.texts)))[0], minlength=vocabulary.size)
    said, seen = int(counts.argmax()), []

    def encode(batch: RaggedBatch) -> RaggedBatch:
        seen.append(batch)
        return batch

    def mlm_logits(batch: RaggedBatch, positions: torch.Tensor) -> torch.Tensor:
        assert (batch.input_ids[positions] == vocabulary.mask).all()
        assert (batch.input_ids == vocabulary.mask).sum() == len(positions)
        return torch.zeros(len(positions), vocabulary.size).index_fill(1, torch.tensor([said]), 1.0)

    always = masked_pieces(answering_as(model, encode=encode, mlm_logits=mlm_logits), texts, 1, 48)["text_accuracy"]
    assert 0 < always.mean <= always.chance
    pieces = sum(batch.input_ids.numel() - 2 * len(batch) for batch in seen)
    assert len(always) == pytest.approx(SHARE * pieces, rel=0.2)
    assert all(not batch.boxes.shape[0] for batch in seen)
    again = masked_pieces(model, texts, 1, 48)["text_accuracy"]
    assert len(again) == len(always)  # the draws do not depend on the model
    assert again.chance == always.chance


def test_captions_of_a_model_that_says_what_is_there(model: UnimoForPretraining, heldout: HeldOut) -> None:
    vocabulary = heldout.dataset.texts.meta.vocabulary
    whole = dict(zip(heldout.first_image[heldout.captions()].tolist(), heldout.captions().tolist(), strict=True))

    def generate(batch: RaggedBatch, **arguments: Any) -> Generated:
        assert batch.input_ids.tolist() == [vocabulary.cls, vocabulary.sep] * len(batch)
        rows = np.array([whole[image] for image in batch.images.tolist()])
        texts = [torch.from_numpy(text) for text in with_specials(heldout.dataset, rows)]
        lengths = torch.tensor([[len(text)] for text in texts])
        sequences = torch.nn.utils.rnn.pad_sequence(texts, True, vocabulary.pad)[:, None]
        none = torch.zeros(lengths.shape)
        return Generated(sequences, lengths, lengths > 0, none, none[..., None])

    found = caption_images(answering_as(model, generate=generate), heldout)
    assert found.captions[5] == found.references[5][0]
    outcomes = judge(found, heldout)
    assert outcomes["caption_bleu4"].mean == pytest.approx(1, abs=1e-6)
    assert outcomes["caption_precision"].mean == 1
    assert outcomes["caption_recall"].mean > 0.99
    baseline = outcomes["caption_cider"].baseline
    assert baseline is not None
    assert outcomes["caption_cider"].mean > 2 > baseline
    random = judge(caption_images(model, heldout, most=20), heldout)
    assert random["caption_bleu4"].mean < 0.05
    assert len(random["caption_cider"]) == 20


def test_a_batch_may_lack_images_or_texts(heldout: HeldOut) -> None:
    texts = with_specials(heldout.dataset, np.array([0, 1]))
    batch = make_batch(heldout.dataset, [texts[0], np.zeros(0, np.int64), texts[1]], np.array([-1, 4, 4]), 3)
    assert batch.text_lengths.tolist() == [len(texts[0]), 0, len(texts[1])]
    assert batch.region_counts.tolist() == [0, 3, 3]
    assert torch.equal(batch.features[:3], batch.features[3:])


def test_a_run_from_its_folder_to_its_summary(run: Path) -> None:
    console = Console(width=100)
    with console.capture() as captured:
        path = evaluate_run(run, (), console)
    found = json.loads(path.read_text())
    assert tuple(found["metrics"]) == tuple(ROWS)
    assert found["left_out"] == {}
    assert {name: row for name, row in found["metrics"].items() if "interval" not in row}.keys() == {"caption_bleu4"}
    assert found["metrics"]["i2t_r1"]["candidates"] == 120
    assert found["metrics"]["caption_bleu4"]["n"] == 120
    assert found["metrics"]["t2i_r5"]["trained"] < 0.3
    assert (run / "captions.png").stat().st_size > 10_000
    assert "captions, BLEU-4" in captured.get()
    with console.capture():
        evaluate_run(run, (), console)
    assert json.loads(path.read_text()) == found


def test_what_the_data_do_not_allow_is_left_out(run: Path, corpus: Path) -> None:
    only = f"data.validation=[{{name: t, root: {corpus / 'val_texts'}}}]"
    found = json.loads(evaluate_run(run, (only,), Console(quiet=True)).read_text())
    assert tuple(found["metrics"]) == ("text_accuracy",)
    assert "no validation dataset has images" in found["left_out"]["caption_cider"]
    recipe = read_recipe(run, (f"data.validation=[{{name: p, root: {corpus / 'val_pairs'}}}]",))
    trained, _ = load_models(run, recipe)
    assert isinstance(trained, UnimoForPretraining)
    measured = evaluate_unimo(trained, open_unimo_heldout(recipe, trained, run), recipe)
    assert set(measured.left_out) == {"text_accuracy"}


def test_mistakes_are_one_line(run: Path, corpus: Path, tmp_path: Path) -> None:
    def message(folder: Path, *overrides: str) -> str:
        with pytest.raises(VlscaleError) as caught:
            evaluate_run(folder, overrides, Console(quiet=True))
        return str(caught.value)

    images = f"data.validation=[{{name: i, root: {corpus / 'images'}}}]"
    assert "neither images with captions nor texts" in message(run, images)
    other = f"data.validation=[{{name: o, root: {ROOT / 'tests/fixtures/demo/val'}}}]"
    assert "but the model in" in message(run, other)
    untold = tmp_path / "untold"
    shutil.copytree(corpus / "val_pairs", untold)
    (untold / "texts" / "tokenizer.json").unlink()
    index = json.loads((untold / "texts" / "index.json").read_text())
    (untold / "texts" / "index.json").write_text(json.dumps(index))
    assert "tokenizer.json" in message(run, f"data.validation=[{{name: u, root: {untold}}}]")


def test_the_command_line_picks_by_the_model(run: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *arguments]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    good = call("--run", str(run), "--set", "seed=7")
    assert good.returncode == 0, good.stderr
    assert "caption -> image R@10" in good.stdout
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    bad = call("--run", str(tmp_path))
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "no model yet" in bad.stderr
