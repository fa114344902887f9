"""A short pre-training on the demo's fixture in one plain loop, and three ways to break it on purpose."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vlscale.config import Recipe, parse_recipe
from vlscale.data.dataset import open_dataset
from vlscale.data.loader import Loader
from vlscale.data.partners import Partners
from vlscale.data.plan import Plan
from vlscale.data.random import Draws
from vlscale.models.registry import build_model
from vlscale.models.uniter import UniterForPretraining
from vlscale.objectives import build_objectives
from vlscale.objectives.mlm import MaskedLanguageModeling
from vlscale.objectives.wra import WordRegionAlignment
from vlscale.ragged import RaggedBatch
from vlscale.report.evaluate import evaluate
from vlscale.report.heldout import open_heldout
from vlscale.train.optim import build_optimizer, build_param_groups
from vlscale.train.schedule import learning_rate

FIXTURE = Path("tests/fixtures/demo")
FUNCTION_WORDS = (
    "a an the and is are there of to with in left right above below under over next here this photo picture on , ."
)


def learning_recipe(seed: int, steps: int) -> Recipe:
    """The demo's recipe in small: two layers, masked words and matching only."""
    raw: dict[str, Any] = {
        "name": "learning",
        "seed": seed,
        "model": {
            "config": {
                "hidden_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 192,
                "max_position_embeddings": 64,
                "norm": "pre",
                "initializer": "fan_in",
            }
        },
        "data": {
            "datasets": [{"name": "scenes", "root": str(FIXTURE / "train"), "mix": {"itm": 2, "mlm": 1}}],
            "validation": [{"name": "held-out", "root": str(FIXTURE / "val")}],
        },
        "batch": {"global_batch_examples": 64},
        "objectives": {
            "mlm": {"content_probability": 0.5, "function_words": FUNCTION_WORDS.split()},
            "wra": {"loss": "hinge", "weight": 3.0, "tokens": "words", "group": 64, "beta": 0.1},
        },
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": steps // 10, "total_steps": steps},
    }
    return parse_recipe(raw, "learning")


def pretrain(recipe: Recipe) -> UniterForPretraining:
    """Train with the plan, loader, objectives and optimiser of the library, without an engine around them."""
    section = recipe.data.datasets[0]
    dataset = open_dataset(section.name, section.root)
    plan = Plan.from_recipe(recipe, {section.name: dataset})
    objectives = build_objectives(recipe.objectives, recipe.tasks, dataset.vocabulary)
    torch.manual_seed(recipe.seed)
    model = build_model(
        recipe.model,
        vocab_size=dataset.vocabulary.size,
        feature_dim=dataset.feature_dim,
        num_classes=dataset.num_classes,
    ).train()
    optimizer = build_optimizer(build_param_groups(model, "correct"), recipe.optimizer)
    ceiling = recipe.batch.micro_batch_tokens
    with Loader({section.name: dataset}, objectives, plan, plan.start(), 0, 1, 1, ceiling, seed=recipe.seed) as loader:
        for taken, (step, _, (batch,)) in zip(range(recipe.schedule.total_steps), loader, strict=False):
            counts = objectives[step.task].counts(batch)
            terms = objectives[step.task].terms(model, batch).values()
            losses = [term.weight * term.sum / max(counts[term.count], 1.0) for term in terms if term.weight]
            torch.stack(losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.schedule, recipe.optimizer.lr, taken)
            optimizer.step()
            optimizer.zero_grad()
    return model


def measure(recipe: Recipe, model: UniterForPretraining) -> Mapping[str, float]:
    """Metric -> value on the fixture's held-out scenes."""
    section = recipe.data.validation[0]
    heldout = open_heldout(open_dataset(section.name, section.root), recipe.seed, 60, 100)
    return {name: outcome.mean for name, outcome in evaluate(model, heldout, recipe.objectives).outcomes.items()}


@contextlib.contextmanager
def sabotage(what: str) -> Iterator[None]:
    """Break one part of pre-training inside the block.

    ``masking``: masked words stay readable. ``alignment``: the transport sees the regions of another example.
    ``negatives``: an example labelled a negative keeps its own image.
    """
    with pytest.MonkeyPatch.context() as patch:
        if what == "masking":
            prepare = MaskedLanguageModeling.prepare

            def readable(self: MaskedLanguageModeling, batch: RaggedBatch, draws: Draws) -> RaggedBatch:
                return dataclasses.replace(prepare(self, batch, draws), input_ids=batch.input_ids)

            patch.setattr(MaskedLanguageModeling, "prepare", readable)
        elif what == "alignment":
            align = WordRegionAlignment.align

            def askew(self: WordRegionAlignment, encoded: Any, batch: RaggedBatch) -> Any:
                shifted = dataclasses.replace(encoded, region_index=encoded.region_index.flip(0))
                return align(self, shifted, batch)

            patch.setattr(WordRegionAlignment, "align", askew)
        elif what == "negatives":
            draw = Partners.draw

            def own(self: Partners, taken: Any) -> Any:
                _, _, labels = draw(self, taken)
                return taken.rows, self._lengths.first_image(taken.rows), labels

            patch.setattr(Partners, "draw", own)
        else:
            raise ValueError(what)
        yield
