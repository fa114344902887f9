"""Models with batches and losses of every task, and what they hold in memory, measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlscale.config import WraSection
from vlscale.models.uniter import UniterConfig, UniterForPretraining
from vlscale.objectives.base import Objective
from vlscale.objectives.itm import ImageTextMatching
from vlscale.objectives.mlm import MaskedLanguageModeling
from vlscale.objectives.mrm import RegionClassification, RegionClassificationKL, RegionFeatureRegression
from vlscale.objectives.wra import WordRegionAlignment
from vlscale.plan.activations import Load
from vlscale.plan.measure import peak_bytes, saved_bytes
from vlscale.ragged import RaggedBatch, cumulative

TEXT, REGIONS, EVERY = 12, 36, 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def small(**changes: Any) -> UniterConfig:
    """A model small enough for a test; attention without dropout, which only GPU kernels fuse."""
    sizes: dict[str, Any] = {
        "vocab_size": 2000, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 512, "feature_dim": 256, "num_classes": 160, "attention_dropout": 0.0,
    }  # fmt: skip
    return UniterConfig(**{**sizes, **changes})


def make_batch(task: str, config: UniterConfig, examples: int, dtype: torch.dtype = torch.float32) -> RaggedBatch:
    """Examples of 12 text positions and 36 regions; every seventh position is masked."""
    texts, regions = examples * TEXT, examples * REGIONS
    words, masked = torch.arange(0, texts, EVERY), torch.arange(0, regions, EVERY)
    targets: dict[str, Tensor]
    features = torch.randn(regions, config.feature_dim, dtype=dtype)
    if task == "mlm":
        targets = {"token_positions": words, "token_labels": torch.zeros_like(words)}
    elif task == "itm":
        targets = {"itm_labels": torch.zeros(examples, dtype=torch.int64)}
    elif task == "mrfr":
        targets = {"region_positions": masked, "region_features": features[masked]}
    else:
        probs = torch.softmax(torch.randn(len(masked), config.num_classes), 1).half()
        targets = {"region_positions": masked, "class_probs": probs}
    mask = torch.zeros(regions, dtype=torch.bool)
    mask[masked] = True
    return RaggedBatch(
        task=task,
        dataset="made",
        input_ids=torch.randint(0, config.vocab_size, (texts,)),
        cu_text=cumulative(torch.full((examples,), TEXT)),
        features=features,
        boxes=torch.rand(regions, 4),
        cu_regions=cumulative(torch.full((examples,), REGIONS)),
        passes=torch.zeros(examples, dtype=torch.int64),
        examples=torch.arange(examples),
        images=torch.arange(examples),
        group=torch.arange(examples, dtype=torch.int32),
        region_rows=torch.arange(regions),
        region_mask=None if task in ("mlm", "itm") else mask,
        targets=targets,
    )


def objective(task: str, alignment: bool = False) -> Objective:
    """The objective; image-text matching with or without word-region alignment."""
    return {
        "mlm": lambda: MaskedLanguageModeling(None),  # type: ignore[arg-type]
        "mrfr": lambda: RegionFeatureRegression(0.15),
        "mrc": lambda: RegionClassification(0.15, name="mrc"),
        "mrckl": lambda: RegionClassificationKL(0.15),
        "itm": lambda: ImageTextMatching(WordRegionAlignment(WraSection(), 0, 1) if alignment else None),
    }[task]()


@dataclass(frozen=True)
class Measured:
    """Bytes that the encoder saves, and the peak of forward and backward; and what was run."""

    saved: int
    peak: int
    load: Load


def measure(
    task: str,
    config: UniterConfig,
    examples: int,
    precision: str = "fp32",
    policy: str = "none",
    alignment: bool = False,
) -> Measured:
    """Run a micro-batch once for each figure."""
    dtype = DTYPES[precision]
    model = UniterForPretraining(config).to(dtype)
    model.set_activation_checkpointing(policy)
    batch = make_batch(task, config, examples, dtype)
    inputs = [*(v for v in vars(batch).values() if isinstance(v, Tensor)), *batch.targets.values()]
    saved = saved_bytes(lambda: model.encode(batch), [*model.parameters(), *inputs])

    def step() -> None:
        terms = objective(task, alignment).terms(model, batch)
        loss = sum((term.sum * term.weight for term in terms.values()), torch.zeros(()))
        loss.backward()

    positions = batch.targets.get("token_positions", batch.targets.get("region_positions"))
    targets = examples if positions is None else len(positions)
    masked = batch.region_mask is not None
    load = Load(task, examples * TEXT, examples * REGIONS, examples, targets, masked)
    if alignment:
        cells = float(examples * TEXT * REGIONS)
        load = replace(load, cells=cells, padded_cells=cells)
    return Measured(saved, peak_bytes(step, model, inputs), load)
