"""Micro-batches composed like the recipe's: lengths of its own steps, arbitrary content, ready to be trained."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.config import MlmSection, Recipe
from vlscale.data.lengths import SPECIALS
from vlscale.data.plan import Step
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError
from vlscale.models.registry import ModelConfig
from vlscale.objectives import Objective, build_objectives
from vlscale.objectives.itm import ImageTextMatching
from vlscale.objectives.unified import UnifiedLearning
from vlscale.plan.unified import RowLengths
from vlscale.plan.unified_sample import unified_batch
from vlscale.plan.workload import Planner, masking_chance
from vlscale.ragged import RaggedBatch, cumulative

_VOCABULARY = Vocabulary.from_tokens([*SPECIAL_TOKENS.values(), "word"])
_CLS, _SEP, _WORD = _VOCABULARY.cls, _VOCABULARY.sep, _VOCABULARY.size - 1


class Sampler:
    """Composes micro-batches of any size from the examples of a recipe's steps.

    Args:
        planner: the recipe's steps.
        seed: of contents and masks.

    Attributes:
        config: of the model.
        objectives: the recipe's; only their losses may be used, since masks are made here.
    """

    def __init__(self, planner: Planner, seed: int = 0) -> None:
        self._planner, self._seed = planner, seed
        self.config: ModelConfig = planner.source.config
        recipe = planner.recipe
        section = recipe.objectives.model_copy(update={"mlm": MlmSection()})
        self.objectives: dict[str, Objective] = build_objectives(section, recipe.tasks, _VOCABULARY)

    def batch(self, task: str, tokens: float) -> RaggedBatch:
        """Return a batch on the CPU: whole groups of a step of ``task``, in its order, up to ``tokens`` of them.

        A step is repeated where it holds fewer tokens; one group is the least.
        """
        dataset, step = self._planner.example_step(task)
        chosen, objective = _first_groups(step, tokens), self.objectives[task]
        if isinstance(objective, UnifiedLearning):
            rows = RowLengths.of(step, self._planner.source.lengths, self._planner.recipe.data.max_regions)
            return unified_batch(step, chosen, rows, objective, self.config, _VOCABULARY, self._seed)
        lengths = self._planner.source.lengths[dataset]
        text = lengths.tokens[step.texts[chosen]].astype(np.int64) + SPECIALS
        images = step.images[chosen]
        regions = np.minimum(lengths.regions[np.maximum(images, 0)], self._planner.recipe.data.max_regions)
        regions = np.where(images < 0, 0, regions).astype(np.int64)
        batch = self._filled(task, dataset, text, regions, step.labels[chosen])
        if isinstance(objective, ImageTextMatching) and objective.alignment is not None:
            batch.targets |= objective.alignment.targets(batch)
        return batch

    def _filled(
        self, task: str, dataset: str, text: NDArray[np.int64], regions: NDArray[np.int64], labels: NDArray[np.int8]
    ) -> RaggedBatch:
        config, recipe = self.config, self._planner.recipe
        draw = torch.Generator().manual_seed(self._seed)
        cu_text, cu_regions = (cumulative(torch.from_numpy(lengths)) for lengths in (text, regions))
        words, rows, count = int(text.sum()), int(regions.sum()), len(text)
        # Features lie in float16, as the stores' do; a few rows are drawn and repeated, their values do not matter.
        drawn = torch.randn(min(rows, 64) or 1, config.feature_dim, generator=draw).half()
        features = drawn.repeat(-(-rows // len(drawn)) if rows else 0, 1)[:rows]
        ids = torch.randint(_WORD, max(_WORD + 1, config.vocab_size), (words,), generator=draw)
        ids[cu_text[:-1].long()] = _CLS
        ids[cu_text[1:].long() - 1] = _SEP
        targets, mask = self._targets(task, recipe, (text, regions), features, labels, draw)
        group = np.arange(count, dtype=np.int32) // self._planner.plan.settings.group_of(task)
        positions = torch.arange(count)
        return RaggedBatch(
            task=task, dataset=dataset, input_ids=ids.clamp(max=config.vocab_size - 1), cu_text=cu_text,
            features=features, boxes=torch.rand(rows, 4, generator=draw), cu_regions=cu_regions, passes=positions * 0,
            examples=positions, images=positions, group=torch.from_numpy(group), region_rows=torch.arange(rows),
            region_mask=mask, targets=targets,
        )  # fmt: skip

    def _targets(
        self, task: str, recipe: Recipe, lengths: tuple[NDArray[np.int64], NDArray[np.int64]], features: Tensor,
        labels: NDArray[np.int8], draw: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor | None]:  # fmt: skip
        """Targets, and which regions are masked; features of those become zero."""
        text, regions = lengths
        if task == "itm":
            return {"itm_labels": torch.from_numpy(labels.astype(np.int64))}, None
        joint = recipe.objectives.masking == "joint"
        chosen = _masked(regions, recipe.objectives.mrm.probability, draw) if task != "mlm" or joint else None
        if task == "mlm":
            inner = _masked(text - SPECIALS, masking_chance(recipe), draw)
            owner = torch.repeat_interleave(torch.arange(len(text)), torch.from_numpy(text - SPECIALS))
            positions = (torch.arange(len(owner)) + 1 + SPECIALS * owner)[inner]  # each text begins with [CLS]
            found = {"token_positions": positions, "token_labels": torch.full_like(positions, _WORD)}
        else:
            assert chosen is not None
            positions = chosen.nonzero().squeeze(1)
            found = {"region_positions": positions}
            if task == "mrfr":
                found["region_features"] = features[positions].clone()
            else:
                probs = torch.rand(len(positions), self.config.num_classes, generator=draw)
                found["class_probs"] = (probs / probs.sum(1, keepdim=True)).half()
        if chosen is not None:
            features[chosen] = 0
        return found, chosen


def _first_groups(step: Step, tokens: float) -> NDArray[np.int64]:
    """Examples of the first groups of a step, repeated if need be, that hold at most ``tokens``; one group at least."""
    times = int(tokens // max(1, int(step.costs.sum()))) + 1
    if times * len(step) > 1 << 24:
        raise VlscaleError(f"a micro-batch of {tokens:.0f} tokens is too large to be tried")
    group = np.concatenate([step.group + number * (int(step.group.max()) + 1) for number in range(times)])
    rows, costs = np.tile(np.arange(len(step)), times), np.tile(step.costs.astype(np.int64), times)
    ends = np.flatnonzero(np.r_[group[1:] != group[:-1], True]) + 1
    held = np.cumsum(costs)[ends - 1]
    groups = max(1, int(np.searchsorted(held, tokens, side="right")))
    return rows[: ends[groups - 1]]


def _masked(lengths: NDArray[np.int64], chance: float, draw: torch.Generator) -> Tensor:
    """Bool [sum of lengths]: each position with ``chance``, at least one of every example that has any."""
    total = int(lengths.sum())
    chosen = torch.rand(total, generator=draw) < chance
    starts = np.cumsum(lengths) - lengths
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if length and not chosen[start : start + length].any():
            chosen[start] = True
    return chosen
