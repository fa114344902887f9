"""A small corpus of the UNIMO demo, built once per test session from the fixture, and recipes that train on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from data_tools.build_demo_unimo import run
from vlscale.config import Recipe, parse_recipe

SCENES = Path(__file__).resolve().parent / "fixtures" / "demo"
OPTIONS = ["--scenes", str(SCENES), "--most-scenes", "180", "--sentences", "160", "--vocab-size", "700"]
SHAPE = {"max_position_embeddings": 64, "norm": "pre", "initializer": "fan_in"}
SHAPE |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "match_dropout": 0.0}
CONTRAST = {"similarity": "cosine", "temperature": 0.05, "positives": 0, "negatives": 1}
CONTRAST |= {"window": True, "window_loss": "own"}


def small_corpus(factory: pytest.TempPathFactory) -> Path:
    """The corpus's folder; processes of one session that run side by side share it."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = shared / "demo_unimo" / "data"
    with FileLock(shared / "demo_unimo.lock"):
        if not out.is_dir():
            run([*OPTIONS, "--neighbours", "8", "--workers", "1", "--out", str(out)])
    return out


def small_recipe(corpus: Path, steps: int, width: int = 64, layers: int = 2, **objectives: Any) -> Recipe:
    """The demo's recipe in small; ``objectives`` replace sections of ``objectives.unified``."""
    mix = {"images": 1, "texts": 1, "pairs": 5}
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    raw: dict[str, Any] = {
        "name": "small",
        "seed": 3,
        "model": {"name": "unimo", "config": {**SHAPE, **sizes}},
        "data": {
            "datasets": [
                {"name": name, "root": str(corpus / name), "mix": {"unified": share}} for name, share in mix.items()
            ],
            "validation": [{"name": name, "root": str(corpus / name)} for name in ("val_pairs", "val_texts")],
            "max_text_tokens": 48,
            "workers": 0,
        },
        "batch": {"global_batch_examples": 28},
        "objectives": {
            "unified": {"contrast": CONTRAST, "language": {"shortest_fragment": 16}, **objectives},
        },
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": steps // 10, "total_steps": steps},
    }
    return parse_recipe(raw, "small")
