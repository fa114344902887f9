"""Golden data of UNITER as RaggedBatch: the authors' padded tensors, turned into packed ones.

Nothing here knows a size, a length or a seed: all come from the files, so another set of the same layout works
unchanged. The folder is ``$VLSCALE_GOLDENS`` (default: tests/goldens), one sub-folder per model.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlscale.convert.uniter import config_from_official, from_official
from vlscale.models.uniter import UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative

# "rtol 1e-4 / atol 1e-5 for outputs and losses, rtol 1e-3 for gradient norms" (the goldens' README)
OUTPUT = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT = {"rtol": 1e-3, "atol": 1e-5}


def golden_folder(model: str = "uniter") -> Path:
    """Folder of one model's golden files."""
    return Path(os.environ.get("VLSCALE_GOLDENS", Path(__file__).parent / "goldens")) / model


def load_golden(name: str, model: str = "uniter") -> dict[str, Tensor]:
    """All tensors of ``NAME.safetensors``: ``in.*``, ``out.*``, ``gradnorm.*``."""
    return load_file(golden_folder(model) / f"{name}.safetensors")


def golden_meta() -> dict[str, Any]:
    """meta.json: img_dim, img_label_dim, itm_ot_lambda, ..."""
    return json.loads((golden_folder() / "meta.json").read_text(encoding="utf-8"))


def official_state() -> dict[str, Tensor]:
    """The complete published-style state dict."""
    return torch.load(golden_folder() / "pretrain.pt", weights_only=True)


def golden_model(**config: Any) -> UniterForPretraining:
    """The model under test with the golden weights, in evaluation mode; ``config`` changes fields of UniterConfig."""
    raw, meta = json.loads((golden_folder() / "config.json").read_text(encoding="utf-8")), golden_meta()
    model = UniterForPretraining(config_from_official(raw, meta["img_dim"], meta["img_label_dim"], **config))
    model.load_state_dict(from_official(official_state()))
    return model.eval()


def joint_kind(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """bool [B, L] twice: which joint positions are text, and which are regions.

    ``gather_index`` points into [text padded to T | regions padded to R]; masked positions belong to neither.
    """
    real, index = golden["in.attn_masks"].bool(), golden["in.gather_index"]
    region = index >= golden["in.input_ids"].shape[1]
    return real & ~region, real & region


def golden_batch(golden: dict[str, Tensor], task: str) -> RaggedBatch:
    """Turn ``in.*`` into a RaggedBatch with the targets of ``task`` (mlm, mrfr, mrc, mrckl, itm; others: none)."""
    text_BL, region_BL = joint_kind(golden)
    text_lengths, region_counts = text_BL.sum(1), region_BL.sum(1)
    batch, width = golden["in.input_ids"].shape
    text_BT = torch.arange(width) < text_lengths[:, None]
    region_BR = torch.arange(golden["in.img_feat"].shape[1]) < region_counts[:, None]
    total = int(region_counts.sum())
    ragged = RaggedBatch(
        task=task,
        dataset="golden",
        input_ids=golden["in.input_ids"][text_BT],
        cu_text=cumulative(text_lengths),
        features=golden["in.img_feat"][region_BR],
        boxes=golden["in.img_pos_feat"][region_BR][:, :4].contiguous(),
        cu_regions=cumulative(region_counts),
        passes=torch.zeros(batch, dtype=torch.int64),
        examples=torch.arange(batch),
        images=torch.arange(batch),
        group=torch.arange(batch, dtype=torch.int32),
        region_rows=torch.arange(total),
    )
    if "in.txt_type_ids" in golden:
        ragged = replace(ragged, text_types=golden["in.txt_type_ids"][text_BT])
    if "in.img_masks" in golden:
        ragged = replace(ragged, region_mask=golden["in.img_masks"].bool()[region_BR])
    ragged.targets.update(_targets(golden, task, text_BL, region_BL, text_BT))
    return ragged


def _targets(
    golden: dict[str, Tensor], task: str, text_BL: Tensor, region_BL: Tensor, text_BT: Tensor
) -> dict[str, Tensor]:
    if task == "mlm":
        labels = golden["in.txt_labels"][text_BT]
        return {"token_positions": (labels >= 0).nonzero()[:, 0], "token_labels": labels[labels >= 0]}
    if task in ("mrfr", "mrc", "mrckl"):
        positions = golden["in.img_mask_tgt"].bool()[region_BL].nonzero()[:, 0]
        if task == "mrfr":
            return {"region_positions": positions, "region_features": golden["in.feat_targets"]}
        return {"region_positions": positions, "class_probs": golden["in.label_targets"]}
    return {"itm_labels": golden["in.targets"].long()} if task == "itm" else {}


def text_only(batch: RaggedBatch) -> RaggedBatch:
    """The same texts without any region."""
    none = torch.zeros(0, dtype=torch.int64)
    return replace(
        batch,
        features=batch.features[:0],
        boxes=batch.boxes[:0],
        cu_regions=torch.zeros_like(batch.cu_regions),
        region_rows=none,
        region_mask=None,
        region_types=None,
        targets={},
    )


def image_only(batch: RaggedBatch) -> RaggedBatch:
    """The same images without any text."""
    return replace(
        batch,
        input_ids=batch.input_ids[:0],
        cu_text=torch.zeros_like(batch.cu_text),
        text_types=None,
        targets={},
    )
