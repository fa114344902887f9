"""Batches of task ``unified``, row by row, and a small UNIMO for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from tests.models.batches import TINY
from tests.models.unimo_batches import tiny_unimo
from vlscale.config_unified import UnifiedSection
from vlscale.data.random import Draws
from vlscale.data.schema import Vocabulary
from vlscale.data.views import Role
from vlscale.models.unimo import UnimoForPretraining
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.unified import UnifiedLearning
from vlscale.ragged import RaggedBatch, cumulative

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = Vocabulary.from_tokens([*SPECIAL, *(f"w{number}" for number in range(TINY["vocab_size"] - len(SPECIAL)))])
KINDS = ["pair", "text", "pair", "image", "pair", "text", "text", "image"]
LOSSES = {"contrast", "visual_features", "visual_classes", "bidirectional", "seq2seq"}
DATASETS = ("images", "texts", "pairs")
DRAWS = [Draws(7, name) for name in DATASETS]
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "match_dropout": 0.0}
MASKED = (Role.VISUAL, Role.BIDIRECTIONAL, Role.SEQ2SEQ)


@dataclass(frozen=True)
class Row:
    """One row of a batch: word pieces without [CLS] and [SEP] (None: no text), and how many regions."""

    role: Role
    source: int
    group: int
    words: tuple[int, ...] | None = None
    regions: int = 0
    image: int = -1
    ends: tuple[int, ...] | None = None


def pack(rows: Sequence[Row], passes: int = 0) -> RaggedBatch:
    """What collate makes of such rows; the regions of an image are functions of its number."""
    texts = [[] if row.words is None else [VOCABULARY.cls, *row.words, VOCABULARY.sep] for row in rows]
    cu_text = cumulative(torch.tensor([len(text) for text in texts], dtype=torch.int64))
    cu_regions = cumulative(torch.tensor([row.regions for row in rows], dtype=torch.int64))
    features, boxes = zip(*(_regions(row) for row in rows), strict=True) if rows else ((), ())
    targets = {"role": torch.tensor([int(row.role) for row in rows]), "source": torch.tensor([r.source for r in rows])}
    if any(row.ends is not None for row in rows):
        ends = [[first + 1 + end for end in row.ends or ()] for row, first in zip(rows, cu_text.tolist(), strict=False)]
        targets["unit_ends"] = torch.tensor([*chain(*ends)], dtype=torch.int64)
        targets["cu_units"] = cumulative(torch.tensor([len(each) for each in ends]))
    return RaggedBatch(
        task="unified",
        dataset="+".join(DATASETS),
        input_ids=torch.tensor([*chain(*texts)], dtype=torch.int64),
        cu_text=cu_text,
        features=torch.cat([torch.zeros(0, TINY["feature_dim"]), *features]),
        boxes=torch.cat([torch.zeros(0, 4), *boxes]),
        cu_regions=cu_regions,
        passes=torch.full((len(rows),), passes),
        examples=torch.tensor([row.group * 3 + 1 for row in rows], dtype=torch.int64),
        images=torch.tensor([row.image for row in rows], dtype=torch.int64),
        group=torch.tensor([row.group for row in rows], dtype=torch.int32),
        region_rows=torch.cat(
            [torch.zeros(0).long(), *(torch.arange(row.regions) + 100 * max(row.image, 0) for row in rows)]
        ),
        targets=targets,
    )


def unit(
    kind: str, number: int, views: int = 1, negatives: int = 2, words: int = 9, masked: Role | None = None
) -> list[Row]:
    """The rows of an image, a text, or a pair with ``views`` of each kind of positive view."""
    masked = masked if masked is not None else MASKED[number % 3]
    if kind == "image":
        return [Row(Role.VISUAL, 0, number, regions=3 + number % 4, image=number)]
    caption = _words(number, words)
    ends = tuple(sorted({*range(2, words, 3), words}))
    if kind == "text":
        return [Row(masked if masked != Role.VISUAL else Role.BIDIRECTIONAL, 1, number, caption, ends=ends)]
    image = {"regions": 3 + number % 4, "image": number}
    rows = [Row(masked, 2, number, caption, ends=ends, **image), Row(Role.PAIR, 2, number, caption, **image)]
    rows += [Row(Role.POSITIVE, 2, number, _words(number + 50 + view, words), **image) for view in range(views)]
    rows += [Row(Role.NEGATIVE, 2, number, _words(number + 90 + view, words), **image) for view in range(negatives)]
    rows += [Row(Role.IMAGE, 2, number, **image), Row(Role.TEXT, 2, number, caption)]
    rows += [Row(Role.RETRIEVED_IMAGE, 0, number, regions=4, image=number + 20 + view) for view in range(views)]
    return rows + [Row(Role.RETRIEVED_TEXT, 1, number, _words(number + 130 + view, 5)) for view in range(views)]


def rows_of(kinds: Sequence[str], **options: Any) -> list[Row]:
    """The rows of several units."""
    return [row for number, kind in enumerate(kinds) for row in unit(kind, number, **options)]


def learning(**section: Any) -> UnifiedLearning:
    """The objective of a recipe's section."""
    return UnifiedLearning.build(UnifiedSection.model_validate(section), VOCABULARY)


def prepared(objective: UnifiedLearning, rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> UnimoBatch:
    """What the loader gives: masked, and with class probabilities, which are functions of a region's row."""
    batch = pack(rows)
    batch = objective.prepare_views(replace(batch, features=batch.features.to(dtype)), DRAWS)
    if objective.needs_class_probs:
        at = batch.region_rows[batch.targets["region_positions"]]
        scores = torch.sin(at[:, None] * 7.0 + torch.arange(TINY["num_classes"]) * 1.7) * 3
        batch.targets["class_probs"] = scores.to(dtype).softmax(1)
    return batch


def model_of(seed: int = 0, **config: Any) -> UnimoForPretraining:
    """Small, in float64, without dropout, and with weights large enough that losses depend on what is seen."""
    settings = {"max_position_embeddings": 64, "num_hidden_layers": 2, **NO_DROPOUT, **config}
    return tiny_unimo(seed, **settings).double()


def _words(number: int, count: int) -> tuple[int, ...]:
    draw = np.random.default_rng(number)
    return tuple(draw.integers(len(SPECIAL), TINY["vocab_size"], count).tolist())


def _regions(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(row.image + 1)
    corners = torch.rand(row.regions, 2, generator=draw) * 0.5
    sides = torch.rand(row.regions, 2, generator=draw) * 0.4 + 0.1
    return torch.randn(row.regions, TINY["feature_dim"], generator=draw), torch.cat([corners, corners + sides], 1)


def total_loss(terms, counts):
    return sum(term.sum * term.weight / max(counts[term.count], 1) for term in terms.values() if term.weight)


def calls(model) -> list[str]:
    """The names of the modules in the order of their calls from now on."""
    called: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()) and "dropout" not in name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    return called
