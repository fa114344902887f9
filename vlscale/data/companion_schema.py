"""What the stores beside the texts hold: their columns, their side files and their meta.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vlscale.data.schema import Meta

UNIT_COLUMNS = {"id": "str", "units": "ndarray:int32", "graph": "json"}
REWRITE_COLUMNS = {"id": "str", "input_ids": "ndarray:int32", "views": "json"}
RETRIEVED_COLUMNS = {
    "id": "str",
    "images": "ndarray:int32",
    "image_scores": "ndarray:float32",
    "texts": "ndarray:int32",
    "text_scores": "ndarray:float32",
}

SIDE_FILES = {
    "units": ("lengths.npy",),
    "rewrites": ("lengths.npy", "view_tokens.npy", "view_positive.npy"),
    "retrieved": ("image_counts.npy", "text_counts.npy"),
}
"""Store -> the files beside its shards that training reads; ``units`` has others, which only the tools read."""

RewriteKind = Literal["object", "attribute", "relation", "sentence"]
_REWRITE_KINDS = ("object", "attribute", "relation", "sentence")
_Hex = Field(pattern="^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Rewrite:
    """A rewritten caption.

    Attributes:
        text: the new caption.
        positive: it says the same; otherwise it is false of the image.
        kind: what was replaced, or ``sentence``.
        old, new: what was replaced by what, as the texts spell it; for sentences where it comes from.
    """

    text: str
    positive: bool
    kind: RewriteKind
    old: str
    new: str


class CompanionMeta(Meta):
    """What all of them say of the texts that they stand beside.

    Attributes:
        fingerprint: of the texts' vocabulary.
        texts_digest: hex digest of the texts' index (``TextStore.reader.index.digest``), which covers every row.
    """

    kind: str
    version: int
    fingerprint: str = _Hex
    texts_digest: str = _Hex


class UnitsMeta(CompanionMeta):
    """units/meta.json: the texts whose tokens the units count, and what found them."""

    kind: Literal["units"] = "units"
    version: Literal[1] = 1
    parser: str


class RewritesMeta(CompanionMeta):
    """rewrites/meta.json: the texts, the size of their vocabulary, which the ids are of, and the seed of the draws."""

    kind: Literal["rewrites"] = "rewrites"
    version: Literal[2] = 2
    vocabulary_size: int = Field(ge=6, le=1 << 24)
    seed: int


class Collection(Meta):
    """What candidates are rows of.

    Attributes:
        digest: hex digest of the store's index (``Store.reader.index.digest``).
        rows: of that store.
    """

    digest: str = _Hex
    rows: int = Field(ge=1, lt=1 << 31)


class RetrievedMeta(CompanionMeta):
    """retrieved/meta.json: the texts, what the candidates are rows of, and the most of them per text."""

    kind: Literal["retrieved"] = "retrieved"
    version: Literal[1] = 1
    image_collection: Collection | None
    text_collection: Collection | None
    k: int = Field(ge=1, le=1 << 16)

    @model_validator(mode="after")
    def _has_one(self) -> RetrievedMeta:
        if self.image_collection is None and self.text_collection is None:
            raise ValueError("image_collection and text_collection are both null")
        return self


def view_problem(views: Any, tokens: NDArray[np.int32], positive: NDArray[np.uint8]) -> str | None:
    """Say what is wrong with the column ``views`` of a row; None if nothing is.

    Args:
        views: the decoded column.
        tokens: int32 [v], word pieces of its views by view_tokens.npy.
        positive: uint8 [v], by view_positive.npy.
    """
    good = isinstance(views, list) and all(
        isinstance(view, list)
        and [type(item) for item in view] == [str, bool, str, str, str, int]
        and view[2] in _REWRITE_KINDS
        for view in views
    )
    if not good or len(views) != len(tokens):
        return f"views are not {len(tokens)} rewrites: {json.dumps(views)[:80]}"
    if [view[5] for view in views] != tokens.tolist() or [view[1] for view in views] != positive.astype(bool).tolist():
        return f"views do not fit view_tokens.npy and view_positive.npy: {json.dumps(views)[:80]}"
    return None
