"""A small data set and a recipe over it that every multi-process test varies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import make_dataset

SMALL_BUCKETS = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}


def write_data(root: Path) -> None:
    """Training and validation sets under ``root``."""
    make_dataset(root / "train", images=40, texts_per_image=3, seed=0)
    make_dataset(root / "val", images=12, texts_per_image=2, seed=1)


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe whose tasks alternate, so that heads lie idle; ``changes`` replace whole sections."""
    mix = {"itm": 1, "mlm": 1, "mrckl": 1, "mrfr": 1}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return {
        "name": "small",
        "seed": 3,
        "model": {"config": {**shape, "max_position_embeddings": 24, "norm": "pre", "initializer": "fan_in"}},
        "data": {
            "datasets": [{"name": "toy", "root": str(root / "train"), "mix": mix}],
            "validation": [{"name": "toy-val", "root": str(root / "val")}],
            "max_text_tokens": 16,
            "max_regions": 8,
            "workers": 0,
        },
        "batch": {"global_batch_examples": 24, "micro_batch_tokens": 160},
        "objectives": {"wra": {"loss": "hinge", "weight": 1.0, "group": 4, "tokens": "words"}},
        # Adam's eps stands above the rounding noise of the smallest gradients, or noise would be normalised to steps.
        "optimizer": {"lr": 1.0e-3, "eps": 1.0e-5},
        "schedule": {"warmup_steps": 4, "total_steps": 20},
        "evaluation": {"examples": 16},
        "checkpoint": {"every": 0, "keep": 100},
        "logging": {"every": 1, "tensorboard": False},
        **changes,
    }


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def write_ds_config(path: Path, stage: int, **more: Any) -> Path:
    """Write a DeepSpeed JSON that clips, with small buckets so that there are several."""
    zero = {"stage": stage, **SMALL_BUCKETS}
    if stage == 3:  # partition every parameter, also the small ones
        zero["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": zero, **more}), encoding="utf-8")
    return path
