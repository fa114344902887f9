"""What an objective is: it masks a batch, counts its targets, and turns (model, batch) into named loss terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vlscale.data.random import Draws
from vlscale.errors import VlscaleError
from vlscale.ragged import RaggedBatch


@dataclass(frozen=True)
class Term:
    """One named part of a loss, or a metric, as a sum that can be added over micro-batches and ranks.

    The mean over the global batch is the sum of ``sum`` over all micro-batches divided by the sum of
    ``counts(batch)[count]``; where that count is zero the term does not exist in this step.

    Attributes:
        sum: scalar float32 (float64 for a float64 model).
        count: key into :meth:`Objective.counts`.
        weight: factor of the mean in the loss; 0.0 for a metric, whose ``sum`` is detached.
    """

    sum: Tensor
    count: str
    weight: float


class EncodedBatch(Protocol):
    """Last hidden states of a packed batch: ``hidden`` [N, H] and where text (Nt) and regions (Nr) lie in it."""

    hidden: Tensor
    text_index: Tensor
    region_index: Tensor


class PretrainingModel(Protocol):
    """What the objectives ask of a model; positions index the packed text (Nt) or the packed regions (Nr)."""

    def encode(self, batch: RaggedBatch) -> Any:
        """Return an :class:`EncodedBatch`."""

    def mlm_logits(self, encoded: Any, positions: Tensor) -> Tensor:
        """Return vocabulary logits [K, V] at text positions."""

    def predict_features(self, encoded: Any, positions: Tensor) -> Tensor:
        """Return region features [K, D] at region positions."""

    def classify_regions(self, encoded: Any, positions: Tensor) -> Tensor:
        """Return class logits [K, C] at region positions."""

    def itm_logits(self, encoded: Any) -> Tensor:
        """Return matching logits [B, 2]; class 1 is a match."""


class Objective(Protocol):
    """One pre-training task. Holds settings only, so it can be sent to worker processes."""

    @property
    def name(self) -> str:
        """Name of the task, as ``RaggedBatch.task`` gives it."""

    @property
    def needs_class_probs(self) -> bool:
        """Whether the loader must fill ``targets["class_probs"]`` after :meth:`prepare`."""

    @property
    def needs_window(self) -> bool:
        """Whether :meth:`terms` needs to know of the whole step; see :mod:`vlscale.train.window`."""

    def prepare(self, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
        """Return the batch with inputs masked and targets set; runs on the CPU.

        Features of masked regions become zero in ``batch`` itself, which the caller has just read for this; the rest
        of it stays as it is.
        """

    def counts(self, batch: RaggedBatch) -> dict[str, float]:
        """Return every denominator of :meth:`terms`, before any forward; zero for an empty slot (weight 0).

        Call it while the batch is still on the CPU: image-text matching counts labels.
        """

    def terms(self, model: PretrainingModel, batch: RaggedBatch) -> dict[str, Term]:
        """Return the loss terms and metrics. Without a target, and in an empty slot, sums are 0 and keep a graph."""

    def represent(self, model: PretrainingModel, batch: RaggedBatch) -> Tensor:
        """Return float [n, R], what the other micro-batches of the step need of this one, in a pass without gradients.

        Raises:
            VlscaleError: the objective needs no window.
        """

    def window_keys(self, batch: RaggedBatch) -> Tensor:
        """Return int64 [n, K], what negatives and counts of the whole step depend on, before any forward."""

    def share_keys(
        self, batches: Sequence[RaggedBatch], keys: Tensor, first: int
    ) -> tuple[list[RaggedBatch], dict[str, float]]:
        """Tell one rank's micro-batches, on the CPU, of the whole step's keys.

        Args:
            batches: of the rank.
            keys: int64 [G, K], those of :meth:`window_keys` of all ranks' micro-batches.
            first: row of the rank's own first.

        Returns:
            The batches, and those counts of the whole step that depend on the keys.
        """

    def check_model(self, config: Any) -> None:
        """Look whether a model of this configuration has what :meth:`terms` calls.

        Raises:
            VlscaleError: it has not.
        """


class OfMicroBatches:
    """What :class:`Objective` asks for, of objectives whose micro-batches need not know of each other."""

    @property
    def needs_window(self) -> bool:
        """No."""
        return False

    def represent(self, model: PretrainingModel, batch: RaggedBatch) -> Tensor:
        """There is nothing that others need."""
        raise self._no_window(batch)

    def window_keys(self, batch: RaggedBatch) -> Tensor:
        """There is nothing that others need."""
        raise self._no_window(batch)

    def share_keys(
        self, batches: Sequence[RaggedBatch], keys: Tensor, first: int
    ) -> tuple[list[RaggedBatch], dict[str, float]]:
        """There is nothing that others need."""
        raise self._no_window(batches[0])

    def check_model(self, config: Any) -> None:
        """A recipe's tasks are its model's, and the model has all heads that they call."""

    def _no_window(self, batch: RaggedBatch) -> VlscaleError:
        return VlscaleError(
            f"task {batch.task}: {type(self).__name__} has no window; ask needs_window before represent and the keys"
        )


def loss_term(total: Tensor, count: str, batch: RaggedBatch, weight: float = 1.0) -> Term:
    """Return a term that enters the loss; an empty slot's sum becomes zero and keeps its graph."""
    return Term(total * batch.weight, count, weight)


def metric(total: Tensor, count: str, batch: RaggedBatch) -> Term:
    """Return a term that is only reported."""
    return Term(total.detach().float() * batch.weight, count, 0.0)


def full_precision(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 at least: losses are never taken in half precision."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()
