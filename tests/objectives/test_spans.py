"""Masked spans of whole units: statistics against the published rule, and independence of the batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.objectives.test_masking import assert_share
from tests.objectives.unified_batches import DRAWS, VOCABULARY, Row, pack
from vlscale.config_unified import LanguageSection
from vlscale.data.views import Role
from vlscale.errors import VlscaleError
from vlscale.objectives.row_draws import RowDraws
from vlscale.objectives.spans import SpanMasking


def rule(**settings) -> SpanMasking:
    return SpanMasking.build(LanguageSection(**settings), VOCABULARY)


def text(number: int, words: int, every: int | None = None) -> Row:
    """A text whose units are ``every`` word pieces long; None: without units."""
    draw = np.random.default_rng(number)
    ends = None if every is None else tuple(sorted({*range(every, words, every), words}))
    return Row(Role.BIDIRECTIONAL, 1, number, tuple(draw.integers(5, VOCABULARY.size, words).tolist()), ends=ends)


def masked(rows, masking=None, passes=0):
    batch = pack(rows, passes)
    return batch, (masking or rule()).draw(batch, RowDraws.of(batch, DRAWS), np.arange(len(rows)))


LARGE = [text(number, 40 + number % 90) for number in range(800)]


def test_lengths_are_geometric_and_cut_off():
    numbers = (np.arange(200_000) + 0.5) / 200_000
    lengths = rule(geometric=0.2, longest_span=10).lengths(numbers)
    weights = 0.2 * 0.8 ** np.arange(10)
    shares = np.bincount(lengths, minlength=11)[1:] / len(lengths)
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=2e-5)
    assert set(rule(geometric=1.0).lengths(numbers)) == {1}
    uniform = np.bincount(rule(geometric=0.0, longest_span=4).lengths(numbers), minlength=5)[1:]
    assert np.ptp(uniform) <= 1
    assert rule().lengths(np.array([0.0, 1 - 2.0**-32])).tolist() == [1, 10]


def test_exactly_the_wanted_share_where_units_are_single_pieces():
    batch, found = masked(LARGE)
    counts = np.bincount(batch.text_owner()[found.positions].numpy(), minlength=len(LARGE))
    wanted = [int(np.ceil((length - 2) * 0.15)) for length in batch.text_lengths.tolist()]
    assert counts.tolist() == wanted


def test_runs_have_geometric_lengths():
    # one span a text: with a share this small, the span is longer than what is wanted only where that cuts it
    batch, found = masked([text(number, 60) for number in range(4000)], rule(probability=10 / 60))
    owner = batch.text_owner()[found.positions].numpy()
    joins = (np.diff(found.positions.numpy()) == 1) & (np.diff(owner) == 0)
    spans = len(found.positions) - int(joins.sum())
    # ten pieces a text: renewals of the cut-off geometric lengths, the last cut short; neighbours now and then touch
    lengths = rule().lengths(np.random.default_rng(0).random((4000, 10)))
    expected = float((lengths.cumsum(1) < 10).sum(1).mean() + 1)
    assert spans / 4000 == pytest.approx(expected, rel=0.08)
    assert spans / 4000 < expected


def test_spans_are_masked_replaced_or_kept_as_a_whole():
    batch, found = masked(LARGE, rule(geometric=1.0, longest_span=1))
    now = found.input_ids[found.positions]
    assert_share(int((now == VOCABULARY.mask).sum()), len(now), 0.8)
    low, high = VOCABULARY.random_range
    changed = int(((now != VOCABULARY.mask) & (now != found.labels)).sum())
    assert_share(changed, len(now), 0.1 * (1 - 1 / (high - low)))
    assert torch.equal(found.labels, batch.input_ids[found.positions])
    _, found = masked([text(number, 40, 8) for number in range(3000)], rule(geometric=1.0, longest_span=1))
    hidden = (found.input_ids[found.positions] == VOCABULARY.mask).view(-1, 8)
    assert (hidden.all(1) | ~hidden.any(1)).all()
    assert_share(int(hidden.all(1).sum()), len(hidden), 0.8)
    random = found.input_ids[found.positions].view(-1, 8)[~hidden.any(1)]
    fresh = (random != found.labels.view(-1, 8)[~hidden.any(1)]).any(1)
    assert_share(int(fresh.sum()), len(fresh), 0.5)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_no_unit_is_split_and_no_more_than_one_unit_too_much_is_masked(every):
    rows = [text(number, 11 + number % 50, every) for number in range(500)]
    batch, found = masked(rows)
    for row, begin in zip(rows, batch.cu_text.tolist(), strict=False):
        size = len(row.words)
        chosen = np.zeros(size, bool)
        inside = (found.positions > begin) & (found.positions <= begin + size)
        chosen[found.positions[inside].numpy() - begin - 1] = True
        for first, last in zip((0, *row.ends), row.ends, strict=False):
            assert chosen[first:last].all() or not chosen[first:last].any()
        wanted = int(np.ceil(size * 0.15))
        assert wanted <= chosen.sum() < wanted + every


def test_units_are_masked_alike_often():
    _, found = masked([text(number, 30, 3) for number in range(6000)], rule(probability=0.1))
    counts = np.bincount((found.positions % 32 - 1).numpy() // 3, minlength=10)
    assert counts.sum() == 6000 * 3
    for count in counts:
        assert_share(int(count), 6000 * 3, 0.1)


@pytest.mark.parametrize("words", [1, 2, 3])
def test_at_least_one_piece_and_never_a_special_token(words):
    batch, found = masked([text(number, words) for number in range(200)], rule(probability=0.0))
    assert torch.equal(batch.text_owner()[found.positions], torch.arange(200))
    batch, found = masked([text(number, words) for number in range(200)], rule(probability=1.0))
    assert len(found.positions) == 200 * words
    assert not torch.isin(found.labels, torch.tensor([VOCABULARY.cls, VOCABULARY.sep])).any()


def test_texts_without_pieces_and_other_rows_stay_as_they_are():
    rows = [text(0, 9), Row(Role.BIDIRECTIONAL, 1, 1, ()), Row(Role.VISUAL, 0, 2, None, 3, 2), text(3, 9)]
    batch = pack(rows)
    before = batch.input_ids.clone()
    found = rule(probability=0.5).draw(batch, RowDraws.of(batch, DRAWS), np.array([0, 1]))
    assert set(batch.text_owner()[found.positions].tolist()) == {0}
    assert torch.equal(batch.input_ids, before)
    assert torch.equal(found.input_ids[11:], before[11:])
    nobody = rule().draw(batch, RowDraws.of(batch, DRAWS), np.array([], np.int64))
    assert torch.equal(nobody.input_ids, before)
    assert nobody.positions.numel() == 0


def test_an_example_is_masked_alike_in_any_batch_and_otherwise_in_another_pass():
    rows = [text(number, 12 + number, 1 + number % 3 if number % 2 else None) for number in range(9)]
    _, whole = masked(rows)
    cu = pack(rows).cu_text.tolist()
    for chosen in ([4, 0, 7], [8], [1, 2, 3]):
        _, part = masked([rows[number] for number in chosen])
        expected = torch.cat([whole.input_ids[cu[number] : cu[number + 1]] for number in chosen])
        assert torch.equal(part.input_ids, expected)
    assert not torch.equal(masked(rows, passes=1)[1].input_ids, whole.input_ids)
    others = [replace(row, source=2) for row in rows]
    assert not torch.equal(masked(others)[1].input_ids, whole.input_ids)


@pytest.mark.parametrize("ends", [(3, 6), (3, 3, 9), (0, 9), (4, 12), (5, 4, 9)])
def test_units_that_do_not_fit_are_refused(ends):
    with pytest.raises(
        VlscaleError,
        match=r"^dataset texts, pass 0, example 1: the text has 9 word pieces, its units end behind .*find_units",
    ):
        masked([replace(text(0, 9), ends=ends)])


def test_sources_that_do_not_exist_are_refused():
    with pytest.raises(VlscaleError, match="a row's source is 5, the step has 3 datasets"):
        masked([replace(text(0, 9), source=5)])
