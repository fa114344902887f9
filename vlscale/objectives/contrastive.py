"""Losses over candidates: the circle loss of UNIMO's retrieval, and its cross-modal contrastive loss (CMCL)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.objectives.base import full_precision
from vlscale.ragged import owners


def circle_loss(positive_GP: Tensor, negative_GN: Tensor, margin: float = 0.2, scale: float = 1.0) -> Tensor:
    """Return [G], the circle loss (Sun et al., 2020) of each group of similarities, in float32 at least.

    ``log(1 + sum_n exp(scale a_n (s_n - m)) * sum_p exp(-scale a_p (s_p - (1 - m))))`` with the weights
    ``a_p = relu(1 + m - s_p)`` and ``a_n = relu(s_n + m)``, which carry no gradient. UNIMO trains retrieval on the mean
    of two: with other images of the caption, and with other captions of the image, as negatives.

    Args:
        positive_GP: similarities in 0..1 (sigmoids of match scores) of what belongs together; P of at least 1.
        negative_GN: of what does not; N of at least 1.
        margin: m.
        scale: how sharp the sums are; UNIMO's is 1.

    Raises:
        VlscaleError: a group has no positive or no negative, or the two have different groups.
    """
    if positive_GP.dim() != 2 or negative_GN.dim() != 2 or positive_GP.shape[0] != negative_GN.shape[0]:
        raise VlscaleError(
            f"circle loss: similarities are {list(positive_GP.shape)} and {list(negative_GN.shape)}, expected [G, P] "
            "and [G, N]"
        )
    if not positive_GP.shape[1] or not negative_GN.shape[1]:
        raise VlscaleError("circle loss: a group without a positive or without a negative; give each at least one")
    positive_GP, negative_GN = full_precision(positive_GP), full_precision(negative_GN)
    weight_GP = (1 + margin - positive_GP.detach()).clamp(min=0)
    weight_GN = (negative_GN.detach() + margin).clamp(min=0)
    logits_GP = -scale * weight_GP * (positive_GP - (1 - margin))
    logits_GN = scale * weight_GN * (negative_GN - margin)
    return F.softplus(logits_GP.logsumexp(1) + logits_GN.logsumexp(1))


def contrastive_loss(scores_M: Tensor, positive_M: Tensor, cu: Tensor, temperature: Tensor | float) -> Tensor:
    """Return [G], ``-log(sum of positives' exp(s/t) / sum of all candidates' exp(s/t))`` for each group (UNIMO's CMCL).

    The positives are summed inside the logarithm: a group is content when one of them stands out.

    Args:
        scores_M: similarities of all candidates, packed group after group.
        positive_M: bool; the pair itself, its rewritten positives, and its retrieved images and texts.
        cu: int32 [G+1], cumulative numbers of candidates.
        temperature: t; a tensor learns.

    Raises:
        VlscaleError: (on a CPU) a group has no positive.
    """
    all_G, positive_G = candidate_sums(scores_M, positive_M, cu, temperature)
    return all_G - positive_G


def candidate_sums(
    scores_M: Tensor, positive_M: Tensor, cu: Tensor, temperature: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return [G] twice, the logarithms of the sums of ``exp(s/t)`` over all candidates, and over the positives.

    Their difference is :func:`contrastive_loss`, whose arguments and errors these are.
    """
    scaled_M = full_precision(scores_M) / temperature
    lengths_G, owner = cu.diff().long(), owners(cu, scores_M.numel())
    if cu.device.type == "cpu":
        found_G = torch.zeros_like(lengths_G).index_add(0, owner, positive_M.long())
        if bool((found_G == 0).any()):
            empty = int((found_G == 0).nonzero()[0])
            raise VlscaleError(f"contrastive loss: group {empty} has no positive; the pair itself is always one")
    if not scaled_M.numel():
        none_G = scaled_M.new_zeros(lengths_G.numel()) + scaled_M.sum()
        return none_G, none_G
    hidden_M = scaled_M.masked_fill(~positive_M, -torch.inf)
    return _logsumexp(scaled_M, lengths_G, owner), _logsumexp(hidden_M, lengths_G, owner)


def _logsumexp(values_M: Tensor, lengths_G: Tensor, owner: Tensor) -> Tensor:
    most_G = torch.segment_reduce(values_M.detach(), "max", lengths=lengths_G, unsafe=True)
    shifted_M = (values_M - most_G.index_select(0, owner)).exp()
    return torch.segment_reduce(shifted_M, "sum", lengths=lengths_G, unsafe=True).log() + most_G
