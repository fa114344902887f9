"""The fingerprint of a step: blind to order and dealing, and to nothing else."""

from __future__ import annotations

import dataclasses

import torch

from tests.models.batches import random_batch
from tests.objectives.batches import take
from vlscale.ragged import RaggedBatch
from vlscale.train.record import example_hashes


def batch() -> RaggedBatch:
    made = random_batch([4, 6, 3], [5, 2, 6])
    targets = {"token_positions": torch.tensor([1, 5, 11]), "token_labels": torch.tensor([7, 8, 9])}
    return dataclasses.replace(made, targets=targets)


def test_order_and_grouping_do_not_matter() -> None:
    plain = dataclasses.replace(batch(), targets={})
    assert sorted(example_hashes(take(plain, [2, 0, 1]))) == sorted(example_hashes(plain))
    parts = example_hashes(take(plain, [0, 1])) + example_hashes(take(plain, [2]))
    assert parts == example_hashes(plain)


def test_everything_drawn_matters() -> None:
    first = batch()
    changes = {
        "task": "itm",
        "dataset": "other",
        "passes": first.passes + 1,
        "examples": first.examples + 1,
        "images": first.images + 1,
        "input_ids": first.input_ids + 1,
        "features": first.features + 1,
        "targets": {**first.targets, "token_labels": first.targets["token_labels"] + 1},
    }
    for name, value in changes.items():
        changed = example_hashes(dataclasses.replace(first, **{name: value}))
        assert not set(changed) & set(example_hashes(first)), name
    moved = {**first.targets, "token_positions": torch.tensor([2, 5, 11])}
    found = example_hashes(dataclasses.replace(first, targets=moved))
    assert [a == b for a, b in zip(found, example_hashes(first), strict=True)] == [False, True, True]
    labels = dataclasses.replace(first, targets={"itm_labels": torch.tensor([1, 0, 1])})
    flipped = dataclasses.replace(first, targets={"itm_labels": torch.tensor([1, 1, 1])})
    same = [a == b for a, b in zip(example_hashes(labels), example_hashes(flipped), strict=True)]
    assert same == [True, False, True]
