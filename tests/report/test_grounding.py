from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.report.scenes import THINGS, TOKENS, GuessingModel, IndifferentModel, OracleModel
from vlscale.errors import VlscaleError
from vlscale.report.grounding import masked_regions, masked_words, matching
from vlscale.report.heldout import HeldOut
from vlscale.report.outcome import UnmeasurableError


def test_masked_words_of_one_who_knows(scenes: HeldOut) -> None:
    found = masked_words(OracleModel(), scenes)
    right, wrong = found["mlm_accuracy"], found["mlm_accuracy_wrong_image"]
    assert len(right) == len(scenes.mentions)
    assert right.extra["by_kind"]["list"]["value"] == 1.0
    assert right.extra["by_kind"]["list"]["n"] + right.extra["by_kind"]["single"]["n"] == len(right)
    # A single mention hides which of the scene's things is meant; the oracle then takes the first one.
    assert right.extra["ceiling"] == pytest.approx(right.mean, abs=0.05)
    assert right.extra["ceiling"] < 0.95
    assert wrong.mean == 0.0
    assert found["grounding"].mean == pytest.approx(right.mean - wrong.mean)
    # Three of the four things of a scene are named at most, so no thing has far more than its eighth.
    assert 1 / len(THINGS) <= right.chance < 1.5 / len(THINGS)


def test_masked_words_of_one_who_guesses(scenes: HeldOut) -> None:
    found = masked_words(GuessingModel(), scenes)
    for name in ("mlm_accuracy", "mlm_accuracy_wrong_image"):
        assert found[name].mean == pytest.approx(1 / len(THINGS), abs=0.06)
    assert found["grounding"].mean == pytest.approx(0.0, abs=0.07)
    low, high = found["grounding"].interval(0)
    assert low < 0 < high


def test_a_word_of_two_pieces_needs_both(scenes: HeldOut) -> None:
    class FirstPieceOnly(OracleModel):
        def mlm_logits(self, encoded, positions):
            logits = super().mlm_logits(encoded, positions)
            logits[:, TOKENS.index("##at")] = -1.0
            return logits

    goat = scenes.things.index("goat")
    asked = scenes.mentions.thing == goat
    listed = np.array([scenes.kinds[text] == "list" for text in scenes.mentions.text])
    values = masked_words(FirstPieceOnly(), scenes)["mlm_accuracy"].values
    assert values[asked].max() == 0.0
    assert values[listed & ~asked].min() == 1.0


def test_masked_regions_of_one_who_knows(scenes: HeldOut) -> None:
    found = masked_regions(OracleModel(), scenes)
    assert found["mrc_accuracy"].mean == 1.0
    assert found["mrfr_relative_error"].mean < 0.01
    assert 1 / len(THINGS) <= found["mrc_accuracy"].chance < 1.5 / len(THINGS)
    assert len(found["mrc_accuracy"]) == sum(scenes.kinds[text] == "list" for text in scenes.mentions.text)


def test_masked_regions_of_one_who_guesses(scenes: HeldOut) -> None:
    found = masked_regions(GuessingModel(), scenes)
    assert found["mrc_accuracy"].mean == pytest.approx(1 / len(THINGS), abs=0.06)
    assert found["mrfr_relative_error"].mean > 1.5


def test_predicting_the_mean_feature_has_relative_error_one(scenes: HeldOut) -> None:
    mentions = scenes.mentions.where(np.isin(scenes.mentions.text, scenes.captions()))
    features, _, counts, _ = scenes.dataset.images.regions(mentions.image, 5)
    mean = features[np.cumsum(counts) - counts + mentions.region].mean(0)

    class Mean(GuessingModel):
        def predict_features(self, encoded, positions):
            return torch.from_numpy(mean).expand(len(positions), -1)

    assert masked_regions(Mean(), scenes)["mrfr_relative_error"].mean == pytest.approx(1.0, abs=1e-5)


def test_background_is_never_a_target(scenes: HeldOut) -> None:
    favoured = 5  # with this class as background every target of it falls back to the next best, class 0
    labels = masked_regions(OracleModel(), scenes, background_class=favoured)["mrc_accuracy"]
    assert 0.7 < labels.mean < 0.95


def test_matching(scenes: HeldOut) -> None:
    knows, guesses, same = (
        matching(model, scenes)["itm_accuracy"] for model in (OracleModel(), GuessingModel(), IndifferentModel())
    )
    assert len(knows) == 2 * len(scenes.captions())
    assert knows.mean == 1.0
    assert guesses.mean == pytest.approx(0.5, abs=0.1)
    assert same.mean == 0.5


def test_a_wrong_image_makes_its_caption_false(scenes: HeldOut) -> None:
    pairs = []

    class Listener(OracleModel):
        def encode(self, batch):
            pairs.append((batch.examples.numpy(), batch.images.numpy()))
            return super().encode(batch)

    matching(Listener(), scenes)
    texts, images = (np.concatenate(part) for part in zip(*pairs, strict=True))
    half = len(texts) // 2
    assert (texts[:half] == texts[half:]).all()
    assert (images[:half] == scenes.first_image[texts[:half]]).all()
    assert (scenes.named(texts[half:]) & ~scenes.contains[images[half:]]).any(1).all()


def test_without_ground_truth_only_matching_is_left(bare: HeldOut) -> None:
    assert len(matching(OracleModel(), bare)["itm_accuracy"]) == 80
    with pytest.raises(UnmeasurableError, match="spans"):
        masked_words(OracleModel(), bare)
    with pytest.raises(UnmeasurableError, match="spans"):
        masked_regions(OracleModel(), bare)


def test_without_a_classes_store_features_are_still_asked_for(scenes: HeldOut) -> None:
    stores = {name: store for name, store in scenes.dataset.stores.items() if name != "classes"}
    dataset = type(scenes.dataset)("x", scenes.dataset.root, stores)
    found = masked_regions(OracleModel(), dataclasses.replace(scenes, dataset=dataset))
    assert set(found) == {"mrfr_relative_error"}


def test_scores_that_are_not_finite_are_an_error(scenes: HeldOut) -> None:
    class Broken(OracleModel):
        def itm_logits(self, encoded):
            return super().itm_logits(encoded) * torch.nan

    with pytest.raises(VlscaleError, match="not finite"):
        matching(Broken(), scenes)
