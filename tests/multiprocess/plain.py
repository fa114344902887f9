"""A step of training as a textbook takes it, which the runs of DeepSpeed are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.config import OptimizerSection, Recipe

CLIP = 0.5
"""As ``write_ds_config`` has it."""


def plain_optimizer(model: nn.Module, rule: OptimizerSection) -> torch.optim.Optimizer:
    """PyTorch's AdamW; gains and biases do not decay."""
    named = dict(model.named_parameters())
    decayed = [name for name, tensor in named.items() if tensor.ndim > 1 or name.endswith("embedding")]
    others = [tensor for name, tensor in named.items() if name not in decayed]
    groups = [
        {"params": [named[name] for name in decayed], "weight_decay": rule.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rule.lr, betas=rule.betas, eps=rule.eps)


def plain_update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, index: int, recipe: Recipe) -> float:
    """Take step ``index`` of the recipe's schedule; return the gradient's norm before clipping."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    warmup, total = recipe.schedule.warmup_steps, recipe.schedule.total_steps
    factor = (index + 1) / warmup if index < warmup else (total - index - 1) / (total - warmup)
    for group in optimizer.param_groups:
        group["lr"] = max(recipe.optimizer.lr * factor, 1e-8)
    optimizer.step()
    return float(norm)
