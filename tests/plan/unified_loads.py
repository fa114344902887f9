"""Small UNIMO models, unified micro-batches of a recipe's own kind, and what they hold in memory, measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlscale.config import Recipe, parse_recipe
from vlscale.models.registry import model_of
from vlscale.models.unimo import UnimoConfig
from vlscale.objectives.unified import UnifiedLearning, share_window
from vlscale.plan.activations import Load
from vlscale.plan.assumed import assumed_datasets
from vlscale.plan.measure import peak_bytes, saved_bytes
from vlscale.plan.sample import Sampler
from vlscale.plan.unified import load_of
from vlscale.plan.workload import Planner, Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {"pairs": 5, "images": 1, "texts": 1}


def small_unimo(**changes: Any) -> UnimoConfig:
    """A model small enough for a test; attention without dropout, which only GPU kernels fuse."""
    sizes: dict[str, Any] = {
        "vocab_size": 2000, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 512, "feature_dim": 256, "num_classes": 160, "attention_dropout": 0.0,
    }  # fmt: skip
    return UnimoConfig(**{**sizes, **changes})


def unified_recipe(kinds: dict[str, int] | None = None, **unified: Any) -> Recipe:
    """A recipe that mixes datasets of these kinds, whose data are assumed."""
    datasets = [
        {"name": kind, "root": f"nowhere/{kind}", "kind": kind, "mix": {"unified": share}}
        for kind, share in (kinds or KINDS).items()
    ]
    return parse_recipe(
        {
            "name": "made",
            "model": {"name": "unimo"},
            "data": {"datasets": datasets, "max_text_tokens": 40},
            "batch": {"global_batch_tokens": 20000, "micro_batch_tokens": 8000},
            "objectives": {"unified": unified},
            "optimizer": {"lr": 1e-3},
            "schedule": {"warmup_steps": 1, "total_steps": 10},
        },
        "made",
    )  # fmt: skip


def planner_of(recipe: Recipe, config: UnimoConfig) -> Planner:
    """The recipe's steps over assumed lengths."""
    return Planner(recipe, Source(assumed_datasets(recipe), True, config))


@dataclass(frozen=True)
class Measured:
    """Bytes that the encoder saves, and the peak of forward and backward; and what was run."""

    saved: int
    peak: int
    load: Load


def measure_unified(
    recipe: Recipe, config: UnimoConfig, tokens: int, precision: str = "fp32", policy: str = "none"
) -> Measured:
    """Run a micro-batch once for each figure."""
    dtype, sampler = DTYPES[precision], Sampler(planner_of(recipe, config))
    batch, objective = sampler.batch("unified", tokens), sampler.objectives["unified"]
    batch = dataclasses.replace(batch, features=batch.features.to(dtype))
    model = model_of(config).to(dtype)
    model.set_activation_checkpointing(policy)
    assert isinstance(objective, UnifiedLearning)
    inputs = [*(v for v in vars(batch).values() if isinstance(v, Tensor)), *batch.targets.values()]
    saved = saved_bytes(lambda: model.encode(batch), [*model.parameters(), *inputs])

    def step() -> None:
        made = share_window(objective, model, [batch])[0] if objective.needs_window else batch
        terms = objective.terms(model, made)
        loss = sum((term.sum * term.weight for term in terms.values()), torch.zeros(()))
        loss.backward()

    return Measured(saved, peak_bytes(step, model, inputs), load_of(batch))
