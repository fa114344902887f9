"""Which tokens are generated, and label smoothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.models.unimo_batches import unimo_batch
from vlscale.errors import VlscaleError
from vlscale.objectives.generation import next_tokens, smoothed_cross_entropy


def test_next_tokens_are_those_of_targets():
    batch = unimo_batch(["text", "caption", "text to text", "image"])
    positions, labels = next_tokens(batch)
    # the caption's five tokens begin at 5, all of them target; of the nine at 10, four are source
    assert positions.tolist() == [5, 6, 7, 8, 14, 15, 16, 17]
    assert torch.equal(labels, batch.input_ids[[6, 7, 8, 9, 15, 16, 17, 18]])


@pytest.mark.parametrize(("prefix", "taught"), [(3, [3]), (4, []), (0, [0, 1, 2, 3])])
def test_short_targets_teach_little(prefix, taught):
    batch = dataclasses.replace(unimo_batch(["text"]), prefix_len=torch.tensor([prefix], dtype=torch.int32))
    assert next_tokens(batch)[0].tolist() == taught


@pytest.mark.parametrize("prefix_len", [None, torch.tensor([5], dtype=torch.int32)])
def test_without_a_target_there_is_nothing_to_generate(prefix_len):
    batch = dataclasses.replace(unimo_batch(["text"]), prefix_len=prefix_len)
    with pytest.raises(VlscaleError, match="no text has a target"):
        next_tokens(batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_spreads_over_the_whole_vocabulary(smoothing):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 6, 3, 3])
    wanted = (1 - smoothing) * F.one_hot(labels, 7).double() + smoothing / 7
    expected = -(wanted * logits.log_softmax(1)).sum()
    assert_close(smoothed_cross_entropy(logits, labels, smoothing), expected, rtol=1e-12, atol=1e-12)
    assert float(smoothed_cross_entropy(logits[:0], labels[:0], smoothing)) == 0.0
