"""Synthetic scenes whose features say what they show, and models that read them: one knows all, one guesses."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.schema import Vocabulary
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.ragged import RaggedBatch
from vlscale.report.heldout import HeldOut, open_heldout

THINGS = ("apple", "bear", "cup", "dog", "fish", "goat", "hat", "key")
"""``goat`` is two word pieces, ``go`` and ``##at``."""

PIECES = {"goat": ["go", "##at"]}
TOKENS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "and", "there", "is"),
    *itertools.chain.from_iterable(PIECES.get(thing, [thing]) for thing in THINGS),
)
VOCABULARY = Vocabulary.from_tokens(TOKENS)
FIRST_PIECE = [TOKENS.index(PIECES.get(thing, [thing])[0]) for thing in THINGS]
REGIONS = 5
DIM = 16
CLASS_NAMES = ["background", "red apple", "brown bear", "teacup", "dogwood", "goldfish", "goat", "cowboy hat", "key"]


def make_scenes(root: Path, scenes: int = 120, seed: int = 0, extra: bool = True, classes: bool = True) -> Path:
    """Write scenes of two or three of eight things: a list caption, and one that names a single thing.

    A thing's region has a one at the thing's place of its features; distractors have a one behind the things. All
    sets of things differ. ``extra=False`` leaves the ground truth out.
    """
    rng = np.random.default_rng(seed)
    sets = [*itertools.combinations(range(len(THINGS)), 3), *itertools.combinations(range(len(THINGS)), 2)]
    sets += [*itertools.combinations(range(len(THINGS)), 4)]
    chosen = [sets[i] for i in rng.permutation(len(sets))[:scenes]]
    shown = []
    with ImageWriter(root, DIM, "float32") as images:
        for row, things in enumerate(chosen):
            slots: list[int | None] = [*things, *[None] * (REGIONS - len(things))]
            slots = [slots[i] for i in rng.permutation(REGIONS)]
            shown.append(slots)
            features = rng.normal(0, 0.01, (REGIONS, DIM))
            for region, thing in enumerate(slots):
                features[region, len(THINGS) + region % 4 if thing is None else thing] += 1
            corner = rng.uniform(0, 0.5, (REGIONS, 2))
            boxes = np.concatenate([corner, corner + 0.3], 1)
            names = {"things": [None if t is None else THINGS[t] for t in slots]}
            images.write(f"scene-{row}", 384, 256, features, boxes, np.full(REGIONS, 0.5), names if extra else {})
    with TextWriter(root, VOCABULARY, images.rows) as texts:
        for row, things in enumerate(chosen):
            for kind, named in (("list", rng.permutation(things)), ("single", rng.permutation(things)[:1])):
                words, spans = ["there", "is"], []
                for thing in named:
                    pieces = PIECES.get(THINGS[thing], [THINGS[thing]])
                    spans.append([len(words) + 1, len(words) + 1 + len(pieces), shown[row].index(thing)])
                    words += ["a", *pieces, "and"]
                words = words[:-1]
                ids = np.array([TOKENS.index(word) for word in words])
                facts = {"kind": kind, "spans": spans} if extra else {}
                texts.write(f"{row}-{kind}", " ".join(words), ids, [f"scene-{row}"], facts)
    if classes:
        with ClassWriter(root, len(THINGS) + 1, class_names=CLASS_NAMES) as writer:
            for slots in shown:
                probs = np.full((REGIONS, len(THINGS) + 1), 0.05)
                for region, thing in enumerate(slots):
                    probs[region, 0 if thing is None else thing + 1] = 0.6
                writer.write(probs)
    return root


def heldout(root: Path, seed: int = 3, max_text_tokens: int = 40, max_regions: int = REGIONS) -> HeldOut:
    return open_heldout(open_scenes(root), seed, max_text_tokens, max_regions)


def open_scenes(root: Path) -> Dataset:
    return open_dataset("scenes", root)


@dataclass
class Seen:
    """What a fake model's ``encode`` passes on."""

    batch: RaggedBatch
    hidden: Tensor
    text_index: Tensor
    region_index: Tensor


