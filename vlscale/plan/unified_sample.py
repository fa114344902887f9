"""Micro-batches of unified steps for trials: the recipe's rows and masking, arbitrary content."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.data.plan import Step
from vlscale.data.random import Draws
from vlscale.data.schema import Vocabulary
from vlscale.models.registry import ModelConfig
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.unified import UnifiedLearning
from vlscale.plan.unified import RowLengths
from vlscale.ragged import RaggedBatch, cumulative


def unified_batch(
    step: Step,
    chosen: NDArray[np.int64],
    rows: RowLengths,
    objective: UnifiedLearning,
    config: ModelConfig,
    vocabulary: Vocabulary,
    seed: int,
) -> UnimoBatch:
    """Return a prepared batch of some rows of a step, on the CPU.

    Boxes are scattered over the image, so that few of them overlap.

    Args:
        step: of task ``unified``.
        chosen: int64 [B], which rows, whole groups; a row may come several times.
        rows: of the step.
        objective: masks them.
        config: of the model: width of a feature, classes, words.
        vocabulary: special tokens.
        seed: of the contents.
    """
    draw = torch.Generator().manual_seed(seed)
    text, regions, views = rows.text[chosen], rows.regions[chosen], step.views
    assert views is not None
    cu_text, cu_regions = (cumulative(torch.from_numpy(lengths)) for lengths in (text, regions))
    words, boxes = int(text.sum()), int(regions.sum())
    ids = torch.randint(vocabulary.size - 1, max(vocabulary.size, config.vocab_size), (words,), generator=draw)
    starts, ends = cu_text[:-1].long(), cu_text[1:].long()
    ids[starts[ends > starts]], ids[ends[ends > starts] - 1] = vocabulary.cls, vocabulary.sep
    corner = torch.rand(boxes, 2, generator=draw)
    # Features lie in float16, as the stores' do; a few rows are drawn and repeated, their values do not matter.
    drawn = torch.randn(min(boxes, 64) or 1, config.feature_dim, generator=draw).half()
    batch = RaggedBatch(
        task=step.task, dataset=step.dataset, input_ids=ids.clamp(max=config.vocab_size - 1), cu_text=cu_text,
        features=drawn.repeat(-(-boxes // len(drawn)) if boxes else 0, 1)[:boxes],
        boxes=torch.cat([corner, corner + 0.1 * (1 - corner)], 1), cu_regions=cu_regions,
        passes=torch.from_numpy(step.passes[chosen]), examples=torch.arange(len(chosen)),
        images=torch.from_numpy(step.images[chosen]), group=_groups(step.group[chosen]),
        region_rows=torch.arange(boxes),
        targets={
            "role": torch.from_numpy(views.role[chosen].astype(np.int64)),
            "source": torch.from_numpy(views.source[chosen].astype(np.int64)),
        },
    )  # fmt: skip
    made = objective.prepare_views(batch, [Draws(seed, name) for name in views.datasets])
    if objective.needs_class_probs:
        probs = torch.rand(made.targets["region_positions"].numel(), config.num_classes, generator=draw)
        made.targets["class_probs"] = (probs / probs.sum(1, keepdim=True)).half()
    return made


def _groups(group: NDArray[np.int32]) -> torch.Tensor:
    """int32 [B], rising from 0 wherever the group changes: a step that is repeated has its groups anew."""
    return torch.from_numpy(np.cumsum(np.r_[0, group[1:] != group[:-1]]).astype(np.int32))
