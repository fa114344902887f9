"""What a recipe runs: lengths (the data's, or assumed ones), its steps as they would be dealt, and their arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.config import Recipe
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import Rule, accumulation, deal
from vlscale.data.lengths import SPECIALS, DatasetLengths
from vlscale.data.plan import Plan, Step
from vlscale.data.views import UNIFIED
from vlscale.errors import VlscaleError
from vlscale.models.registry import ModelConfig, resolve_config
from vlscale.models.unimo_config import UnimoConfig
from vlscale.plan.activations import Load
from vlscale.plan.assumed import assumed_datasets
from vlscale.plan.unified import unified_shape
from vlscale.ragged import RaggedBatch, cumulative
from vlscale.train.flops import attention_flops, layer_weights, model_flops, seen_pairs

STEPS = 16
"""Steps that are cut and dealt to learn what a step is like."""


@dataclass(frozen=True)
class Source:
    """What is known of the recipe's data.

    Attributes:
        lengths: dataset name -> lengths; assumed: they are not the data's.
        config: the model.
    """

    lengths: dict[str, DatasetLengths]
    assumed: bool
    config: ModelConfig


def read_source(recipe: Recipe) -> Source:
    """Open the recipe's data if all of them are folders that exist; else assume lengths.

    Raises:
        VlscaleError: a store is damaged, or model and data do not go together.
    """
    sections = recipe.data.datasets
    if all(isinstance(section.root, Path) and _is_here(section.root) for section in sections):
        opened = {section.name: open_dataset(section.name, section.root, verify=False) for section in sections}
        vocabulary = next((d.vocabulary for d in opened.values() if d.vocabulary is not None), None)
        facts: dict[str, Any] = {
            "vocab_size": None if vocabulary is None else vocabulary.size,
            "feature_dim": next((d.feature_dim for d in opened.values() if d.feature_dim is not None), None),
            "num_classes": next((d.num_classes for d in opened.values() if d.num_classes is not None), None),
        }
        config = resolve_config(recipe.model, max_text_tokens=recipe.data.max_text_tokens, **facts)
        return Source({name: dataset.lengths for name, dataset in opened.items()}, False, config)
    config = resolve_config(recipe.model, max_text_tokens=recipe.data.max_text_tokens)
    return Source(assumed_datasets(recipe), True, config)


def _is_here(root: Path) -> bool:
    return (root / "texts").is_dir() or (root / "images").is_dir()


@dataclass(frozen=True)
class TaskWork:
    """A task's steps, on average.

    Attributes:
        task: its name; share: of all steps.
        tokens, examples: of an optimiser step, over all GPUs.
        flops: of an optimiser step, forward and backward, nothing computed twice.
        encoder_flops: the encoder's part of them.
        step: what a step holds, for the composition of a micro-batch.
    """

    task: str
    share: float
    tokens: float
    examples: float
    flops: float
    encoder_flops: float
    step: Load

    def load(self, tokens: float) -> Load:
        """Return a micro-batch of so many tokens, composed like a step."""
        return self.step.scaled(tokens / self.step.tokens)


@dataclass(frozen=True)
class Workload:
    """What one optimiser step is on so many GPUs.

    Attributes:
        tasks: each task that the recipe trains.
        gpus: number of GPUs; accumulation: micro-steps per step.
        straggler_step: tokens of the busiest GPU / mean, over a step.
        straggler_micro: the same where GPUs wait for each other at every micro-step (ZeRO stages 2 and 3).
        fill: tokens / (micro-batches x ceiling); most: tokens of the fullest micro-batch that was dealt.
        assumed: lengths are assumed.
    """

    tasks: tuple[TaskWork, ...]
    gpus: int
    accumulation: int
    straggler_step: float
    straggler_micro: float
    fill: float
    most: float
    assumed: bool

    def mean(self, name: str) -> float:
        """Mean of a field of :class:`TaskWork` over all steps."""
        return float(sum(task.share * getattr(task, name) for task in self.tasks))


class Planner:
    """Cuts a recipe's steps once, and deals them to any number of GPUs.

    Raises:
        VlscaleError: recipe and lengths do not go together.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self.recipe, self.source = recipe, source
        datasets = {name: SimpleNamespace(lengths=lengths, fingerprint="") for name, lengths in source.lengths.items()}
        self.plan = Plan.from_recipe(recipe, datasets)
        position, steps = self.plan.start(), []
        for _ in range(STEPS):
            step, position = self.plan.step(position)
            steps.append(step)
        self._steps = steps
        self._dealt: dict[int, Workload] = {}
        self.tasks = self._works()

    def _works(self) -> tuple[TaskWork, ...]:
        shares: dict[str, float] = {}
        datasets: dict[str, dict[str, float]] = {}
        for (dataset, task), share in zip(self.plan.pairs, self.plan.shares, strict=True):
            shares[task] = shares.get(task, 0.0) + float(share)
            datasets.setdefault(task, {})[dataset] = float(share)
        return tuple(self._work(task, shares[task], datasets[task]) for task in shares)

    def _work(self, task: str, share: float, datasets: dict[str, float]) -> TaskWork:
        """What a step of ``task`` is, from one step of each dataset, weighed by its share."""
        if task == UNIFIED:
            return self._unified_work()
        parts = []
        for dataset, weight in datasets.items():
            step = self._step_of(dataset, task)
            batch, load = shape_of(step, self.source.lengths[dataset], self.recipe, self.source.config)
            flops = model_flops(self.source.config, batch)
            parts.append((weight / share, load, flops, encoder_flops(self.source.config, batch)))
        tokens, examples, flops, encoder = (
            float(sum(part[0] * value for part, value in zip(parts, values, strict=True)))
            for values in zip(*((p[1].tokens, p[1].examples, p[2], p[3]) for p in parts), strict=True)
        )
        return TaskWork(task, share, tokens, examples, flops, encoder, parts[0][1])

    def _unified_work(self) -> TaskWork:
        """The mean of the steps, which all mix all datasets."""
        config = self.source.config
        assert isinstance(config, UnimoConfig)
        shapes = [unified_shape(step, self.source.lengths, self.recipe, config) for step in self._steps]
        load, count = shapes[0].load, len(shapes)
        tokens, examples, flops, encoder = (
            sum(values) / count
            for values in zip(
                *((s.load.tokens, s.load.examples, s.flops, s.encoder_flops) for s in shapes), strict=True
            )
        )
        return TaskWork(UNIFIED, 1.0, tokens, examples, flops, encoder, load)

    def example_step(self, task: str) -> tuple[str, Step]:
        """Return a step of ``task``, and the dataset it is from: that with the largest share."""
        shares = zip(self.plan.pairs, self.plan.shares, strict=True)
        _, dataset = max((float(share), name) for (name, of), share in shares if of == task)
        return dataset, self._step_of(dataset, task)

    def _step_of(self, dataset: str, task: str) -> Step:
        """One step of this dataset and task."""
        for step in self._steps:
            if (step.dataset, step.task) == (dataset, task):
                return step
        lengths = self.source.lengths[dataset]
        section = next(section for section in self.recipe.data.datasets if section.name == dataset)
        alone = Plan([(lengths, {task: float(section.mix[task])})], self.plan.settings)  # type: ignore[index]
        return alone.step(alone.start())[0]

    def deal(self, gpus: int) -> Workload:
        """Deal the steps to ``gpus`` GPUs.

        Raises:
            VlscaleError: a step has fewer examples than there are GPUs, or an example exceeds the ceiling.
        """
        if gpus not in self._dealt:
            self._dealt[gpus] = self._deal(gpus)
        return self._dealt[gpus]

    def _deal(self, gpus: int) -> Workload:
        batch = self.recipe.batch
        gas = accumulation(self.plan, gpus)
        rule = Rule(batch.mode, self.source.config.hidden_size)
        by_step, by_micro, filled, most = [], [], 0, 0.0
        for step in self._steps:
            dealt = deal(step, gpus, gas, batch.micro_batch_tokens, rule)
            table = np.array([[m.tokens * bool(m.weight) for m in rank] for rank in dealt], np.float64)
            by_step.append(table.sum(1).max() / table.sum(1).mean())
            by_micro.append(table.max(0).sum() / table.sum(1).mean())
            filled, most = filled + int(table.sum()), max(most, float(table.max()))
        slots = len(self._steps) * gpus * gas * batch.micro_batch_tokens
        return Workload(
            self.tasks, gpus, gas, float(np.mean(by_step)), float(np.mean(by_micro)), filled / slots,
            most, self.source.assumed,
        )  # fmt: skip


