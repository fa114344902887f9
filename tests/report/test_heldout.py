from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.report.scenes import REGIONS, THINGS, TOKENS, VOCABULARY, heldout, make_scenes, open_scenes
from vlscale.data.store_writer import ImageWriter, TextWriter
from vlscale.errors import VlscaleError
from vlscale.report import heldout as module
from vlscale.report.heldout import HeldOut, answering, open_heldout
from vlscale.report.outcome import UnmeasurableError

DOG = TOKENS.index("dog")


def test_mentions_point_at_what_they_name(scenes: HeldOut) -> None:
    assert set(scenes.things) == set(THINGS)
    for text, image, start, end, region, thing in zip(*dataclasses.asdict(scenes.mentions).values(), strict=True):
        ids = scenes.dataset.texts.row(int(text))["input_ids"][start:end]
        word = "".join(VOCABULARY.tokens[i].removeprefix("##") for i in ids)
        assert word == scenes.things[thing] == scenes.dataset.images.row(int(image))["extra"]["things"][region]
    assert scenes.contains.sum(1).max() == 4
    assert scenes.contains[scenes.mentions.image, scenes.mentions.thing].all()


def test_captions_are_the_lists_or_all_texts(scenes: HeldOut, bare: HeldOut) -> None:
    assert len(scenes.captions()) == 120
    assert {scenes.kinds[row] for row in scenes.captions()} == {"list"}
    assert len(bare.captions()) == len(bare.dataset) == 40


def test_long_texts_and_regions_beyond_the_first_n_are_left_out(scenes_root: Path) -> None:
    short = heldout(scenes_root, max_text_tokens=5)
    assert all(short.dataset.texts.lengths[short.texts] <= 5)
    assert 0 < len(short.texts) < len(short.dataset)
    assert set(short.mentions.text) <= set(short.texts)
    few = heldout(scenes_root, max_regions=2)
    assert len(few.mentions)
    assert few.mentions.region.max() == 1


def test_batches_hold_every_pair_once_and_in_order(scenes: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    texts = scenes.texts[:50]
    images = np.roll(scenes.first_image[texts], 7)
    seen, parts = [], 0
    for part, batch in scenes.batches("mlm", texts, images):
        assert batch.tokens <= 100
        assert batch.images.tolist() == images[part].tolist()
        assert batch.examples.tolist() == texts[part].tolist()
        assert batch.region_counts.tolist() == [REGIONS] * len(batch)
        seen += batch.images.tolist()
        parts += 1
    assert seen == images.tolist()
    assert parts > 5


def test_a_pair_above_the_budget_still_gets_its_batch(scenes: HeldOut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 1)
    sizes = [len(batch) for _, batch in scenes.batches("mlm", scenes.texts[:3], scenes.first_image[:3])]
    assert sizes == [1, 1, 1]


def test_wrong_images_are_never_the_own_one_and_obey_the_rule(scenes: HeldOut) -> None:
    texts = scenes.texts
    drawn = scenes.wrong_images("p", texts, lambda at, images: images % 2 == texts[at] % 2)
    assert (drawn % 2 == texts % 2).all()
    assert (drawn != scenes.first_image[texts]).all()
    assert len(np.unique(drawn)) > 60
    assert (drawn == scenes.wrong_images("p", texts, lambda at, images: images % 2 == texts[at] % 2)).all()
    assert (drawn != scenes.wrong_images("q", texts, lambda at, images: images % 2 == texts[at] % 2)).any()
    with pytest.raises(UnmeasurableError, match="no wrong image for text row 0"):
        scenes.wrong_images("p", texts, lambda at, images: images < 0)


def test_answering_switches_dropout_and_gradients_off_and_restores_both() -> None:
    layer = torch.nn.Linear(2, 2).train()
    with answering(layer):
        assert not layer.training
        assert not torch.is_grad_enabled()
    assert layer.training
    assert torch.is_grad_enabled()


def _one_scene(root: Path, image_extra: dict[str, Any], text_extra: dict[str, Any]) -> Path:
    with ImageWriter(root, 4, "float32") as images:
        boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
        images.write("a", 8, 8, np.zeros((2, 4)), boxes, np.ones(2), image_extra)
    with TextWriter(root, VOCABULARY, images.rows) as texts:
        texts.write("a-0", "a dog", np.array([5, DOG]), ["a"], text_extra)
    return root


@pytest.mark.parametrize(
    ("image_extra", "text_extra", "message"),
    [
        ({}, {"spans": [[1, 3, 0]]}, "row 0: extra.spans"),
        ({}, {"spans": [[1, 1, 0]]}, "row 0: extra.spans"),
        ({}, {"spans": [[-1, 1, 0]]}, "row 0: extra.spans"),
        ({}, {"spans": [[0, 1, 2]]}, "row 0: extra.spans"),
        ({}, {"spans": [[0, 1.0, 0]]}, "row 0: extra.spans"),
        ({}, {"spans": {"0": 1}}, "row 0: extra.spans"),
        ({"things": ["dog"]}, {}, "row 0: extra.things is not a list of 2"),
        ({"things": [3, None]}, {}, "row 0: extra.things is not a list of 2"),
        ({"things": ["dog", None]}, {"spans": [[1, 2, 1]]}, "row 0: a span points at region 1"),
    ],
)
def test_bad_ground_truth_is_one_line(
    tmp_path: Path, image_extra: dict[str, Any], text_extra: dict[str, Any], message: str
) -> None:
    root = _one_scene(tmp_path / "one", image_extra, text_extra)
    with pytest.raises(VlscaleError, match=message) as caught:
        heldout(root)
    assert "build" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_recorded_things_the_word_itself_is_the_thing(tmp_path: Path) -> None:
    found = heldout(_one_scene(tmp_path / "one", {}, {"kind": 3, "spans": [[1, 2, 1]]}))
    assert found.things == ("dog",)
    assert found.contains.tolist() == [[True]]
    assert found.kinds == ("",)


def test_words_outside_the_vocabulary_are_not_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "unknown"
    with ImageWriter(root, 4, "float32") as images:
        images.write("a", 8, 8, np.zeros((2, 4)), np.array([[0, 0, 1, 1]] * 2), np.ones(2), {"things": ["dog", "yak"]})
    with TextWriter(root, VOCABULARY, images.rows) as texts:
        texts.write("a-0", "dog a yak", np.array([DOG, 5, VOCABULARY.unk]), ["a"], {"spans": [[0, 1, 0], [2, 3, 1]]})
        texts.write("a-1", "yak dog", np.array([VOCABULARY.unk, DOG]), ["a"], {"spans": [[0, 1, 1], [1, 2, 0]]})
    found = heldout(root)
    assert len(found.mentions) == 4
    assert found.spelt_mentions().start.tolist() == [0, 1]
    every_unknown = dataclasses.replace(found, mentions=found.mentions.where(found.mentions.region == 1))
    with pytest.raises(UnmeasurableError, match=r"\[UNK\]"):
        every_unknown.spelt_mentions()


def test_another_seed_draws_otherwise(scenes_root: Path) -> None:
    one, two = (open_heldout(open_scenes(scenes_root), seed, 40, 9) for seed in (1, 2))
    accept = lambda at, images: np.ones(len(at), bool)  # noqa: E731
    assert (one.wrong_images("p", one.texts, accept) != two.wrong_images("p", two.texts, accept)).any()


def test_scenes_of_this_test_are_distinct(tmp_path: Path) -> None:
    found = heldout(make_scenes(tmp_path / "s", 50))
    assert len(np.unique(found.contains, axis=0)) == 50
