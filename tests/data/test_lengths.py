from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.data.toy import toy_lengths
from vlscale.errors import VlscaleError


def test_first_image_and_references():
    lengths = toy_lengths(second_image=True, without_image=3)
    assert lengths.most_references == 2
    images = np.arange(len(lengths.regions))
    for row in range(len(lengths)):
        own = lengths.image_refs[lengths.image_ptr[row] : lengths.image_ptr[row + 1]].tolist()
        assert lengths.first_image[row] == (own[0] if own else -1)
        found = lengths.refers_to(np.full(len(images), row), images)
        assert np.flatnonzero(found).tolist() == sorted(own)


def test_costs():
    lengths = toy_lengths(without_image=2)
    rows = np.arange(len(lengths))
    costs = lengths.costs(rows, lengths.first_image, max_regions=5)
    assert costs.dtype == np.int32
    for row in rows:
        image = lengths.first_image[row]
        regions = 0 if image < 0 else min(5, int(lengths.regions[image]))
        assert costs[row] == lengths.tokens[row] + 2 + regions


def test_text_only_dataset():
    lengths = toy_lengths(images=0, without_image=4)
    assert lengths.costs(np.arange(4), lengths.first_image, 10).tolist() == (lengths.tokens + 2).tolist()


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
    with pytest.raises(VlscaleError, match=r"text row \[3\] has no tokens"):
        dataclasses.replace(lengths, tokens=tokens)
    regions = lengths.regions.copy()
    regions[4] = 0
    with pytest.raises(VlscaleError, match=r"image row \[4\] has no regions"):
        dataclasses.replace(lengths, regions=regions)
    refs = lengths.image_refs.copy()
    refs[1] = len(regions)
    with pytest.raises(VlscaleError, match="outside the 40 rows"):
        dataclasses.replace(lengths, image_refs=refs)
