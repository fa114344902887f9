"""Published UNITER checkpoints, whole, out of the goldens: what tests of conversion share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.golden_batches import golden_folder

CONFIG = golden_folder() / "config.json"
LEGACY = {"_use_new_zipfile_serialization": False}


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def golden_state(task: str = "pretrain") -> dict[str, Tensor]:
    """A complete published state dict; those of tasks are stored as what they change (the goldens' README)."""
    whole = load(golden_folder() / "pretrain.pt")
    if task == "pretrain":
        return whole
    kept = {name: tensor for name, tensor in whole.items() if name.startswith("uniter.")}
    kept |= {name: whole[name] for name in whole if task == "itm_rank" and name.startswith("itm_output.")}
    return (whole if task == "pretrain_vcr" else kept) | load(golden_folder() / f"{task}.pt")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
