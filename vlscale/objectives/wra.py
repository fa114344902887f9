"""Word-region alignment by optimal transport, a part of image-text matching (UNITER, section 3.2 and appendix A.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.config import WraSection
from vlscale.data.schema import Vocabulary
from vlscale.kernels.ipot import ipot_distance
from vlscale.objectives.base import EncodedBatch, Term, loss_term, metric
from vlscale.ragged import RaggedBatch


@dataclass(frozen=True)
class WordRegionAlignment:
    """Transport distances between the last hidden states of words and regions, and the loss on them.

    * ``reference``: (sum over positives - sum over negatives) / examples, as the authors' code has it.
    * ``hinge``: mean over all pairs (positive p, negative n) of one group of relu(margin + d_p - d_n). Groups are
      never split over micro-batches, so the mean does not depend on how they were dealt.

    Attributes:
        section: the recipe's ``objectives.wra``.
        cls, sep: ids of [CLS] and [SEP], left out where ``section.tokens`` is ``words``.
    """

    section: WraSection
    cls: int
    sep: int

    @classmethod
    def build(cls, section: WraSection, vocabulary: Vocabulary) -> WordRegionAlignment:
        """Lay the recipe's section over a vocabulary."""
        return cls(section, vocabulary.cls, vocabulary.sep)

    def targets(self, batch: RaggedBatch) -> dict[str, Tensor]:
        """Return which words take part: ``wra_positions`` int64 [Nw] into Nt, ``wra_cu`` int32 [B+1].

        Drawn up while the batch is on the CPU, because counting words on a GPU would wait for it.
        """
        if self.section.tokens == "all":
            return {}
        kept = (batch.input_ids != self.cls) & (batch.input_ids != self.sep)
        before = torch.zeros(kept.numel() + 1, dtype=torch.int32, device=kept.device)
        torch.cumsum(kept, 0, dtype=torch.int32, out=before[1:])
        return {"wra_positions": kept.nonzero().squeeze(1), "wra_cu": before[batch.cu_text.long()]}

    def distances(self, encoded: EncodedBatch, batch: RaggedBatch) -> Tensor:
        """Return the transport distance float32 [B] of each text and image."""
        return self.align(encoded, batch)[0]

    def align(self, encoded: EncodedBatch, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """Return distances float32 [B] and transport plans [B, R, T], padded; T counts the words that take part."""
        text_index, cu_words = encoded.text_index, batch.cu_text
        if self.section.tokens == "words":
            words = batch.targets if "wra_positions" in batch.targets else self.targets(batch)
            text_index, cu_words = text_index[words["wra_positions"]], words["wra_cu"]
        return ipot_distance(
            encoded.hidden[text_index],
            encoded.hidden[encoded.region_index],
            cu_words,
            batch.cu_regions,
            beta=self.section.beta,
            iterations=self.section.iterations,
            backend=self.section.backend,
            return_plan=True,
            max_words=batch.max_text,
            max_regions=batch.max_regions,
        )

    def counts(self, batch: RaggedBatch) -> dict[str, float]:
        """Return ``wra_positives``, ``wra_negatives`` and, for the hinge, ``wra_pairs``."""
        labels = batch.targets["itm_labels"]
        positives = int(labels.sum())
        counts = {"wra_positives": positives, "wra_negatives": len(labels) - positives}
        if self.section.loss == "hinge":
            counts["wra_pairs"] = int(_pairs(batch).sum())
        return {key: count * batch.weight for key, count in counts.items()}

    def terms(self, encoded: EncodedBatch, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``wra`` (loss), and the mean distances ``wra_positive`` and ``wra_negative``."""
        distance_B = self.distances(encoded, batch)
        matched_B = batch.targets["itm_labels"].bool()
        positives, negatives = (torch.where(mask, distance_B, 0).sum() for mask in (matched_B, ~matched_B))
        if self.section.loss == "hinge":
            gap_PN = torch.relu(self.section.margin + distance_B[:, None] - distance_B[None, :])
            loss, count = torch.where(_pairs(batch), gap_PN, 0).sum(), "wra_pairs"
        else:
            loss, count = positives - negatives, "itm_examples"
        return {
            "wra": loss_term(loss, count, batch, self.section.weight),
            "wra_positive": metric(positives, "wra_positives", batch),
            "wra_negative": metric(negatives, "wra_negatives", batch),
        }


def _pairs(batch: RaggedBatch) -> Tensor:
    """Return bool [B, B], True where the row is a positive and the column a negative of the same group."""
    matched_B = batch.targets["itm_labels"].bool()
    return matched_B[:, None] & ~matched_B[None, :] & (batch.group[:, None] == batch.group[None, :])
