"""What a unified step holds: its rows' lengths, what is predicted of them, and their FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.config import Recipe
from vlscale.data.lengths import SPECIALS, DatasetLengths
from vlscale.data.plan import Step
from vlscale.data.views import Role
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.models.unimo_config import UnimoConfig
from vlscale.plan.activations import Load
from vlscale.train.flops import attention_flops, layer_weights, seen_pairs

COMASKED = 1.0
"""Regions that are masked with each anchor because they overlap; assumed, plans read no boxes."""


@dataclass(frozen=True, eq=False)
class RowLengths:
    """Lengths of the B rows of a unified step.

    Attributes:
        text: int64 [B], word pieces with [CLS] and [SEP]; 0 without a text.
        regions: int64 [B], regions, without [IMG]; 0 without an image.
        role: int64 [B], see :class:`~vlscale.data.views.Role`.
    """

    text: NDArray[np.int64]
    regions: NDArray[np.int64]
    role: NDArray[np.int64]

    @classmethod
    def of(cls, step: Step, lengths: Mapping[str, DatasetLengths], max_regions: int) -> RowLengths:
        """Those of a step of task ``unified`` over datasets of these lengths."""
        views = step.views
        assert views is not None
        text, regions = np.zeros(len(step), np.int64), np.zeros(len(step), np.int64)
        for number, name in enumerate(views.datasets):
            of, mine = lengths[name], views.source == number
            shown = np.flatnonzero(mine & (step.images >= 0))
            regions[shown] = np.minimum(of.regions[step.images[shown]], max_regions)
            plain = np.flatnonzero(mine & (step.texts >= 0) & (views.view < 0))
            text[plain] = of.tokens[step.texts[plain]].astype(np.int64) + SPECIALS
            rewritten = np.flatnonzero(mine & (views.view >= 0))
            if len(rewritten) and of.beside.rewrites is not None:
                text[rewritten] = of.beside.rewrites.view_tokens[views.view[rewritten]].astype(np.int64) + SPECIALS
        return cls(text, regions, views.role.astype(np.int64))

    def of_roles(self, *roles: Role) -> NDArray[np.bool_]:
        """bool [B], which rows have one of the roles."""
        return np.isin(self.role, [int(role) for role in roles])


@dataclass(frozen=True)
class UnifiedShape:
    """A unified step as work.

    Attributes:
        load: what it holds.
        flops: forward and backward, nothing computed twice; encoder_flops: the encoder's part of them.
    """

    load: Load
    flops: float
    encoder_flops: float


def unified_shape(
    step: Step, lengths: Mapping[str, DatasetLengths], recipe: Recipe, config: UnimoConfig
) -> UnifiedShape:
    """Return a step with as many targets as masking is expected to choose."""
    section = recipe.objectives.unified
    language, visual, contrast = section.language, section.visual, section.contrast
    rows = RowLengths.of(step, lengths, recipe.data.max_regions)
    generated = rows.of_roles(Role.SEQ2SEQ)
    pieces = np.maximum(rows.text - SPECIALS, 0)
    fragments = _fragments(pieces[generated], language.seq2seq_probability, language.shortest_fragment,
                           language.longest_fragment)  # fmt: skip
    targets = np.zeros(len(step))
    # [CLS] and [SEP] of each fragment are new; [SEP] is predicted, too.
    targets[generated] = np.ceil(pieces[generated] * language.seq2seq_probability) + 2 * fragments
    text = rows.text + 2 * _spread(fragments, generated)
    slots = (rows.regions > 0).astype(np.int64)
    joint = text + rows.regions + slots
    words = float(np.ceil(pieces[rows.of_roles(Role.BIDIRECTIONAL)] * language.probability).sum())
    words += float((targets[generated] - fragments).sum())
    anchors = rows.regions[rows.of_roles(Role.VISUAL)] * visual.probability * (1 + COMASKED)
    compared = _compared(rows)
    window = 2.0 * float(rows.of_roles(Role.IMAGE).sum()) * contrast.window
    pairs = float(((joint - targets) ** 2 + targets * joint).sum())
    load = Load(
        "unified", float(text.sum()), float(rows.regions.sum()), float(len(step)), words, True, pairs,
        longest=float(joint.max()), slots=float(slots.sum()), masked_regions=float(anchors.sum()),
        pooled=2.0 * compared + window, generated=float(targets.sum()),
    )  # fmt: skip
    return UnifiedShape(load, *_flops(load, config, visual.class_weight > 0))


def load_of(batch: UnimoBatch) -> Load:
    """Return what a prepared batch holds."""
    targets, sizes = batch.targets, batch.measured

    def rows(*names: str) -> float:
        return float(sum(targets[name].numel() for name in names))

    words = rows("bidirectional_positions", "seq2seq_positions")
    pooled = rows("contrast_images", "contrast_texts", "window_images", "window_texts")
    return Load(
        "unified", float(batch.input_ids.numel()), float(batch.boxes.shape[0]), float(len(batch)), words, True,
        seen_pairs(batch), longest=float(batch.longest), slots=float(sizes.images),
        masked_regions=rows("region_positions"), pooled=pooled, generated=float(sizes.targets),
    )  # fmt: skip


def _compared(rows: RowLengths) -> float:
    """Candidates of all groups: the pair's own two encoded apart are one."""
    return float(rows.of_roles(*(role for role in Role if role >= Role.PAIR and role != Role.TEXT)).sum())


def _fragments(pieces: NDArray[np.int64], probability: float, shortest: int, longest: int) -> NDArray[np.float64]:
    """float64 [n], fragments that are expected to be taken out of texts of so many word pieces; one at least."""
    return np.maximum(1.0, np.ceil(pieces * probability / ((shortest + longest) / 2)))


def _spread(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    found = np.zeros(len(where))
    found[where] = values
    return found


def _flops(load: Load, config: UnimoConfig, classes: bool) -> tuple[float, float]:
    """All, and those of the encoder; as :func:`vlscale.train.flops.model_flops` counts them."""
    width = config.hidden_size
    encoder = 6.0 * layer_weights(config) * load.tokens + attention_flops(config, load.pairs)
    outputs = config.feature_dim + (config.num_classes if classes else 0)
    heads = load.targets * (width * width + width * config.vocab_size)
    heads += load.masked_regions * width * outputs + load.pooled * width * width
    features = 4.0 * (load.regions + load.slots) * config.feature_dim * width
    return float(encoder + 6.0 * heads + features), float(encoder)
