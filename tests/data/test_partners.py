from __future__ import annotations

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.data.partners import Partners
from vlscale.data.random import Draws
from vlscale.errors import VlscaleError


def partners_of(lengths, replace="image", probability=0.5, eligible=None):
    eligible = np.arange(len(lengths)) if eligible is None else eligible
    return Partners(lengths, eligible, Draws(1, lengths.name), probability, replace)


def many(lengths, passes=60):
    rows = np.tile(np.arange(len(lengths)), passes)
    return rows, np.repeat(np.arange(passes), len(lengths))


@pytest.mark.parametrize("replace", ["image", "text", "both"])
@pytest.mark.parametrize("second_image", [False, True])
def test_negatives_never_share_an_image(replace, second_image):
    lengths = toy_lengths(images=6, second_image=second_image)
    rows, passes = many(lengths)
    texts, images, labels = partners_of(lengths, replace).draw(rows, passes)
    first = lengths.first_image[rows]
    positive = labels == 1
    assert abs(positive.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(rows))
    assert np.array_equal(texts[positive], rows[positive])
    assert np.array_equal(images[positive], first[positive])
    assert not lengths.refers_to(texts[~positive], images[~positive]).any()
    swapped_text = (texts != rows)[~positive]
    swapped_image = (images != first)[~positive]
    assert np.all(swapped_text ^ swapped_image)  # one of the two, never both
    share = {"image": 0.0, "text": 1.0, "both": 0.5}[replace]
    assert abs(swapped_text.mean() - share) < 4 * 0.5 / np.sqrt((~positive).sum()) * (share == 0.5) + 1e-9


def test_replaced_images_are_uniform_over_the_others():
    lengths = toy_lengths(images=5, texts_per_image=(2, 2))
    rows, passes = many(lengths, 2000)
    _, images, _ = partners_of(lengths, probability=1.0).draw(rows, passes)
    for row in (0, 9):
        counts = np.bincount(images[rows == row], minlength=5)
        assert counts[lengths.first_image[row]] == 0
        # 2000 draws over 4 images; standard deviation 19.
        assert np.abs(np.delete(counts, lengths.first_image[row]) - 500).max() < 100


def test_replaced_texts_are_uniform_over_the_eligible_others():
    lengths = toy_lengths(images=3, texts_per_image=(2, 2))
    eligible = np.array([0, 1, 2, 4, 5])
    rows, passes = np.zeros(4000, np.int64), np.arange(4000)
    texts, _, _ = partners_of(lengths, "text", 1.0, eligible).draw(rows, passes)
    counts = np.bincount(texts, minlength=6)
    assert counts[[0, 1, 3]].tolist() == [0, 0, 0]
    assert np.abs(counts[[2, 4, 5]] - 4000 / 3).max() < 150


def test_draws_depend_on_pass_and_row_only():
    lengths = toy_lengths()
    rows, passes = many(lengths, 3)
    together = partners_of(lengths, "both").draw(rows, passes)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    apart = partners_of(lengths, "both").draw(rows[shuffled], passes[shuffled])
    for one, other in zip(together, apart, strict=True):
        assert np.array_equal(one[shuffled], other)


def test_partner_is_found_where_redrawing_hardly_ever_finds_one():
    """All texts but one belong to one image: the explicit list takes over."""
    lengths = toy_lengths(images=1, texts_per_image=(4000, 4000))
    lengths = type(lengths)(
        "lopsided",
        np.append(lengths.tokens, np.int32(5)),
        np.append(lengths.image_ptr, 4001),
        np.append(lengths.image_refs, 1),
        np.array([3, 3], np.int32),
        np.array([0, 4001]),
    )
    rows = np.arange(0, 4000, 40)
    texts, images, labels = partners_of(lengths, "text", 1.0).draw(rows, np.zeros(100, np.int64))
    assert set(texts.tolist()) == {4000}
    assert not images.any()
    assert not labels.any()


def test_explicit_list_of_images(monkeypatch):
    lengths = toy_lengths(images=4)
    rows, passes = many(lengths, 2)
    monkeypatch.setattr("vlscale.data.partners._TRIALS", 0)
    _, images, _ = partners_of(lengths, "image", 1.0).draw(rows, passes)
    assert not lengths.refers_to(rows, images).any()
    assert len(set(images.tolist())) == 4


@pytest.mark.parametrize("replace", ["image", "text", "both"])
def test_one_image_is_an_error(replace):
    lengths = toy_lengths(images=1)
    with pytest.raises(VlscaleError, match=r"dataset toy: task itm needs negatives, .* 1 image"):
        partners_of(lengths, replace)
    partners_of(lengths, replace, probability=0.0)


def test_a_text_that_refers_to_every_image_is_an_error():
    lengths = toy_lengths(images=2, second_image=True)
    rows, passes = many(lengths, 1)
    with pytest.raises(VlscaleError, match="text row 0 has no negative"):
        partners_of(lengths, "image", 1.0).draw(rows, passes)
