"""Unified-modal learning, UNIMO's one task: visual learning, language learning and contrast in every micro-batch.

What each row of a batch is for, ``targets["role"]`` says (:class:`~vlscale.data.views.Role`), and which dataset it is
of, ``targets["source"]``. Every head whose loss has a weight is called in every micro-batch, in one order, with no rows
where there are none: ranks that differed in what they call would wait for each other for ever under ZeRO-3. Heads of
losses without a weight are neither called nor needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlscale.config_unified import UnifiedSection, VisualSection
from vlscale.data.random import Draws
from vlscale.data.schema import Vocabulary
from vlscale.data.views import Role, parted
from vlscale.errors import VlscaleError
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.base import Objective, Term, full_precision, loss_term, metric
from vlscale.objectives.cmcl import Contrast, group_scores
from vlscale.objectives.fragments import FragmentRule
from vlscale.objectives.masking import mask_regions
from vlscale.objectives.match_keys import negatives_of
from vlscale.objectives.row_draws import RowDraws
from vlscale.objectives.spans import SpanMasking
from vlscale.objectives.visual import class_loss, draw_masked_regions, regression_loss, top_classes
from vlscale.ragged import RaggedBatch

_OF_UNITS = ("unit_ends", "cu_units")
_OF_WINDOW = ("contrast_pairs", "contrast_window")


@dataclass(frozen=True)
class Weights:
    """Factors of the five losses; 0: the loss does not exist."""

    contrast: float
    features: float
    classes: float
    bidirectional: float
    seq2seq: float

    @classmethod
    def build(cls, section: UnifiedSection) -> Weights:
        """Take them from the recipe's section."""
        visual, language = section.visual, section.language
        return cls(
            section.contrast.weight,
            visual.feature_weight,
            visual.class_weight,
            language.bidirectional_weight,
            language.seq2seq_weight,
        )

    def of(self, kind: str) -> float:
        """That of ``bidirectional`` or ``seq2seq``."""
        return self.bidirectional if kind == "bidirectional" else self.seq2seq


