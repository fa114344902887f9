"""The optimiser: which parameters decay, torch's AdamW, and the AdamW of UNITER's authors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlscale.config import OptimizerSection

DecayRule = Literal["correct", "reference"]

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
    gains that the published rule misses. Works on partitioned parameters (ZeRO-3), whose true shape is in ``ds_shape``.

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
    if section.rule == "reference":
        return ReferenceAdamW(laid_out, **settings)
    return torch.optim.AdamW(laid_out, fused=fused or None, **settings)


class ReferenceAdamW(torch.optim.Optimizer):
    """The AdamW of UNITER's authors (the early Hugging Face one), vectorised over parameters.

    It differs from torch's in two places: eps is added to the root of the second moment before that is bias-corrected,
    and the decay ``p -= lr * weight_decay * p`` acts on the parameter after the update. The state of a parameter is
    ``step`` (float32 scalar on the CPU), ``exp_avg`` and ``exp_avg_sq``, as in torch's AdamW, so that ZeRO can
    partition it.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the raw second moment.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"AdamW needs lr, eps, weight_decay >= 0 and betas in [0, 1), got {lr}, {eps}, {weight_decay}, {betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(parameter) for parameter in params]
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        steps = [float(state["step"]) for state in states]
        sizes = [-group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step) for step in steps]
        torch._foreach_addcdiv_(params, first, denominators, sizes)
        if group["weight_decay"] > 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
