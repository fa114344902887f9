"""Masked language modelling, conditioned on the image (UNITER, section 3.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F

from vlscale.data.random import Draws
from vlscale.objectives.base import OfMicroBatches, PretrainingModel, Term, full_precision, loss_term, metric
from vlscale.objectives.masking import TokenMasking, draw_regions, mask_regions
from vlscale.ragged import RaggedBatch


@dataclass(frozen=True)
class MaskedLanguageModeling(OfMicroBatches):
    """Predict masked word pieces: cross-entropy, mean over the masked word pieces of the global batch.

    Targets: ``token_positions`` int64 [K] into Nt, ``token_labels`` int64 [K].

    Attributes:
        masking: which word pieces are masked, and how.
        region_probability: joint masking only: chance that a region is masked as well; None masks no region.
    """

    masking: TokenMasking
    region_probability: float | None = None
    name: str = "mlm"
    needs_class_probs: bool = False

    def prepare(self, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
        """Mask word pieces (and regions, if masking is joint); see :class:`TokenMasking`."""
        masked = self.masking.draw(batch, draws, f"{self.name}_tokens")
        if self.region_probability is not None:
            chosen = draw_regions(batch, draws, f"{self.name}_regions", self.region_probability, at_least_one=False)
            batch = mask_regions(batch, chosen, in_place=True)
        targets = batch.targets | {"token_positions": masked.positions, "token_labels": masked.labels}
        return dataclasses.replace(batch, input_ids=masked.input_ids, targets=targets)

    def counts(self, batch: RaggedBatch) -> dict[str, float]:
        """Return ``mlm_tokens``, the number of masked word pieces."""
        return {"mlm_tokens": batch.targets["token_positions"].numel() * batch.weight}

    def terms(self, model: PretrainingModel, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``mlm`` (loss) and ``mlm_accuracy``."""
        labels_K = batch.targets["token_labels"]
        logits_KV = full_precision(model.mlm_logits(model.encode(batch), batch.targets["token_positions"]))
        correct = (logits_KV.detach().argmax(1) == labels_K).sum()
        return {
            "mlm": loss_term(F.cross_entropy(logits_KV, labels_K, reduction="sum"), "mlm_tokens", batch),
            "mlm_accuracy": metric(correct, "mlm_tokens", batch),
        }