@dataclass(frozen=True)
class UnifiedLearning:
    """Task ``unified``.

    Attributes:
        spans: which word pieces are masked.
        fragments: which are generated.
        contrast: how groups are contrasted.
        visual: which regions are masked, and what is predicted of them.
        weights: of the losses.
        reads_units: whether collation shall deliver ``targets["unit_ends"]``, where a dataset has units.
        pair_visual_share: of pairs whose regions are masked; with 0 pairs need no class probabilities.
    """

    spans: SpanMasking
    fragments: FragmentRule
    contrast: Contrast
    visual: VisualSection
    weights: Weights
    reads_units: bool = True
    pair_visual_share: float = 0.5
    name: str = "unified"

    @classmethod
    def build(cls, section: UnifiedSection, vocabulary: Vocabulary) -> UnifiedLearning:
        """Lay the recipe's section over a vocabulary."""
        language, contrast = section.language, Contrast.build(section.contrast)
        spans, fragments = SpanMasking.build(language, vocabulary), FragmentRule.build(language, vocabulary)
        weights = Weights.build(section)
        return cls(spans, fragments, contrast, section.visual, weights, language.units, section.pair_visual_share)

    @property
    def needs_class_probs(self) -> bool:
        """Whether the loader must fill ``targets["class_probs"]`` for ``targets["region_positions"]``."""
        return self.weights.classes > 0

    @property
    def needs_window(self) -> bool:
        """Whether :meth:`terms` needs a first pass of :meth:`represent` over the whole step."""
        return self.contrast.window

    def check_model(self, config: Any) -> None:
        """Look whether a model of this configuration (a UNIMO's) has the heads that :meth:`terms` calls.

        Raises:
            VlscaleError: it lacks one, or the match head cannot tell what is encoded apart.
        """
        weights = self.weights
        matched = weights.contrast > 0 and self.contrast.similarity == "mul_fc"
        for head, key, wanted in (
            ("features", "visual.feature_weight", weights.features > 0),
            ("classes", "visual.class_weight", weights.classes > 0),
            ("words", "language.bidirectional_weight and seq2seq_weight", weights.bidirectional + weights.seq2seq > 0),
            ("text_pooler", "contrast.weight", weights.contrast > 0),
            ("image_pooler", "contrast.weight", weights.contrast > 0),
            ("matching", "contrast.weight", matched),
        ):
            if wanted and head not in config.heads:
                raise VlscaleError(
                    f"model.config.heads has no {head}, which the recipe trains: add it, or set "
                    f"objectives.unified.{key} to 0"
                )
        if matched and config.match_fusion != "mul":
            raise VlscaleError(
                f"model.config.match_fusion is {config.match_fusion}, with which similarity mul_fc of "
                "objectives.unified.contrast cannot learn what belongs together: set match_fusion to mul, or "
                "similarity to dot"
            )

    def prepare(self, batch: RaggedBatch, draws: Draws) -> UnimoBatch:
        """Do :meth:`prepare_views` for a batch of one dataset."""
        return self.prepare_views(batch, [draws])

    def prepare_views(self, batch: RaggedBatch, draws: Sequence[Draws]) -> UnimoBatch:
        """Mask the rows that are masked, and set targets; runs on the CPU.

        Features of masked regions become zero in ``batch`` itself; the rest of it stays as it is.

        Args:
            batch: with ``targets`` ``role`` and ``source``, and where units are known ``unit_ends`` and ``cu_units``.
            draws: by source.

        Returns:
            The batch with ``prefix_len`` (if a text is generated), ``region_mask``, and these targets beside those of
            :meth:`Contrast.targets`: ``region_positions`` int64 [K] into Nr with ``region_features`` [K, D];
            ``bidirectional_positions`` and ``seq2seq_positions`` int64 [K] into Nt with ``..._labels`` int64 [K] and
            ``..._image`` bool [K], is there an image; ``seq2seq_whole`` bool [texts], is there no source;
            ``visual_empty`` bool, for each masked image whether it has no region; ``text_offsets`` int64 [Nt], see
            :class:`~vlscale.objectives.fragments.Fragmented`.

        Raises:
            VlscaleError: the batch has no roles, or its units do not fit.
        """
        if not {"role", "source"} <= batch.targets.keys():
            raise VlscaleError(f"dataset {batch.dataset}: task {self.name} needs rows with roles; mix it by `unified`")
        role, of_rows = batch.targets["role"].numpy(), RowDraws.of(batch, draws)
        rows = {kind: np.flatnonzero(role == kind) for kind in (Role.VISUAL, Role.BIDIRECTIONAL, Role.SEQ2SEQ)}
        rule = self.visual
        masked = draw_masked_regions(batch, of_rows, rows[Role.VISUAL], rule.probability, rule.overlap)
        regions = masked.nonzero().squeeze(1)
        targets = {"region_positions": regions, "region_features": batch.features[regions]}
        targets |= self.contrast.targets(batch)
        targets["visual_empty"] = batch.region_counts[torch.from_numpy(rows[Role.VISUAL])] == 0
        words = self.spans.draw(batch, of_rows, rows[Role.BIDIRECTIONAL])
        batch = dataclasses.replace(UnimoBatch.of(mask_regions(batch, masked, True)), input_ids=words.input_ids)
        found = self.fragments.take_out(batch, of_rows, rows[Role.SEQ2SEQ])
        targets |= {
            "bidirectional_positions": found.moved[words.positions],
            "bidirectional_labels": words.labels,
            "seq2seq_positions": found.positions,
            "seq2seq_labels": found.labels,
            "seq2seq_whole": found.whole,
        }
        owner, pictured = found.batch.text_owner(), batch.region_counts > 0
        for kind in ("bidirectional", "seq2seq"):
            targets[f"{kind}_image"] = pictured[owner[targets[f"{kind}_positions"]]]
        kept = {name: value for name, value in found.batch.targets.items() if name not in _OF_UNITS}
        return dataclasses.replace(found.batch, targets=kept | targets)

    def counts(self, batch: RaggedBatch) -> dict[str, float]:
        """Return every denominator of :meth:`terms`; all are 0 for an empty slot.

        With a window, ``contrast_pairs`` (groups with any negative) and ``contrast_window`` (groups with one among the
        others) depend on the whole step: before :meth:`share_keys` they are all groups.
        """
        targets, weights = batch.targets, self.weights
        found: dict[str, Any] = {
            "visual_regions": targets["region_positions"].numel(),
            "visual_images": targets["visual_empty"].numel(),
            "seq2seq_texts": targets["seq2seq_whole"].numel(),
        }
        if weights.contrast:
            cu, positive = targets["contrast_cu"].long(), targets["contrast_positive"].long()
            positives = torch.cat([positive.new_zeros(1), positive.cumsum(0)])[cu].diff()
            found["contrast_ranked"] = (cu.diff() > positives).sum()
            found["contrast_units"] = targets["contrast_empty"].numel()
        if self.needs_window:
            of_others = targets.get("window_negatives")
            for place, name in enumerate(_OF_WINDOW):
                found[name] = targets["window_groups"].numel() if of_others is None else of_others[:, place].sum()
        for kind in ("bidirectional", "seq2seq"):
            pictured = targets[f"{kind}_image"]
            found[f"{kind}_tokens"] = pictured.numel()
            found[f"{kind}_pair_tokens"] = pictured.sum()
            found[f"{kind}_text_tokens"] = (~pictured).sum()
        return {name: float(count) * batch.weight for name, count in found.items()}

    def window_keys(self, batch: RaggedBatch) -> Tensor:
        """Return int64 [G, K], see :func:`~vlscale.objectives.match_keys.group_keys`; none of an empty slot."""
        return batch.targets["contrast_keys"][: None if batch.weight else 0]

    def share_keys(
        self, batches: Sequence[RaggedBatch], keys: Tensor, first: int
    ) -> tuple[list[RaggedBatch], dict[str, float]]:
        """Give micro-batches ``targets`` ``window_keys`` [G, K], ``window_at`` int64 and ``window_negatives`` bool.

        ``window_at`` says which groups of the step are the batch's own, ``window_negatives`` [Gw, 2] which of these
        have any negative, and one among other groups. See :meth:`~vlscale.objectives.base.Objective.share_keys`.
        """
        has_GN, given = torch.stack(negatives_of(keys, self.contrast.images), 1), []
        for batch in batches:
            at = torch.arange(first, first + len(self.window_keys(batch)), device=keys.device)
            first += len(at)
            shared = {"window_keys": keys, "window_at": at, "window_negatives": has_GN[at]}
            given.append(dataclasses.replace(batch, targets=batch.targets | shared))
        return given, dict(zip(_OF_WINDOW, has_GN.sum(0).double().tolist(), strict=True))

    def terms(self, model: Any, batch: RaggedBatch) -> dict[str, Term]:
        """Return ``contrast``, ``visual_features``, ``visual_classes``, ``bidirectional``, ``seq2seq`` and metrics.

        Args:
            model: a :class:`vlscale.models.unimo.UnimoForPretraining`.
            batch: a prepared one on its device; with a window also with the targets of :meth:`share_keys`, and with
                ``targets["window"]`` [G, R], what :meth:`represent` has returned for all micro-batches of the step.
                An empty slot needs none of them.

        Raises:
            VlscaleError: the window is missing, or class probabilities do not go with the model.
        """
        weights, encoded = self.weights, model.encode(_positioned(model, batch))
        terms = self._contrast(model, encoded, batch) if weights.contrast else {}
        if weights.features:
            terms |= self._features(model, encoded, batch)
        if weights.classes:
            terms |= self._classes(model, encoded, batch)
        if weights.bidirectional or weights.seq2seq:
            for kind in ("bidirectional", "seq2seq"):
                terms |= self._language(kind, model, encoded, batch)
        for name, count in (("seq2seq_whole", "seq2seq_texts"), ("visual_empty", "visual_images")):
            terms[name] = metric(batch.targets[name].sum(), count, batch)
        return terms

    def represent(self, model: Any, batch: RaggedBatch) -> Tensor:
        """Return [G, R], what the contrast of other micro-batches needs of this one's groups; none of an empty slot.

        Call it without gradients, with torch's generators seeded as they will be for :meth:`terms`: both draw the same
        dropout. In float32 (float64 for a float64 model).
        """
        targets = _contrast_targets(batch)
        candidates = self.contrast.score(model, model.encode(_positioned(model, batch)), targets)
        return self.contrast.represent(candidates)

    def _contrast(self, model: Any, encoded: Any, batch: RaggedBatch) -> dict[str, Term]:
        targets = _contrast_targets(batch)
        candidates = self.contrast.score(model, encoded, targets)
        if self.needs_window and not {"window", "window_keys"} <= targets.keys():
            if batch.weight:
                raise VlscaleError(
                    "objectives.unified.contrast.window: the batch has no window; it comes of a first pass over the "
                    "step with UnifiedLearning.represent, see vlscale.train.window"
                )
            targets["window"] = self.contrast.represent(candidates)
        total, apart_W3 = self.contrast.losses(model, candidates, targets)
        joint_M = targets["contrast_images"] == targets["contrast_texts"]
        _, right_G, gap_G = group_scores(
            candidates.scores.detach(), targets["contrast_positive"], joint_M, targets["contrast_cu"]
        )
        terms = {
            "contrast": loss_term(
                total, "contrast_pairs" if self.needs_window else "contrast_ranked", batch, self.weights.contrast
            ),
            "contrast_accuracy": metric(right_G.sum(), "contrast_ranked", batch),
            "contrast_gap": metric(gap_G.sum(), "contrast_ranked", batch),
            "contrast_empty": metric(targets["contrast_empty"].sum(), "contrast_units", batch),
        }
        if self.needs_window:
            own_W, best_W, mean_W = apart_W3.unbind(1)
            terms["contrast_window_accuracy"] = metric((own_W > best_W).sum(), "contrast_window", batch)
            terms["contrast_window_gap"] = metric((own_W - mean_W).sum(), "contrast_window", batch)
        return terms

    def _features(self, model: Any, encoded: Any, batch: RaggedBatch) -> dict[str, Term]:
        positions, count = batch.targets["region_positions"], "visual_regions"
        predicted_KD = full_precision(model.predict_features(encoded, positions))
        features_KD = full_precision(batch.targets["region_features"])
        if not positions.numel():  # texts come with features of any width
            features_KD = torch.zeros_like(predicted_KD)
        loss = regression_loss(predicted_KD, features_KD)
        return {
            "visual_features": loss_term(loss, count, batch, self.weights.features),
            "visual_zero": metric(features_KD.square().mean(1).sum(), count, batch),
        }

    def _classes(self, model: Any, encoded: Any, batch: RaggedBatch) -> dict[str, Term]:
        positions, count, rule = batch.targets["region_positions"], "visual_regions", self.visual
        logits_KC = full_precision(model.classify_regions(encoded, positions))
        probs_KC = _class_probs(batch, logits_KC)
        loss = class_loss(logits_KC, probs_KC, rule.labels, rule.background_class)
        right = (logits_KC.detach().argmax(1) == top_classes(probs_KC, rule.background_class)).sum()
        return {
            "visual_classes": loss_term(loss, count, batch, self.weights.classes),
            "visual_accuracy": metric(right, count, batch),
        }

    def _language(self, kind: str, model: Any, encoded: Any, batch: RaggedBatch) -> dict[str, Term]:
        labels_K, pictured_K = batch.targets[f"{kind}_labels"], batch.targets[f"{kind}_image"]
        logits_KV = full_precision(model.mlm_logits(encoded, batch.targets[f"{kind}_positions"]))
        right_K = logits_KV.detach().argmax(1) == labels_K
        loss = F.cross_entropy(logits_KV, labels_K, reduction="sum")
        return {
            kind: loss_term(loss, f"{kind}_tokens", batch, self.weights.of(kind)),
            f"{kind}_accuracy": metric(right_K.sum(), f"{kind}_tokens", batch),
            f"{kind}_pair_accuracy": metric((right_K & pictured_K).sum(), f"{kind}_pair_tokens", batch),
            f"{kind}_text_accuracy": metric((right_K & ~pictured_K).sum(), f"{kind}_text_tokens", batch),
        }


