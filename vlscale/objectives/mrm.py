"""Masked region modelling in its three forms: features, hard classes, soft classes (UNITER, section 3.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.objectives.base import OfMicroBatches, PretrainingModel, Term, full_precision, loss_term, metric
from vlscale.objectives.masking import TokenMasking, draw_regions, mask_regions
from vlscale.ragged import RaggedBatch


@dataclass(frozen=True)
class MaskedRegions(OfMicroBatches):
    """What the three forms share: regions are masked (features to zero, boxes stay), at least one per image.

    Attributes:
        probability: chance that a region is masked.
        masking: joint masking only: how word pieces are masked as well; None masks no word.
    """

    probability: float
    masking: TokenMasking | None = None
    name: str = ""
    needs_class_probs: bool = False

    def prepare(self, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
        """Mask regions (and word pieces, if masking is joint) and set ``region_positions`` int64 [K] into Nr."""
        chosen = draw_regions(batch, draws, f"{self.name}_regions", self.probability)
        positions = chosen.nonzero().squeeze(1)
        targets = batch.targets | {"region_positions": positions} | self._targets(batch, positions)
        batch = dataclasses.replace(mask_regions(batch, chosen, in_place=True), targets=targets)
        if self.masking is not None:
            masked = self.masking.draw(batch, draws, f"{self.name}_tokens", at_least_one=False)
            batch = dataclasses.replace(batch, input_ids=masked.input_ids)
        return batch

    def counts(self, batch: RaggedBatch) -> dict[str, float]:
        """Return ``<name>_regions``, the number of masked regions."""
        return {self.count: batch.targets["region_positions"].numel() * batch.weight}

    @property
    def count(self) -> str:
        """Key of the only count."""
        return f"{self.name}_regions"

    def _targets(self, batch: RaggedBatch, positions: Tensor) -> dict[str, Tensor]:
        """Return further targets, taken from the batch before it is masked."""
        return {}


@dataclass(frozen=True)
class RegionFeatureRegression(MaskedRegions):
    """Regress the features of masked regions: squared error, mean over regions and over the D dimensions.

    The mean over dimensions is the authors' code; the paper writes a sum. Targets: ``region_positions``,
    ``region_features`` [K, D] in the features' dtype.
    """

    name: str = "mrfr"

    def _targets(self, batch: RaggedBatch, positions: Tensor) -> dict[str, Tensor]:
        return {"region_features": batch.features[positions]}

    def terms(self, model: PretrainingModel, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``mrfr`` (loss), and ``mrfr_zero``: the loss of predicting zero.

        Where features were standardised when the store was built, zero is the mean feature, and ``mrfr / mrfr_zero``
        is the error relative to predicting the mean: below 1 means that something was learnt.
        """
        target_KD = full_precision(batch.targets["region_features"])
        predicted_KD = model.predict_features(model.encode(batch), batch.targets["region_positions"])
        error_K = F.mse_loss(full_precision(predicted_KD), target_KD, reduction="none").mean(1)
        return {
            "mrfr": loss_term(error_K.sum(), self.count, batch),
            "mrfr_zero": metric(target_KD.square().mean(1).sum(), self.count, batch),
        }


@dataclass(frozen=True)
class RegionClassification(MaskedRegions):
    """Predict the detector's most probable class of masked regions: cross-entropy, mean over regions.

    Targets: ``region_positions``, ``class_probs`` [K, C] in the stored dtype (the loader fills them from the classes
    store).

    Attributes:
        background_class: never a target: the most probable of the other classes is (UNITER: 0). None: all are.
    """

    name: str = "mrc"
    needs_class_probs: bool = True
    background_class: int | None = None

    def terms(self, model: PretrainingModel, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``mrc`` (loss) and ``mrc_accuracy``."""
        logits_KC, probs_KC = self._logits_and_probs(model, batch)
        labels_K = self._labels(probs_KC)
        total = F.cross_entropy(logits_KC, labels_K, reduction="sum")
        return {
            self.name: loss_term(total, self.count, batch),
            f"{self.name}_accuracy": metric(self._correct(logits_KC, labels_K), self.count, batch),
        }

    def _logits_and_probs(self, model: PretrainingModel, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        probs_KC = full_precision(batch.targets["class_probs"])
        logits_KC = full_precision(model.classify_regions(model.encode(batch), batch.targets["region_positions"]))
        if logits_KC.shape[1] != probs_KC.shape[1]:
            raise VlscaleError(
                f"dataset {batch.dataset}: classes store has {probs_KC.shape[1]} classes, the model "
                f"{logits_KC.shape[1]}; set model.config.num_classes to {probs_KC.shape[1]}"
            )
        return logits_KC, probs_KC

    def _labels(self, probs_KC: Tensor) -> Tensor:
        """Return int64 [K], the most probable class that may be a target."""
        if self.background_class is None:
            return probs_KC.argmax(1)
        if self.background_class >= probs_KC.shape[1]:
            raise VlscaleError(
                f"objectives.mrm.background_class: {self.background_class} is not one of the {probs_KC.shape[1]} "
                f"classes 0..{probs_KC.shape[1] - 1}"
            )
        foreground_KC = probs_KC.clone()
        foreground_KC[:, self.background_class] = -1.0
        return foreground_KC.argmax(1)

    @staticmethod
    def _correct(logits_KC: Tensor, labels_K: Tensor) -> Tensor:
        return (logits_KC.detach().argmax(1) == labels_K).sum()


@dataclass(frozen=True)
class RegionClassificationKL(RegionClassification):
    """Match the detector's class distribution: KL(target || prediction), mean over regions and over the C classes.

    The mean over classes is the authors' code (1/1601 of the usual divergence). All classes take part, the background
    too. Targets as in :class:`RegionClassification`.
    """

    name: str = "mrckl"

    def terms(self, model: PretrainingModel, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``mrckl`` (loss) and ``mrckl_accuracy`` (against the target's most probable class)."""
        logits_KC, probs_KC = self._logits_and_probs(model, batch)
        divergence_KC = F.kl_div(F.log_softmax(logits_KC, dim=1), probs_KC, reduction="none")
        return {
            self.name: loss_term(divergence_KC.mean(1).sum(), self.count, batch),
            f"{self.name}_accuracy": metric(self._correct(logits_KC, self._labels(probs_KC)), self.count, batch),
        }
