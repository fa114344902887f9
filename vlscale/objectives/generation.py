"""Sequence-to-sequence language modelling: which tokens are generated, and the label-smoothed loss of UNIMO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.base import full_precision
from vlscale.ragged import cumulative, owners


def next_tokens(batch: UnimoBatch) -> tuple[Tensor, Tensor]:
    """Return what the targets of a batch teach: at each of their tokens but the last, the next one.

    A target begins with [CLS] and ends with [SEP] or [MASK]; the token before it is of the source and predicts nothing.
    A target of no token or of one teaches nothing. Call it while the batch is still on the CPU.

    Args:
        batch: with ``prefix_len``.

    Returns:
        positions: int64 [K], into the text tokens of the batch.
        labels: int64 [K].

    Raises:
        VlscaleError: no example has a target.
    """
    lengths_B = batch.target_lengths.long()
    total = batch.measured.targets
    if batch.prefix_len is None or not total:
        raise VlscaleError(f"dataset {batch.dataset!r}: no text has a target (prefix_len); nothing is to be generated")
    cu = cumulative(lengths_B)
    owner = owners(cu, total)
    first_B = batch.cu_text[1:].long() - lengths_B
    token = torch.arange(total, device=owner.device) - cu.long().index_select(0, owner)
    position = token + first_B.index_select(0, owner)
    position = position[token + 1 < lengths_B.index_select(0, owner)]
    return position, batch.input_ids.index_select(0, position + 1)


def smoothed_cross_entropy(logits_KV: Tensor, labels_K: Tensor, smoothing: float = 0.1) -> Tensor:
    """Return the sum of cross-entropies against ``(1 - smoothing) onehot + smoothing / V``, in float32 at least.

    The uniform part includes the label itself, as in UNIMO's fine-tuning for generation.

    Args:
        logits_KV: scores over the vocabulary; K = 0 is allowed.
        labels_K: int64.
        smoothing: 0 for plain cross-entropy.
    """
    return F.cross_entropy(full_precision(logits_KV), labels_K, reduction="sum", label_smoothing=smoothing)
