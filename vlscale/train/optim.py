"""The optimiser: which parameters decay, and which rule the recipe names."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from vlscale.config import OptimizerSection
from vlscale.train.adamw import ReferenceAdamW
from vlscale.train.paddle import PaddleAdamW

DecayRule = Literal["correct", "reference"]
_RULES = {"reference": ReferenceAdamW, "paddle": PaddleAdamW}

# UNITER's rule looks for "bias" and "LayerNorm.weight" in a parameter's name. These gains were called otherwise
# (img_layer_norm, pos_layer_norm, feat_regress.net.2, region_classifier.net.2), so they decay under it.
_DECAYED_GAINS = (
    "image_embedder.projection_norm.weight",
    "image_embedder.box_norm.weight",
    "feature_head.transform.norm.weight",
    "region_classifier.transform.norm.weight",
)


def build_param_groups(model: nn.Module, rule: DecayRule) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    ``correct``: matrices and embeddings decay; biases and gains do not. ``reference``: the same, except for the four
    gains that UNITER's published rule misses; UNIMO's misses none. Works on partitioned parameters (ZeRO-3), whose true
    shape is in ``ds_shape``.

    Args:
        model: parameters keep the order of ``named_parameters``.
        rule: the recipe's ``optimizer.decay_groups``.

    Returns:
        Groups ``{"params": [...], "decay": bool, "names": [...]}`` for :func:`build_optimizer`; none of them is empty.
    """
    groups: list[dict[str, Any]] = [{"params": [], "decay": decay, "names": []} for decay in (True, False)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0 if _decays(name, parameter, rule) else 1]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter, rule: DecayRule) -> bool:
    if name.endswith("bias"):
        return False
    if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 or name.endswith("embedding"):
        return True
    return rule == "reference" and name.endswith(_DECAYED_GAINS)


def build_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection, fused: bool = False
) -> torch.optim.Optimizer:
    """Build the optimiser of the recipe on the groups of :func:`build_param_groups`.

    Args:
        groups: parameter groups; those with ``decay`` get the recipe's weight decay, the others none.
        section: the recipe's ``optimizer``.
        fused: use torch's fused kernel (``rule: adamw`` on a GPU; DeepSpeed's own needs nvcc at start).
    """
    laid_out = [
        {"params": group["params"], "weight_decay": section.weight_decay if group["decay"] else 0.0} for group in groups
    ]
    settings: dict[str, Any] = {"lr": section.lr, "betas": section.betas, "eps": section.eps}
    if section.rule != "adamw":
        return _RULES[section.rule](laid_out, **settings)
    return torch.optim.AdamW(laid_out, fused=fused or None, **settings)
