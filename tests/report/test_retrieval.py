from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.report.scenes import GuessingModel, IndifferentModel, OracleModel, heldout, make_scenes
from vlscale.report.heldout import HeldOut
from vlscale.report.outcome import UnmeasurableError
from vlscale.report.retrieval import choose_candidates, recall, retrieval


def test_one_who_knows_and_one_who_guesses(scenes: HeldOut) -> None:
    knows = retrieval(OracleModel(), scenes)
    assert list(knows) == ["i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5"]
    assert all(outcome.mean == 1.0 and len(outcome) == 100 for outcome in knows.values())
    assert [outcome.chance for outcome in knows.values()] == [0.01, 0.05, 0.01, 0.05]
    guesses = retrieval(GuessingModel(), scenes)
    assert all(outcome.mean <= outcome.chance + 0.06 for outcome in guesses.values())


def test_one_who_cannot_tell_is_exactly_at_chance(scenes: HeldOut) -> None:
    for outcome in retrieval(IndifferentModel(), scenes).values():
        assert outcome.mean == pytest.approx(outcome.chance)


def test_the_two_directions_are_not_mixed_up(scenes: HeldOut) -> None:
    class DeafToSilence(OracleModel):
        """Prefers images that show little else, but does not mind a caption that names only part of an image."""

        def itm_logits(self, encoded):
            logits = super().itm_logits(encoded)
            named, shown = self._sets(encoded.batch)
            logits[:, 1] = (named & shown).sum(1) / named.sum(1) - 0.01 * shown.sum(1)
            return logits

    found = retrieval(DeafToSilence(), scenes)
    named = scenes.named(choose_candidates(scenes, 100))
    subsets = (named[:, None] <= named[None]).all(2).sum(0)
    assert subsets.max() > 1
    assert found["t2i_r1"].mean == 1.0
    assert found["i2t_r1"].mean == pytest.approx((1 / subsets).mean())


def test_recall() -> None:
    scores = np.array([[3.0, 2, 1], [5, 4, 9], [7, 7, 7]])
    assert recall(scores, 1).tolist() == pytest.approx([1, 0, 1 / 3])
    assert recall(scores, 2).tolist() == pytest.approx([1, 0, 2 / 3])
    assert recall(scores, 5).tolist() == [1, 1, 1]


def test_candidates_are_different_images_of_different_things(scenes: HeldOut) -> None:
    texts = choose_candidates(scenes, 100)
    assert len(texts) == 100
    assert len(np.unique(scenes.first_image[texts])) == 100
    assert len(np.unique(scenes.contains[scenes.first_image[texts]], axis=0)) == 100
    assert (texts == choose_candidates(scenes, 100)).all()
    assert (np.diff(texts) < 0).any()


def test_images_of_the_same_things_come_last(scenes: HeldOut) -> None:
    twins = scenes.contains.copy()
    twins[1::2] = twins[::2]
    texts = choose_candidates(HeldOut(**{**vars(scenes), "contains": twins}), 120)
    first = twins[scenes.first_image[texts[:60]]]
    assert len(np.unique(first, axis=0)) == 60
    assert len(texts) == 120


def test_few_images(tmp_path: Path) -> None:
    few = retrieval(OracleModel(), heldout(make_scenes(tmp_path / "few", 3)))
    assert few["i2t_r1"].chance == pytest.approx(1 / 3)
    assert few["i2t_r5"].chance == 1.0
    assert few["i2t_r1"].extra == {"candidates": 3}
    with pytest.raises(UnmeasurableError, match="two images"):
        retrieval(OracleModel(), heldout(make_scenes(tmp_path / "one", 1)))


def test_without_ground_truth_any_captions_serve(bare: HeldOut) -> None:
    found = retrieval(GuessingModel(), bare)
    assert found["t2i_r1"].extra == {"candidates": 20}
