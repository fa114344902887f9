"""What stands beside the texts of a dataset, as far as a plan needs it: rewritten captions and lists of candidates."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from vlscale.data.views import ViewSettings

Kind = Literal["pairs", "texts", "images"]
"""What a dataset is made of."""

Modality = Literal["images", "texts"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


class Digested(Protocol):
    """Any store."""

    def digests(self) -> list[str]:
        """Hex digests of everything here."""


class ViewTable(Protocol):
    """Lengths of rewritten captions, numbered over all N texts; see :class:`vlscale.data.companions.RewriteStore`."""

    @property
    def ptr(self) -> Any:
        """[N+1], int64 when indexed; the views of text i are ``ptr[i]..ptr[i+1]``."""

    @property
    def view_tokens(self) -> NDArray[np.int32]:
        """int32 [V], word pieces of each view."""

    @property
    def view_positive(self) -> NDArray[np.uint8]:
        """uint8 [V], 1: it says the same as the caption."""

    def digests(self) -> list[str]:
        """Hex digests of everything here."""


class Collection(Protocol):
    """What candidates are rows of: the store whose index has this hex digest."""

    @property
    def digest(self) -> str:
        """Hex digest of its index."""

    @property
    def rows(self) -> int:
        """Rows of it."""


class CandidateTable(Protocol):
    """Retrieved rows of each text; see :class:`vlscale.data.companions.RetrievedStore`."""

    def collection(self, kind: Modality) -> Any:
        """The :class:`Collection` of a kind, or None."""

    def packed(self, kind: Modality, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Candidates of int64 [B] ``rows``: int32 [sum of counts], best first, and int32 [B] counts."""

    def check_original(self, kind: Modality, row: int, candidates: NDArray[Any], own: NDArray[Any]) -> None:
        """Refuse candidates of text ``row`` that hold one of its ``own`` rows."""

    def digests(self) -> list[str]:
        """Hex digests of everything here."""


@dataclass(frozen=True, eq=False)
class Beside:
    """The stores beside the texts of a dataset, and what its own stores are known by.

    Attributes:
        rewrites: the rewritten captions, or None.
        retrieved: the lists of candidates, or None.
        images, texts: hex digest of the index of the dataset's images and texts, by which lists of candidates name what
            they are rows of; None where there is no such store.
        root: the dataset's folder, for messages.
        units: which word pieces are masked together, or None. Plans only ask whether they are still the same.
    """

    rewrites: ViewTable | None = None
    retrieved: CandidateTable | None = None
    images: str | None = None
    texts: str | None = None
    root: str = "ROOT"
    units: Digested | None = None

    def digest_of(self, kind: Modality) -> str | None:
        """The dataset's own store of that kind, as lists of candidates name it."""
        return self.images if kind == "images" else self.texts

    def twin(self) -> Beside:
        """The same for another thread: a reader's open shards are not safe to share."""
        return self if self.retrieved is None else replace(self, retrieved=copy.deepcopy(self.retrieved))

    def read(self, kind: Kind, views: ViewSettings) -> dict[str, list[str]]:
        """Digests of the stores that unified steps read here: name -> hex digests.

        Args:
            kind: what the dataset is made of; only pairs have views.
            views: the views that are wanted.
        """
        wanted: dict[str, tuple[Digested | None, bool]] = {
            "units": (self.units, kind != "images" and views.units),
            "rewrites": (self.rewrites, kind == "pairs" and views.positives + views.negatives > 0),
            "retrieved": (self.retrieved, kind == "pairs" and views.images + views.texts > 0),
        }
        return {name: store.digests() for name, (store, used) in wanted.items() if used and store is not None}