def shape_of(step: Step, lengths: DatasetLengths, recipe: Recipe, config: ModelConfig) -> tuple[RaggedBatch, Load]:
    """Return a whole step as one batch of empty tensors, with as many targets as masking is expected to choose."""
    text = lengths.tokens[step.texts].astype(np.int64) + SPECIALS
    regions = np.minimum(lengths.regions[np.maximum(step.images, 0)], recipe.data.max_regions).astype(np.int64)
    regions[step.images < 0] = 0
    objectives, task = recipe.objectives, step.task
    masked: dict[str, int] = {}
    if task == "mlm":
        masked["token_positions"] = _expected(text - SPECIALS, masking_chance(recipe))
    elif task != "itm":
        masked["region_positions"] = _expected(regions[regions > 0], objectives.mrm.probability)
    targets = {name: torch.empty(count, device="meta") for name, count in masked.items()}
    if task in ("mrc", "mrckl"):
        targets["class_probs"] = torch.empty(0)
    if task == "itm":
        targets["itm_labels"] = torch.empty(len(step), device="meta")
    batch = _empty_batch(task, step.dataset, text, regions, config.feature_dim, targets)
    count = next(iter(masked.values()), len(step))
    copied = task != "itm" and (task != "mlm" or objectives.masking == "joint")
    pairs = float(np.square(text + regions).sum())
    load = Load(task, float(text.sum()), float(regions.sum()), float(len(step)), float(count), copied, pairs)
    load = replace(load, longest=float((text + regions).max()))
    if task == "itm" and objectives.wra.loss != "off":
        words = text if objectives.wra.tokens == "all" else text - SPECIALS
        padded = float(len(step)) * float(text.max()) * float(regions.max())
        load = replace(load, cells=float((words * regions).sum()), padded_cells=padded)
    return batch, load


