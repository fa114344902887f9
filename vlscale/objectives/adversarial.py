"""VILLA (Gan et al., 2020) as UNIMO fine-tunes with it: small shifts of the inputs that raise the loss.

In each of K steps there are three passes: clean, with a shift of the text embeddings, and with a shift of the region
features. The loss of a step is the sum of their three losses over K, and the distance of the shifted passes from the
clean one. Then both shifts climb. They carry no gradient to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.models.unimo_batch import JointLayout
from vlscale.objectives.base import full_precision
from vlscale.ragged import owners

Forward = Callable[[Tensor | None, Tensor | None], Tensor]
Loss = Callable[[Tensor], Tensor]
Projection = Literal["proper", "reference"]
_TINY = 1e-8


@dataclass(frozen=True)
class Villa:
    """Settings of adversarial training; the defaults are those of UNIMO-base for captions.

    Attributes:
        steps: K.
        learning_rate: length of each climb, per example.
        max_norm: longest shift of an example; 0 for any.
        initial_magnitude: a shift starts uniform in -x..x, x being this over the root of its number of values.
        kl_weight: of the shifted passes' symmetric KL divergence from the clean one, which is not divided by K.
        projection: ``proper`` shortens a shift that is longer than ``max_norm``. ``reference`` does what the authors'
            code does: it compares the *gradient's* norm with ``max_norm``, and scales the shift by their ratio.
    """

    steps: int = 4
    learning_rate: float = 0.03
    max_norm: float = 0.0
    initial_magnitude: float = 0.4
    kl_weight: float = 1.0
    projection: Projection = "proper"

    def __post_init__(self) -> None:
        if self.steps < 1 or min(self.learning_rate, self.max_norm, self.initial_magnitude, self.kl_weight) < 0:
            raise ValueError(f"{self}: steps must be 1 or more, the rest 0 or more")


def villa_loss(
    settings: Villa,
    layout: JointLayout,
    widths: tuple[int, int],
    forward: Forward,
    loss: Loss,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the adversarial loss as a sum over the K' rows that ``forward`` returns; divide by their global number.

    All steps' graphs are held until the backward pass: memory is that of ``3 * steps`` passes.

    Args:
        settings: see :class:`Villa`.
        layout: of the batch; on the device of the model.
        widths: of a text embedding and of a region feature.
        forward: (text shift [Nt, H] or None, image shift [Bi + Nr, D] or None) -> scores [K', C]; see
            :meth:`vlscale.models.unimo.UnimoForPretraining.encode`.
        loss: scores [K', C] -> the sum of the task's losses, for example smoothed cross-entropy.
        generator: for the first shifts, on the CPU; None: torch's own.
    """
    text_NH, image_ND = (
        _first(cu, total, width, settings.initial_magnitude, generator)
        for (cu, total), width in zip(_parts(layout), widths, strict=True)
    )
    total = torch.zeros((), device=text_NH.device)
    for step in range(settings.steps):
        text_NH, image_ND = text_NH.detach().requires_grad_(), image_ND.detach().requires_grad_()
        clean = full_precision(forward(None, None))
        by_text, by_image = full_precision(forward(text_NH, None)), full_precision(forward(None, image_ND))
        task = loss(clean) + loss(by_text) + loss(by_image)
        distance = symmetric_kl(clean, by_text) + symmetric_kl(clean, by_image)
        step_loss = task / settings.steps + settings.kl_weight * distance
        total = total + step_loss
        if step + 1 < settings.steps:
            mean = step_loss / max(clean.shape[0], 1)
            gradients = torch.autograd.grad(mean, [text_NH, image_ND], retain_graph=True, materialize_grads=True)
            text_NH, image_ND = (
                climb(settings, shift, gradient, cu)
                for shift, gradient, (cu, _) in zip((text_NH, image_ND), gradients, _parts(layout), strict=True)
            )
    return total


def symmetric_kl(one_KC: Tensor, other_KC: Tensor) -> Tensor:
    """Return the sum over rows of ``KL(p || q) + KL(q || p)`` of two sets of scores."""
    one_KC, other_KC = F.log_softmax(one_KC, 1), F.log_softmax(other_KC, 1)
    return ((one_KC.exp() - other_KC.exp()) * (one_KC - other_KC)).sum()


def climb(settings: Villa, shift_ND: Tensor, gradient_ND: Tensor, cu: Tensor) -> Tensor:
    """Return the shift after one step along the gradient, each example's of the same length, and its projection.

    Args:
        settings: see :class:`Villa`.
        shift_ND: packed example after example.
        gradient_ND: of the loss, at the shift.
        cu: int32 [B+1], cumulative rows of the examples.
    """
    shift_ND, owner = shift_ND.detach(), owners(cu, shift_ND.shape[0])
    steepness_B = _norms(gradient_ND, cu)
    length_B = settings.learning_rate / steepness_B.clamp(min=_TINY)
    shift_ND = shift_ND + gradient_ND * length_B.index_select(0, owner)[:, None]
    if not settings.max_norm:
        return shift_ND
    measured_B = steepness_B if settings.projection == "reference" else _norms(shift_ND, cu)
    factor_B = torch.where(measured_B > settings.max_norm, settings.max_norm / measured_B, 1.0)
    return shift_ND * factor_B.index_select(0, owner)[:, None]


def _parts(layout: JointLayout) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """Cumulative rows and their number, for texts and for images."""
    return (layout.batch.cu_text, layout.batch.input_ids.numel()), (layout.cu_images, layout.image_rows.numel())


def _first(cu: Tensor, total: int, width: int, magnitude: float, generator: torch.Generator | None) -> Tensor:
    drawn_ND = torch.rand(total, width, generator=generator).to(cu.device) * 2 - 1
    values_B = cu.diff().float().clamp(min=1) * width
    return drawn_ND * (magnitude / values_B.sqrt()).index_select(0, owners(cu, total))[:, None]


def _norms(rows_ND: Tensor, cu: Tensor) -> Tensor:
    """[B], the length of each example's values together."""
    if not rows_ND.shape[0]:
        return rows_ND.new_zeros(cu.numel() - 1)
    squares_N = rows_ND.square().sum(1)
    return torch.segment_reduce(squares_N, "sum", lengths=cu.diff().long(), unsafe=True).sqrt()
