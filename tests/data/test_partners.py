"""Negatives of image-text matching: labels, partners, and where partners come from."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.data.order import PassOrder, Taken, Window
from vlscale.data.partners import FEW_IMAGES, Partners
from vlscale.data.random import Draws
from vlscale.data.survey import survey
from vlscale.errors import VlscaleError


def partners_of(lengths, replace="image", probability=0.5, longest=99):
    return Partners(
        lengths, survey(lengths, longest, 100), Draws(1, lengths.name), probability, replace, max_text_tokens=longest
    )


def taken(lengths, rows, passes):
    """These texts, as if all of the dataset were one window."""
    window = Window(lengths, np.arange(len(lengths)))
    return Taken(np.asarray(rows), np.asarray(passes), [(0, len(rows), window)])


def many(lengths, passes=60):
    rows = np.tile(np.arange(len(lengths)), passes)
    return rows, np.repeat(np.arange(passes), len(lengths))


@pytest.mark.parametrize("replace", ["image", "text", "both"])
@pytest.mark.parametrize("second_image", [False, True])
def test_negatives_never_share_an_image(replace, second_image):
    lengths = toy_lengths(images=6, second_image=second_image)
    rows, passes = many(lengths)
    texts, images, labels = partners_of(lengths, replace).draw(taken(lengths, rows, passes))
    first = lengths.first_image(rows)
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
    _, images, _ = partners_of(lengths, probability=1.0).draw(taken(lengths, rows, passes))
    for row in (0, 9):
        own = lengths.first_image(np.array([row]))[0]
        counts = np.bincount(images[rows == row], minlength=5)
        assert counts[own] == 0
        # 2000 draws over 4 images; standard deviation 19.
        assert np.abs(np.delete(counts, own) - 500).max() < 100


def test_replaced_texts_are_uniform_over_the_eligible_others():
    lengths = toy_lengths(images=3, texts_per_image=(2, 2))
    lengths.tokens[:] = [5, 5, 5, 30, 5, 5]
    rows, passes = np.zeros(4000, np.int64), np.arange(4000)
    texts, _, _ = partners_of(lengths, "text", 1.0, longest=20).draw(taken(lengths, rows, passes))
    counts = np.bincount(texts, minlength=6)
    assert counts[[0, 1, 3]].tolist() == [0, 0, 0]
    assert np.abs(counts[[2, 4, 5]] - 4000 / 3).max() < 150


def test_draws_depend_on_pass_and_row_only():
    lengths = toy_lengths()
    rows, passes = many(lengths, 3)
    together = partners_of(lengths, "both").draw(taken(lengths, rows, passes))
    shuffled = np.random.default_rng(0).permutation(len(rows))
    apart = partners_of(lengths, "both").draw(taken(lengths, rows[shuffled], passes[shuffled]))
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
    texts, images, labels = partners_of(lengths, "text", 1.0).draw(taken(lengths, rows, np.zeros(100, np.int64)))
    assert set(texts.tolist()) == {4000}
    assert not images.any()
    assert not labels.any()


def test_explicit_list_of_images(monkeypatch):
    lengths = toy_lengths(images=4)
    rows, passes = many(lengths, 2)
    monkeypatch.setattr("vlscale.data.partners._TRIALS", 0)
    _, images, _ = partners_of(lengths, "image", 1.0).draw(taken(lengths, rows, passes))
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
        partners_of(lengths, "image", 1.0).draw(taken(lengths, rows, passes))


@pytest.mark.parametrize("replace", ["image", "text", "both"])
def test_partners_come_from_the_window(replace):
    """So that a negative needs no shard but those of its window."""
    lengths = toy_lengths(images=600, texts_per_image=(1, 5), shard=60, second_image=True)
    order = PassOrder(lengths, survey(lengths, 99, 100), seed=1, window_shards=8, max_text_tokens=99)
    partners = partners_of(lengths, replace, probability=1.0)
    taken_ = order.take(0, 0, len(order))
    texts, images, labels = partners.draw(taken_)
    assert not labels.any()
    assert len(taken_.pieces) > 3
    for begin, end, window in taken_.pieces:
        assert len(window.images) >= FEW_IMAGES
        assert np.isin(images[begin:end], window.images).all()
        assert np.isin(texts[begin:end], window.rows).all()
        # ... and from all of it: some hundred draws from some hundred images.
        assert len(set(images[begin:end].tolist())) > 0.5 * len(window.images)


def test_a_window_of_few_images_draws_from_the_whole_dataset():
    lengths = toy_lengths(images=100, texts_per_image=(1, 1), shard=10)
    order = PassOrder(lengths, survey(lengths, 99, 100), seed=1, window_shards=1, max_text_tokens=99)
    taken_ = order.take(0, 0, 100)
    _, images, _ = partners_of(lengths, probability=1.0).draw(taken_)
    own_window = [np.isin(images[begin:end], window.images) for begin, end, window in taken_.pieces]
    assert np.concatenate(own_window).mean() < 0.3


def test_partners_do_not_depend_on_how_the_order_is_cut():
    lengths = toy_lengths(images=600, texts_per_image=(1, 3), shard=60)
    order = PassOrder(lengths, survey(lengths, 99, 100), seed=1, window_shards=8, max_text_tokens=99)
    partners = partners_of(lengths, "both")
    whole = partners.draw(order.take(0, 0, 700))
    pieces = [partners.draw(order.take(0, begin, 70)) for begin in range(0, 700, 70)]
    for place in range(3):
        assert np.array_equal(whole[place], np.concatenate([piece[place] for piece in pieces]))
