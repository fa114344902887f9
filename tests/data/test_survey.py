"""What one look over a dataset's lengths finds, against the plain way of finding it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.toy import toy_lengths
from vlscale.data.survey import Histogram, survey
from vlscale.errors import VlscaleError


@pytest.mark.parametrize("chunk", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("without_image", [0, 9])
def test_survey_finds_what_counting_finds(monkeypatch, chunk, without_image):
    monkeypatch.setattr("vlscale.data.chunks.slices.__defaults__", (chunk,))
    lengths = toy_lengths(without_image=without_image, second_image=True)
    found = survey(lengths, max_text_tokens=15, max_regions=6)
    rows = np.flatnonzero(lengths.tokens <= 15)
    first = lengths.first_image(rows)
    assert found.total == len(rows)
    assert found.left_out == len(lengths) - len(rows) > 0
    for block, (begin, end) in enumerate(itertools.pairwise(found.edges.tolist())):
        assert found.eligible[block] == ((rows >= begin) & (rows < end)).sum()
    costs = lengths.costs(rows, first, 6)
    words = lengths.tokens[rows] + 2
    for histogram, values in ((found.costs, costs), (found.words, words), (found.regions, costs - words)):
        assert np.array_equal(histogram.counts, np.bincount(values, minlength=len(histogram.counts)))
        assert (histogram.least, histogram.most) == (values.min(), values.max())
        assert histogram.mean == pytest.approx(values.mean())
    assert (found.fewest_regions, found.most_regions) == (min(6, lengths.regions.min()), 6)
    assert found.lonely == (first < 0).sum()
    assert found.first_lonely == (rows[np.argmax(first < 0)] if without_image else -1)
    assert not found.one_image


def test_blocks_keep_the_texts_of_an_image_together():
    for seed, shard in itertools.product(range(5), (1, 2, 9, 50)):
        lengths = toy_lengths(images=30, texts_per_image=(1, 9), seed=seed, shard=shard, without_image=5)
        edges = survey(lengths, 99, 100).edges
        assert edges[0] == 0
        assert edges[-1] == len(lengths)
        assert np.all(np.diff(edges) > 0)
        first = lengths.first_image(np.arange(len(lengths)))
        inner = edges[1:-1]
        assert np.all((first[inner] != first[inner - 1]) | (first[inner] < 0))
        # No edge lies further from a shard's end than the image that stood in its way.
        assert all(np.abs(lengths.text_shards - edge).min() < 9 for edge in edges)


def test_one_image_over_many_shards_is_one_block():
    lengths = toy_lengths(images=1, texts_per_image=(900, 900), shard=7)
    found = survey(lengths, 99, 100)
    assert found.edges.tolist() == [0, 900]
    assert found.one_image


def test_no_texts():
    found = survey(toy_lengths(images=0), 99, 100)
    assert found.total == found.left_out == 0


def test_absurd_lengths_are_refused():
    lengths = toy_lengths()
    tokens = lengths.tokens.copy()
    tokens[7] = 1 << 30
    lengths = dataclasses.replace(lengths, tokens=tokens)
    with pytest.raises(VlscaleError, match="dataset toy: text row 7 has 1073741824 word pieces"):
        survey(lengths, 1 << 31, 100)
    assert survey(lengths, 99, 100).left_out == 1


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 60))
def test_heaviest_run_is_found(values, count):
    histogram = Histogram()
    histogram.add(np.array(values[:3], np.int32))
    histogram.add(np.array(values[3:], np.int32))
    # The worst that can happen: a pass ends with the heaviest, and the next ones begin with them.
    passes = 1 if count <= 1 else -(-(count - 1) // len(values)) + 1
    assert histogram.heaviest(count) == sum(sorted(values * passes)[::-1][:count])
