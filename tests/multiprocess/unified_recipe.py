"""A small UNIMO recipe over images, texts and pairs that the multi-process tests vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def unified_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """Some twelve units a step, with every kind of view; ``changes`` replace whole sections."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "match_dropout": 0.0}
    contrast = {"positives": 1, "negatives": 2, "images": 1, "texts": 1, "window": True}
    return {
        "name": "small",
        "seed": 3,
        "model": {
            "name": "unimo",
            "config": {**shape, **still, "max_position_embeddings": 64, "norm": "pre", "initializer": "fan_in"},
        },
        "data": {
            "datasets": [
                {"name": "pairs", "root": str(root / "pairs"), "mix": {"unified": 3}},
                {"name": "images", "root": str(root / "images"), "mix": {"unified": 1}},
                {"name": "texts", "root": str(root / "texts"), "mix": {"unified": 1}},
            ],
            "validation": [
                {"name": "held-pairs", "root": str(root / "pairs")},
                {"name": "held-texts", "root": str(root / "texts")},
            ],
            "max_text_tokens": 16,
            "max_regions": 8,
            "workers": 0,
        },
        "batch": {"global_batch_examples": 12, "micro_batch_tokens": 400},
        "objectives": {"unified": {"contrast": contrast}},
        # Adam's eps stands above the rounding noise of the smallest gradients, or noise would be normalised to steps.
        "optimizer": {"lr": 1.0e-3, "eps": 1.0e-5},
        "schedule": {"warmup_steps": 4, "total_steps": 12},
        "evaluation": {"examples": 16},
        "checkpoint": {"every": 0, "keep": 100},
        "logging": {"every": 1, "tensorboard": False},
        **changes,
    }
