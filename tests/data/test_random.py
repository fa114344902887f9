"""Philox4x32-10 against the published test vectors (Random123's kat_vectors), and the statistics of the draws."""

from __future__ import annotations

import numpy as np
import pytest

from vlscale.data.random import Draws, philox4x32


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    words = philox4x32(np.array(counter, np.uint32), key)
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_vectorised_equals_one_by_one():
    draws = Draws(3, "coco")
    examples, index = np.arange(50), np.arange(7)
    together = draws.bits("mask", 2, examples[:, None], index)
    assert together.shape == (50, 7, 4)
    for example in (0, 17, 49):
        for place in (0, 6):
            assert np.array_equal(together[example, place], draws.bits("mask", 2, example, place))


def test_every_part_of_the_key_matters():
    base = Draws(1, "a").bits("mask", 0, 5, 2)
    others = [
        Draws(2, "a").bits("mask", 0, 5, 2),
        Draws(1, "b").bits("mask", 0, 5, 2),
        Draws(1, "a").bits("label", 0, 5, 2),
        Draws(1, "a").bits("mask", 1, 5, 2),
        Draws(1, "a").bits("mask", 0, 6, 2),
        Draws(1, "a").bits("mask", 0, 5, 3),
        Draws(1, "a").bits("mask", 0, 5 + (1 << 32), 2),
    ]
    assert len({tuple(words) for words in [base, *others]}) == 8


def test_uniform_statistics():
    numbers = Draws(0, "x").uniform("mask", 0, np.arange(50_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # Standard error of the mean of 50,000 uniforms is .0013.
    assert np.abs(numbers.mean(0) - 0.5).max() < 0.006
    assert np.abs(numbers.var(0) - 1 / 12).max() < 0.003
    correlation = np.corrcoef(np.concatenate([numbers.T, np.roll(numbers, 1, axis=0).T]))
    assert np.abs(correlation - np.eye(8)).max() < 0.02
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)


def test_below_is_in_range_and_even():
    drawn = Draws(0, "x").below("partner", 10, 1, np.arange(100_000))
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert float(((counts - 1e4) ** 2 / 1e4).sum()) < 9 + 5 * np.sqrt(18)
    bounds = np.arange(1, 1001)
    assert np.all(Draws(0, "x").below("partner", bounds, 0, np.arange(1000)) < bounds)
