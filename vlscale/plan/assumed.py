"""Lengths that are assumed where a recipe's data are not here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.config import Recipe
from vlscale.data.beside import Beside, Modality
from vlscale.data.lengths import DatasetLengths
from vlscale.data.views import UNIFIED

ASSUMED_TEXTS = 60_000
ASSUMED = (
    "lengths: log-normal, median 11 word pieces (3 to 60) and 31 regions (10 to 100), as COCO's and Visual Genome's "
    "are; the recipe's data are not here"
)
TAIL, TAIL_SHARE = (60, 120), 0.001
ASSUMED_UNIFIED = (
    f"{ASSUMED}; one caption in {round(1 / TAIL_SHARE)} of {TAIL[0]} to {TAIL[1]}, texts without images as long as "
    "data.max_text_tokens, rewritten captions and retrieved views as long as the captions and images"
)


def assumed_text(recipe: Recipe) -> str:
    """Return one line about what is assumed of a recipe's data."""
    return ASSUMED_UNIFIED if UNIFIED in recipe.tasks else ASSUMED


def assumed_lengths(name: str, seed: int, max_text_tokens: int) -> DatasetLengths:
    """Return lengths of the kind that UNITER's corpora have, one text per image; see ``ASSUMED``."""
    draw = np.random.default_rng(seed)
    tokens = np.exp(draw.normal(np.log(11.0), 0.448, ASSUMED_TEXTS)).round().clip(3, min(60, max(3, max_text_tokens)))
    regions = np.exp(draw.normal(np.log(31.0), 0.553, ASSUMED_TEXTS)).round().clip(10, 100)
    rows, pointers = np.arange(ASSUMED_TEXTS), np.arange(ASSUMED_TEXTS + 1)
    return DatasetLengths(name, tokens.astype(np.int32), pointers, rows, regions.astype(np.int32), _shards())


def assumed_datasets(recipe: Recipe) -> dict[str, DatasetLengths]:
    """Return lengths for each dataset of a recipe; for task ``unified`` with what its views need.

    What a dataset is made of, its ``kind`` says; without one it is pairs. Web captions have a tail of long ones, which
    decide how much room a pair with all its views is given.
    """
    contrast, longest = recipe.objectives.unified.contrast, recipe.data.max_text_tokens
    found = {}
    for number, section in enumerate(recipe.data.datasets):
        lengths = assumed_lengths(section.name, number, longest)
        if section.kind == "images":
            lengths = DatasetLengths.of_images(section.name, lengths.regions, _shards())
        elif section.kind == "texts":
            tokens, none = np.full(ASSUMED_TEXTS, longest, np.int32), np.zeros(0, np.int64)
            pointers = np.zeros(ASSUMED_TEXTS + 1, np.int64)
            lengths = DatasetLengths(section.name, tokens, pointers, none, none.astype(np.int32), _shards())
        elif UNIFIED in recipe.tasks:
            lengths = replace(lengths, tokens=_with_tail(lengths.tokens, number, longest))
            views = contrast.positives + contrast.negatives
            positive = np.arange(max(views, 1)) < contrast.positives
            rewrites = AssumedViews(np.repeat(lengths.tokens, views), np.tile(positive[:views], ASSUMED_TEXTS), views)
            own = {kind: f"{kind} of {section.name}" for kind in ("images", "texts")}
            retrieved = AssumedCandidates(own, {"images": contrast.images, "texts": contrast.texts})
            beside = Beside(rewrites, retrieved, own["images"], own["texts"], section.name)
            lengths = replace(lengths, beside=beside)
        found[section.name] = lengths
    return found


def _with_tail(tokens: NDArray[np.int32], seed: int, max_text_tokens: int) -> NDArray[np.int32]:
    draw = np.random.default_rng((seed, ASSUMED_TEXTS))
    long = draw.integers(TAIL[0], TAIL[1] + 1, len(tokens)).clip(max=max_text_tokens)
    return np.where(draw.random(len(tokens)) < TAIL_SHARE, long, tokens).astype(np.int32)


def _shards() -> NDArray[np.int64]:
    return np.append(np.arange(0, ASSUMED_TEXTS, 2000), ASSUMED_TEXTS)


@dataclass(frozen=True, eq=False)
class AssumedViews:
    """Rewritten captions, ``each`` of every text; see :class:`vlscale.data.beside.ViewTable`."""

    view_tokens: NDArray[np.int32]
    positive: NDArray[np.bool_]
    each: int

    @property
    def ptr(self) -> NDArray[np.int64]:
        """int64 [N+1], first view of each text."""
        return np.arange(ASSUMED_TEXTS + 1) * self.each

    @property
    def view_positive(self) -> NDArray[np.uint8]:
        """uint8 [V], 1: it says the same."""
        return self.positive.astype(np.uint8)

    def digests(self) -> list[str]:
        """Nothing is stored."""
        return []


@dataclass(frozen=True, eq=False)
class AssumedCandidates:
    """The texts and images that follow in the dataset itself; see :class:`vlscale.data.beside.CandidateTable`."""

    own: dict[str, str]
    wanted: dict[str, int]

    def collection(self, kind: Modality) -> Any:
        """The dataset itself."""
        return SimpleNamespace(digest=self.own[kind], rows=ASSUMED_TEXTS)

    def packed(self, kind: Modality, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """As many candidates as are wanted."""
        count = self.wanted[kind]
        found = (rows[:, None] + 1 + np.arange(count)) % ASSUMED_TEXTS
        return found.astype(np.int32).reshape(-1), np.full(len(rows), count, np.int32)

    def check_original(self, kind: Modality, row: int, candidates: NDArray[Any], own: NDArray[Any]) -> None:
        """No candidate is the text or image itself."""

    def digests(self) -> list[str]:
        """Nothing is stored."""
        return []
