from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.data.order import PassOrder, _shuffle_within


def order_of(lengths, seed=1, window=3, longest=99):
    return PassOrder(lengths, seed, window, longest)


@pytest.mark.parametrize("without_image", [0, 7])
def test_a_pass_is_a_permutation_of_the_eligible_texts(without_image):
    lengths = toy_lengths(without_image=without_image)
    order = order_of(lengths, longest=15)
    assert order.left_out == int((lengths.tokens > 15).sum()) > 0
    assert len(order) + order.left_out == len(lengths)
    for pass_index in range(3):
        rows, passes = order.take(pass_index, 0, len(order))
        assert sorted(rows.tolist()) == np.flatnonzero(lengths.tokens <= 15).tolist()
        assert set(passes.tolist()) == {pass_index}


def test_a_round_meets_an_image_at_most_once():
    lengths = toy_lengths(texts_per_image=(1, 6))
    order = order_of(lengths)
    rows, _ = order.take(0, 0, len(order))
    counts = np.bincount(lengths.first_image, minlength=40)
    begin = 0
    for round_index in range(counts.max()):
        size = int((counts > round_index).sum())
        images = lengths.first_image[rows[begin : begin + size]]
        assert len(set(images.tolist())) == size
        begin += size
    assert begin == len(rows)


def test_windows_hold_few_shards():
    lengths = toy_lengths(images=400, texts_per_image=(1, 1), shard=20)
    rows, _ = order_of(lengths, window=4).take(0, 0, 400)
    shards = rows // 20
    seen = [set(shards[begin : begin + 80].tolist()) for begin in range(0, 400, 80)]
    assert all(len(window) == 4 for window in seen)
    assert len(set.union(*seen)) == 20
    # The shards themselves are shuffled, and the texts within a window are.
    assert [min(window) for window in seen] != sorted(min(window) for window in seen)
    assert np.abs(np.diff(shards[:80])).astype(bool).sum() > 40


def test_order_depends_on_seed_pass_and_name_only():
    lengths = toy_lengths()
    base, _ = order_of(lengths).take(0, 0, 50)
    assert np.array_equal(base, order_of(lengths).take(0, 0, 50)[0])
    assert not np.array_equal(base, order_of(lengths).take(1, 0, 50)[0])
    assert not np.array_equal(base, order_of(lengths, seed=2).take(0, 0, 50)[0])
    assert not np.array_equal(base, order_of(toy_lengths(name="other")).take(0, 0, 50)[0])


def test_taking_in_pieces_equals_taking_at_once():
    order = order_of(toy_lengths())
    total = 2 * len(order) + 5
    rows, passes = order.take(0, 0, total)
    assert passes.tolist() == [0] * len(order) + [1] * len(order) + [2] * 5
    cursor, pieces = (0, 0), []
    rng = np.random.default_rng(0)
    while sum(map(len, pieces)) < total:
        count = min(int(rng.integers(1, 40)), total - sum(map(len, pieces)))
        pieces.append(order_of(toy_lengths()).take(*cursor, count)[0])
        cursor = order.advance(*cursor, count)
    assert np.array_equal(np.concatenate(pieces), rows)
    assert cursor == (2, 5)


def test_texts_of_an_image_come_in_every_round_equally_often():
    lengths = toy_lengths(images=300, texts_per_image=(4, 4), shard=100)
    order = order_of(lengths)
    places = np.zeros((4, 4), int)
    for pass_index in range(5):
        rows, _ = order.take(pass_index, 0, 1200)
        for round_index in range(4):
            chosen = rows[round_index * 300 : (round_index + 1) * 300] % 4
            places[round_index] += np.bincount(chosen, minlength=4)
    # 1500 draws per round, 375 expected per cell, standard deviation 17.
    assert np.abs(places - 375).max() < 90


def test_no_texts_at_all():
    assert len(order_of(toy_lengths(), longest=1)) == 0


def test_texts_need_not_be_ordered_by_image():
    lengths = toy_lengths(images=20, texts_per_image=(3, 3), tokens=(5, 5))
    mixed = np.random.default_rng(0).permutation(lengths.image_refs)
    lengths = dataclasses.replace(lengths, image_refs=mixed)
    rows, _ = order_of(lengths).take(0, 0, 60)
    assert sorted(rows.tolist()) == list(range(60))
    for round_index in range(3):
        assert len(set(mixed[rows[round_index * 20 : round_index * 20 + 20]].tolist())) == 20


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
    """The order is part of the checkpoint format: a resumed run must meet the same texts under every version."""
    rows, _ = order_of(toy_lengths(images=6, texts_per_image=(2, 2), tokens=(5, 5), shard=3), seed=7).take(0, 0, 12)
    assert rows.tolist() == [9, 11, 0, 7, 3, 4, 5, 1, 2, 10, 6, 8]
