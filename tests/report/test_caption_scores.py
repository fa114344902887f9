"""Scores of captions: known values, words, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from vlscale.errors import VlscaleError
from vlscale.report.caption_scores import score_captions, words_of

REFERENCES = [
    ["a cat and a dog sit here", "there is a cat above a dog"],
    ["a big red ball on grass", "a ball is left of a cup"],
    ["an apple next to a pear", "a pear beside an apple"],
]


def test_the_references_themselves_score_best() -> None:
    best = score_captions([group[0] for group in REFERENCES], REFERENCES)
    assert best.bleu4 == pytest.approx(1, abs=1e-6)
    moved = score_captions([group[0] for group in REFERENCES[1:] + REFERENCES[:1]], REFERENCES)
    assert moved.bleu4 < 0.2
    assert best.cider.mean() > moved.cider.mean() + 3
    assert best.cider.shape == (3,)


def test_bleu_by_hand() -> None:
    """Five of six words, then 4 of 5, 3 of 4 and 2 of 3 n-grams agree; as long as the reference."""
    found = score_captions(["a b c d e x"], [["a b c d e f"]])
    assert found.bleu4 == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25, rel=1e-6)


def test_case_and_punctuation_do_not_count() -> None:
    assert words_of("A dog, and 2 CATS.") == ["a", "dog", "and", "2", "cats"]
    plain = score_captions(["a cat and a dog sit here", "x", ""], REFERENCES)
    written = score_captions(["A cat, and a dog: sit here!", "X.", "..."], REFERENCES)
    assert plain.bleu4 == written.bleu4
    np.testing.assert_array_equal(plain.cider, written.cider)


def test_nothing_said_scores_nothing() -> None:
    found = score_captions(["", "", ""], REFERENCES)
    assert found.bleu4 == pytest.approx(0, abs=1e-6)
    assert not found.cider.any()


def test_mistakes() -> None:
    with pytest.raises(VlscaleError, match="give one for each"):
        score_captions(["a"], REFERENCES)
    with pytest.raises(VlscaleError, match="give one for each"):
        score_captions([], [])
    with pytest.raises(VlscaleError, match="image 1 has no reference"):
        score_captions(["a", "b"], [["a"], []])