class OracleModel:
    """Answers from the batch alone: it sees unmasked things in the regions and reads unmasked words.

    It cannot see what is masked, so a metric that forgets to mask, or masks the wrong place, changes its answers.
    """

    def encode(self, batch: RaggedBatch) -> Seen:
        count = len(THINGS)
        text = torch.zeros(batch.input_ids.numel(), DIM + len(TOKENS))
        text[torch.arange(len(text)), DIM + batch.input_ids] = 1.0
        for thing, first in enumerate(FIRST_PIECE):
            for piece in range(len(PIECES.get(THINGS[thing], ["."]))):
                at = batch.input_ids == first + piece
                text[at] = 0.0
                text[at, thing] = 1.0
        regions = torch.zeros(len(batch.boxes), DIM + len(TOKENS))
        regions[:, :DIM] = batch.features
        self.words = text[:, :count] > 0.5
        self.shown = batch.features[:, :count] > 0.5
        hidden = torch.cat([text, regions])
        index = torch.arange(len(hidden))
        return Seen(batch, hidden, index[: len(text)], index[len(text) :])

    def _sets(self, batch: RaggedBatch) -> tuple[Tensor, Tensor]:
        """bool [B, things]: named, shown."""
        named = torch.zeros(len(batch), len(THINGS)).index_add(0, batch.text_owner(), self.words.float())
        shown = torch.zeros(len(batch), len(THINGS)).index_add(0, batch.region_owner(), self.shown.float())
        return named > 0, shown > 0

    def mlm_logits(self, encoded: Seen, positions: Tensor) -> Tensor:
        batch = encoded.batch
        assert bool((batch.input_ids[positions] == VOCABULARY.mask).all())
        assert int((batch.input_ids == VOCABULARY.mask).sum()) == len(positions)
        named, shown = self._sets(batch)
        owner = batch.text_owner()[positions]
        logits = torch.zeros(len(positions), len(TOKENS))
        possible = (shown & ~named)[owner].float()
        second = torch.zeros(len(positions), dtype=torch.bool)
        second[1:] = (positions[1:] == positions[:-1] + 1) & (owner[1:] == owner[:-1])
        for thing, first in enumerate(FIRST_PIECE):
            logits[~second, first] = possible[~second, thing]
            logits[second, first + len(PIECES.get(THINGS[thing], ["."])) - 1] = possible[second, thing]
        return logits

    def _missing(self, encoded: Seen, positions: Tensor) -> Tensor:
        """float [K, things]: named but not shown, so it must be what is masked."""
        batch = encoded.batch
        assert batch.region_mask is not None
        assert bool(batch.region_mask[positions].all())
        assert int(batch.region_mask.sum()) == len(positions)
        assert float(batch.features[positions].abs().max()) == 0.0
        named, shown = self._sets(batch)
        return (named & ~shown)[batch.region_owner()[positions]].float()

    def classify_regions(self, encoded: Seen, positions: Tensor) -> Tensor:
        return torch.cat([torch.full((len(positions), 1), 0.5), self._missing(encoded, positions)], 1)

    def predict_features(self, encoded: Seen, positions: Tensor) -> Tensor:
        missing = self._missing(encoded, positions)
        return torch.cat([missing, torch.zeros(len(positions), DIM - len(THINGS))], 1)

    def itm_logits(self, encoded: Seen) -> Tensor:
        named, shown = self._sets(encoded.batch)
        agreement = (named == shown).float().mean(1)
        return torch.stack([torch.full_like(agreement, 0.999), agreement], 1)


class GuessingModel:
    """Guesses things, classes, matches and positions: at chance everywhere, whatever it is shown."""

    def __init__(self, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def _draw(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random)

    def encode(self, batch: RaggedBatch) -> Seen:
        count = batch.input_ids.numel()
        index = torch.arange(count + len(batch.boxes))
        return Seen(batch, torch.randn(len(index), 32, generator=self.random), index[:count], index[count:])

    def mlm_logits(self, encoded: Seen, positions: Tensor) -> Tensor:
        logits = torch.full((len(positions), len(TOKENS)), -1.0)
        logits[:, FIRST_PIECE] = self._draw(len(positions), len(THINGS))
        return logits

    def classify_regions(self, encoded: Seen, positions: Tensor) -> Tensor:
        return torch.cat([torch.full((len(positions), 1), -1.0), self._draw(len(positions), len(THINGS))], 1)

    def predict_features(self, encoded: Seen, positions: Tensor) -> Tensor:
        return torch.randn(len(positions), DIM, generator=self.random)

    def itm_logits(self, encoded: Seen) -> Tensor:
        return self._draw(len(encoded.batch), 2)


class IndifferentModel(GuessingModel):
    """Gives every question the same answer."""

    def encode(self, batch: RaggedBatch) -> Seen:
        seen = super().encode(batch)
        seen.hidden = torch.ones_like(seen.hidden)
        return seen

    def itm_logits(self, encoded: Seen) -> Tensor:
        return torch.zeros(len(encoded.batch), 2)
