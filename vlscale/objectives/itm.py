"""Image-text matching, with word-region alignment on the same forward (UNITER, section 3.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F

from vlscale.data.random import Draws
from vlscale.objectives.base import OfMicroBatches, PretrainingModel, Term, full_precision, loss_term, metric
from vlscale.objectives.wra import WordRegionAlignment
from vlscale.ragged import RaggedBatch


@dataclass(frozen=True)
class ImageTextMatching(OfMicroBatches):
    """Tell matching pairs from mismatched ones: two-way cross-entropy, mean over examples; class 1 is a match.

    Labels and partners come from the plan (``targets["itm_labels"]`` int64 [B]); nothing is masked.

    Attributes:
        alignment: word-region alignment; None switches it off.
    """

    alignment: WordRegionAlignment | None = None
    name: str = "itm"
    needs_class_probs: bool = False

    def prepare(self, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
        """Add which words take part in the alignment."""
        if self.alignment is None:
            return batch
        return dataclasses.replace(batch, targets=batch.targets | self.alignment.targets(batch))

    def counts(self, batch: RaggedBatch) -> dict[str, float]:
        """Return ``itm_examples`` and the counts of :class:`WordRegionAlignment`."""
        counts = {"itm_examples": len(batch) * batch.weight}
        return counts if self.alignment is None else counts | self.alignment.counts(batch)

    def terms(self, model: PretrainingModel, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``itm`` (loss), ``itm_accuracy`` and the terms of :class:`WordRegionAlignment`."""
        labels_B = batch.targets["itm_labels"]
        encoded = model.encode(batch)
        logits_B2 = full_precision(model.itm_logits(encoded))
        terms = {
            "itm": loss_term(F.cross_entropy(logits_B2, labels_B, reduction="sum"), "itm_examples", batch),
            "itm_accuracy": metric((logits_B2.detach().argmax(1) == labels_B).sum(), "itm_examples", batch),
        }
        return terms if self.alignment is None else terms | self.alignment.terms(encoded, batch)