def share_window(objective: Objective, model: Any, batches: Sequence[RaggedBatch]) -> list[RaggedBatch]:
    """Return a step's micro-batches with keys and window, where one process has them all.

    The model must draw no dropout, or draw it anew for each batch from the same seed; see
    :meth:`UnifiedLearning.represent`.
    """
    keyed, _ = objective.share_keys(batches, torch.cat([objective.window_keys(batch) for batch in batches]), 0)
    with torch.no_grad():
        window = torch.cat([objective.represent(model, batch) for batch in keyed])
    return [dataclasses.replace(batch, targets=batch.targets | {"window": window}) for batch in keyed]


def _positioned(model: Any, batch: RaggedBatch) -> RaggedBatch:
    offsets = batch.targets.get("text_offsets")
    if offsets is None:
        return batch
    return dataclasses.replace(UnimoBatch.of(batch), text_positions=offsets + model.config.first_position)


def _contrast_targets(batch: RaggedBatch) -> dict[str, Tensor]:
    """The batch's targets; an empty slot has no group in the window, but calls the heads as often as others do."""
    targets = dict(batch.targets)
    if not batch.weight:
        for name in ("window_images", "window_texts", "window_groups"):
            targets[name] = targets[name][:0]
        targets["window_at"] = targets["window_groups"]
        targets.setdefault("window_keys", targets["contrast_keys"][:0])
    return targets


def _class_probs(batch: RaggedBatch, logits_KC: Tensor) -> Tensor:
    """[K, C] of the loader; a batch without masked regions needs none."""
    if not logits_KC.shape[0]:
        return torch.zeros_like(logits_KC)
    probs_KC = batch.targets.get("class_probs")
    if probs_KC is None or probs_KC.shape != logits_KC.shape:
        found = "no class probabilities" if probs_KC is None else f"{probs_KC.shape[1]} classes"
        names, of_regions = parted(batch.dataset), batch.region_owner()[batch.targets["region_positions"]]
        sources = sorted({int(number) for number in batch.targets["source"][of_regions]})
        raise VlscaleError(
            f"dataset {', '.join(names[each] for each in sources)}: the masked regions have {found}, the model "
            f"{logits_KC.shape[1]} classes; set "
            "model.config.num_classes to the classes stores', or objectives.unified.visual.class_weight to 0"
        )
    return full_precision(probs_KC)
