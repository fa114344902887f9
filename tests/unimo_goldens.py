"""UNIMO's golden data as packed batches: the authors' padded tensors and 0/1 matrices of what sees what.

Nothing here knows a size, a length or a seed: all come from the files. The folder is ``$VLSCALE_GOLDENS``.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tests.golden_batches import golden_folder, load_golden
from vlscale.convert.unimo_model import config_from_official, config_from_paddlenlp, from_official
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining
from vlscale.ragged import cumulative

# "Suggested atol: 2e-5 states/logits, 1e-5 losses/grads" (the goldens' README)
OUTPUT = {"rtol": 0.0, "atol": 2e-5}
LOSS = {"rtol": 0.0, "atol": 1e-5}


def load(name: str, folder: str = "official") -> dict[str, Tensor]:
    """All tensors of a file."""
    return load_golden(name, f"unimo/{folder}")


def read(name: str, folder: str = "official") -> Any:
    """A JSON file."""
    return json.loads((golden_folder("unimo") / folder / name).read_text(encoding="utf-8"))


def official_model(roles: bool = False, **config: Any) -> UnimoForPretraining:
    """The model under test with the golden weights, in evaluation mode; without dialogue's tables unless asked."""
    state = load("params")
    state = {name: t for name, t in state.items() if roles or name not in ("role_embedding", "turn_embedding")}
    model = UnimoForPretraining(config_from_official(read("config.json"), state, **config))
    model.load_state_dict(from_official(state))
    return model.eval()


def paddlenlp_model(**config: Any) -> UnimoForPretraining:
    """The same for PaddleNLP's text model."""
    state = load("expected_state", "paddlenlp")
    model = UnimoForPretraining(config_from_paddlenlp(read("config.json", "paddlenlp"), state, **config))
    model.load_state_dict(from_official(state, "unimo-text"))
    return model.eval()


def official_batch(golden: dict[str, Tensor]) -> tuple[UnimoBatch, Tensor]:
    """The packed batch, and bool [B, L], which of the padded joint positions are real.

    The matrix says all: a row without any entry is padding, and what the first real row sees is the source.
    """
    inputs = {name.removeprefix("in."): tensor for name, tensor in golden.items() if name.startswith("in.")}
    mask = inputs["input_mask"].bool()
    real = mask.any(2)
    first = real.int().argmax(1)
    source = mask[torch.arange(len(mask)), first]
    image = inputs["image_embedding"].shape[1] if "image_embedding" in inputs else 0
    tags = inputs["obj_ids"].shape[1] if "obj_ids" in inputs else 0
    ids = inputs["tok_ids" if "tok_ids" in inputs else "src_ids"].squeeze(2)
    positions = inputs["tok_pos" if "tok_pos" in inputs else "pos_ids"].squeeze(2)
    in_text, in_tags, in_regions = real[:, image + tags :], real[:, image : image + tags], real[:, 1:image]
    counts = in_regions.sum(1) if image else torch.zeros(len(mask), dtype=torch.int64)
    generated = bool((real & ~source).any())
    batch = _packed(ids, in_text, counts, inputs.get("image_embedding"), inputs.get("image_loc"), in_regions)
    batch.text_positions = positions[in_text]
    if generated:
        batch.prefix_len = source[:, image + tags :].sum(1).int()
    if tags:
        batch.tag_ids, batch.cu_tags = inputs["obj_ids"].squeeze(2)[in_tags], cumulative(in_tags.sum(1))
        batch.tag_positions = inputs["obj_pos"].squeeze(2)[in_tags]
    for name in ("role_ids", "turn_ids"):
        if name in inputs:
            setattr(batch, name, inputs[name].squeeze(2)[in_text])
    return batch, real


def paddlenlp_batch(golden: dict[str, Tensor], generated: bool, types: bool = True) -> tuple[UnimoBatch, Tensor]:
    """The packed batch of the left-padded ids, and bool [B, L], which positions are real."""
    ids = golden["in.input_ids"]
    real = ids != 0
    none = torch.zeros(len(ids), dtype=torch.int64)
    batch = _packed(ids, real, none, None, None, real[:, :0])
    batch.text_positions = golden["in.position_ids"][real]
    if types:
        batch.text_types = golden["in.token_type_ids"][real]
    if generated:
        seen = golden["in.seq2seq_mask"][:, 0] == 0
        batch.prefix_len = (seen[torch.arange(len(ids)), real.int().argmax(1)] & real).sum(1).int()
    return batch, real


def _packed(
    ids: Tensor, in_text: Tensor, counts: Tensor, features: Tensor | None, location: Tensor | None, in_regions: Tensor
) -> UnimoBatch:
    size, total = len(ids), int(counts.sum())
    return UnimoBatch(
        task="golden",
        dataset="golden",
        input_ids=ids[in_text],
        cu_text=cumulative(in_text.sum(1)),
        features=torch.zeros(0, 1) if features is None else features[:, 1:][in_regions],
        boxes=torch.zeros(0, 4) if location is None else location[:, 1:, :4][in_regions],
        cu_regions=cumulative(counts),
        passes=torch.zeros(size, dtype=torch.int64),
        examples=torch.arange(size),
        images=torch.arange(size),
        group=torch.arange(size, dtype=torch.int32),
        region_rows=torch.arange(total),
    )
