"""The order of a pass: windows of shards, rounds of images, and what it costs in memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.data.order import PassOrder, _shuffle_within
from vlscale.data.survey import survey


def order_of(lengths, seed=1, window=3, longest=99):
    return PassOrder(lengths, survey(lengths, longest, 100), seed, window, longest)


def whole_pass(order, pass_index=0):
    return order.take(pass_index, 0, len(order))


@pytest.mark.parametrize("without_image", [0, 7])
def test_a_pass_is_a_permutation_of_the_eligible_texts(without_image):
    lengths = toy_lengths(without_image=without_image)
    order = order_of(lengths, longest=15)
    eligible = np.flatnonzero(lengths.tokens <= 15)
    assert len(order) == len(eligible) < len(lengths)
    for pass_index in range(3):
        taken = whole_pass(order, pass_index)
        assert sorted(taken.rows.tolist()) == eligible.tolist()
        assert set(taken.passes.tolist()) == {pass_index}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_round_of_a_window_meets_an_image_at_most_once(ordered):
    lengths = toy_lengths(images=200, texts_per_image=(1, 6), shard=40)
    if not ordered:
        mixed = np.random.default_rng(0).permutation(lengths.image_refs)
        lengths = dataclasses.replace(lengths, image_refs=mixed)
    taken = whole_pass(order_of(lengths, window=5))
    assert len(taken.pieces) > 2
    for begin, end, window in taken.pieces:
        images = lengths.first_image(taken.rows[begin:end])
        assert np.array_equal(np.unique(images), window.images)
        place = 0
        counts = np.bincount(images)
        for turn in range(counts.max()):
            size = int((counts > turn).sum())
            assert len(set(images[place : place + size].tolist())) == size
            place += size
        assert place == end - begin


def test_an_image_stays_in_one_window():
    """All its texts are met while its shard is there, wherever the text shards were cut."""
    lengths = toy_lengths(images=300, texts_per_image=(1, 7), shard=11, without_image=40)
    taken = whole_pass(order_of(lengths, window=2))
    seen: set[int] = set()
    for begin, end, window in taken.pieces:
        assert np.array_equal(window.rows, taken.rows[begin:end])
        assert not seen & set(window.images.tolist())
        seen |= set(window.images.tolist())
    assert len(seen) == 300


def test_windows_hold_few_shards():
    lengths = toy_lengths(images=400, texts_per_image=(1, 1), shard=20)
    taken = whole_pass(order_of(lengths, window=4))
    shards = taken.rows // 20
    assert [end - begin for begin, end, _ in taken.pieces] == [80] * 5
    seen = [set(shards[begin:end].tolist()) for begin, end, _ in taken.pieces]
    assert all(len(window) == 4 for window in seen)
    assert len(set.union(*seen)) == 20
    # The shards themselves are shuffled, and the texts within a window are.
    assert [min(window) for window in seen] != sorted(min(window) for window in seen)
    assert np.abs(np.diff(shards[:80])).astype(bool).sum() > 40


def test_windows_of_a_pass_are_alike():
    lengths = toy_lengths(images=170, texts_per_image=(1, 1), shard=10)
    assert [end - begin for begin, end, _ in whole_pass(order_of(lengths, window=16)).pieces] == [80, 90]


def test_order_depends_on_seed_pass_and_name_only():
    lengths = toy_lengths()
    base = order_of(lengths).take(0, 0, 50).rows
    assert np.array_equal(base, order_of(lengths).take(0, 0, 50).rows)
    assert not np.array_equal(base, order_of(lengths).take(1, 0, 50).rows)
    assert not np.array_equal(base, order_of(lengths, seed=2).take(0, 0, 50).rows)
    assert not np.array_equal(base, order_of(toy_lengths(name="other")).take(0, 0, 50).rows)


def test_taking_in_pieces_equals_taking_at_once():
    order = order_of(toy_lengths())
    total = 2 * len(order) + 5
    taken = order.take(0, 0, total)
    rows, passes = taken.rows, taken.passes
    assert passes.tolist() == [0] * len(order) + [1] * len(order) + [2] * 5
    cursor, pieces = (0, 0), []
    rng = np.random.default_rng(0)
    while sum(map(len, pieces)) < total:
        count = min(int(rng.integers(1, 40)), total - sum(map(len, pieces)))
        pieces.append(order_of(toy_lengths()).take(*cursor, count).rows)
        cursor = order.advance(*cursor, count)
    assert np.array_equal(np.concatenate(pieces), rows)
    assert cursor == (2, 5)


def test_texts_of_an_image_come_in_every_round_equally_often():
    lengths = toy_lengths(images=300, texts_per_image=(4, 4), shard=100)
    order = order_of(lengths, window=100)
    places = np.zeros((4, 4), int)
    for pass_index in range(5):
        rows = whole_pass(order, pass_index).rows
        for round_index in range(4):
            chosen = rows[round_index * 300 : (round_index + 1) * 300] % 4
            places[round_index] += np.bincount(chosen, minlength=4)
    # 1500 draws per round, 375 expected per cell, standard deviation 17.
    assert np.abs(places - 375).max() < 90


def test_no_texts_at_all():
    assert len(order_of(toy_lengths(), longest=1)) == 0


@pytest.mark.parametrize("windows", [1, 2, 7])
def test_shuffle_within_windows(windows):
    window = np.random.default_rng(1).integers(0, windows, 1000)
    raw = np.random.Philox(key=5).random_raw(1000)
    order = _shuffle_within(window, raw)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.all(np.diff(window[order]) >= 0)
    # Equal random words change nothing: the order stays defined.
    assert np.array_equal(_shuffle_within(window, raw * 0), np.argsort(window, kind="stable"))


def test_frozen_example():
    """The order is part of the checkpoint format: who changes it raises ORDER_VERSION."""
    lengths = toy_lengths(images=6, texts_per_image=(2, 2), tokens=(5, 5), shard=3)
    assert order_of(lengths, seed=7, window=2).take(0, 0, 12).rows.tolist() == [10, 3, 0, 1, 11, 2, 7, 5, 9, 6, 4, 8]