def least_ceiling(plan: Plan) -> int:
    """Return the least ``batch.micro_batch_tokens`` that holds the largest group of every task."""
    padded = plan.settings.mode == "padded"
    found = 0
    for name, task in plan.pairs:
        if task == UNIFIED:
            found = max(found, plan.heaviest(name, task, 1))
            continue
        group, source = plan.settings.group_of(task), plan.sources[name]
        found = max(found, group * source.heaviest(task, 1) if padded else source.heaviest(task, group))
    return found


def masking_chance(recipe: Recipe) -> float:
    """Return the chance that a word piece is masked; every second one is assumed to be a content word."""
    section = recipe.objectives.mlm
    if section.content_probability is None:
        return section.probability
    return (section.probability + section.content_probability) / 2


def encoder_flops(config: ModelConfig, batch: RaggedBatch) -> float:
    """Return the FLOPs of the encoder's layers alone: what activation checkpointing computes again, a third of it."""
    return 6.0 * layer_weights(config) * batch.tokens + attention_flops(config, seen_pairs(batch))


def _expected(lengths: NDArray[np.int64], chance: float) -> int:
    """Positions that are masked on average: each with ``chance``, and one where the draw chose none."""
    return round(float((chance * lengths + (1 - chance) ** lengths).sum()))


def _empty_batch(
    task: str, dataset: str, text: NDArray[np.int64], regions: NDArray[np.int64], width: int, targets: dict[str, Any]
) -> RaggedBatch:
    texts, rows, count = int(text.sum()), int(regions.sum()), len(text)
    meta = torch.device("meta")
    if not count or not texts + rows:
        raise VlscaleError(f"dataset {dataset}: a step of task {task} holds nothing; check the recipe's batch section")
    return RaggedBatch(
        task=task,
        dataset=dataset,
        input_ids=torch.empty(texts, dtype=torch.int64, device=meta),
        cu_text=cumulative(torch.from_numpy(text)),
        features=torch.empty(rows, width, device=meta),
        boxes=torch.empty(rows, 4, device=meta),
        cu_regions=cumulative(torch.from_numpy(regions)),
        passes=torch.empty(count, device=meta),
        examples=torch.empty(count, device=meta),
        images=torch.empty(count, device=meta),
        group=torch.empty(count, device=meta),
        region_rows=torch.empty(rows, device=meta),
        targets=targets,
    )


def with_model(config: ModelConfig, **changes: Any) -> ModelConfig:
    """Return a model's configuration with other sizes."""
    return type(config).model_validate({**config.model_dump(), **changes})
