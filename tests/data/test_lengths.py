from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.data.lengths import first_outside, rises
from vlscale.errors import VlscaleError


def test_first_image_and_references():
    lengths = toy_lengths(second_image=True, without_image=3)
    assert lengths.most_references == 2
    images = np.arange(len(lengths.regions))
    for row in range(len(lengths)):
        own = lengths.image_refs[lengths.image_ptr[row] : lengths.image_ptr[row + 1]].tolist()
        assert lengths.first_image(np.array([row])).tolist() == [own[0] if own else -1]
        found = lengths.refers_to(np.full(len(images), row), images)
        assert np.flatnonzero(found).tolist() == sorted(own)


def test_costs():
    lengths = toy_lengths(without_image=2)
    rows = np.arange(len(lengths))
    first = lengths.first_image(rows)
    costs = lengths.costs(rows, first, max_regions=5)
    assert costs.dtype == np.int32
    for row in rows:
        image = first[row]
        regions = 0 if image < 0 else min(5, int(lengths.regions[image]))
        assert costs[row] == lengths.tokens[row] + 2 + regions


def test_text_only_dataset():
    lengths = toy_lengths(images=0, without_image=4)
    rows = np.arange(4)
    assert lengths.costs(rows, lengths.first_image(rows), 10).tolist() == (lengths.tokens + 2).tolist()


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("image_ptr", np.array([0, 1]), "image_ptr has 2 entries"),
        ("image_refs", np.array([0, 1]), "image references"),
        ("text_shards", np.array([0, 5]), "shards hold 5"),
        ("text_shards", np.array([0, 9, 3]), "does not rise"),
    ],
)
def test_contradictions_are_refused(field, value, says):
    with pytest.raises(VlscaleError, match=says):
        dataclasses.replace(toy_lengths(), **{field: value})


def test_bad_values_are_refused():
    lengths = toy_lengths()
    tokens = lengths.tokens.copy()
    tokens[3] = 0
    with pytest.raises(VlscaleError, match="text row 3 has no tokens"):
        dataclasses.replace(lengths, tokens=tokens)
    regions = lengths.regions.copy()
    regions[4] = 0
    with pytest.raises(VlscaleError, match="image row 4 has no regions"):
        dataclasses.replace(lengths, regions=regions)
    refs = lengths.image_refs.copy()
    refs[1] = len(regions)
    with pytest.raises(VlscaleError, match="outside the 40 rows"):
        dataclasses.replace(lengths, image_refs=refs)


def test_long_arrays_are_checked_in_chunks(monkeypatch):
    """The same findings at the same places, wherever a chunk ends."""
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr("vlscale.data.chunks.slices.__defaults__", (size,))
        numbers = np.array([0, 2, 2, 5, 9, 9, 12])
        assert rises(numbers)
        assert first_outside(numbers, 0, 13) is None
        for place in range(1, 7):
            falling = numbers.copy()
            falling[place] = -1
            assert not rises(falling), (size, place)
            assert first_outside(falling, 0, None) == place
            assert first_outside(-falling, -12, 1) == place
    assert not rises(np.array([1, 2]))
    assert not rises(np.array([], np.int64))
    assert rises(np.array([0]))
