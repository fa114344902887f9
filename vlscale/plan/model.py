"""Sizes of a model, from its layers on PyTorch's meta device: nothing is allocated or drawn."""

from __future__ import annotations

from functools import lru_cache

import torch

from vlscale.models.registry import ModelConfig, model_of


@lru_cache(maxsize=16)
def model_sizes(config: ModelConfig) -> tuple[int, int]:
    """Return the model's parameters (tied weights once), and those of its largest single module."""
    with torch.device("meta"):
        model = model_of(config)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    return sum(p.numel() for p in model.parameters()), largest


@lru_cache(maxsize=16)
def tensor_count(config: ModelConfig) -> int:
    """Return the number of the model's parameters as tensors, tied weights once."""
    with torch.device("meta"):
        return len(list(model_of(config).parameters()))
