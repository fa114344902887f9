"""Views: what the rows of a unified step are (UNIMO, ACL 2021), and which dataset each comes from.

A unit of such a step is an image, a text, or a pair with all its views. Its rows are one group: never split, and
costed as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from vlscale.config_unified import UnifiedSection

UNIFIED = "unified"
"""The task whose steps are made of views."""

MOST_DATASETS = 128
"""Of a unified step: a row's dataset is an int8."""

_JOINT = "+"


class Role(IntEnum):
    """What a row of a unified step is for. Rows of a group stand in the order of these numbers.

    The first three are masked and predicted; the others are contrasted with each other, and unmasked.
    """

    VISUAL = 0
    """Regions are masked; a caption, if there is one, is visible."""
    BIDIRECTIONAL = 1
    """Spans of words are masked; the image, if there is one, is visible."""
    SEQ2SEQ = 2
    """Fragments of the text are taken out and generated; the image, if there is one, is visible."""
    PAIR = 3
    """The pair as it is, image and caption encoded together."""
    POSITIVE = 4
    """The image with a rewritten caption that says the same."""
    NEGATIVE = 5
    """The image with a rewritten caption that is not true of it."""
    IMAGE = 6
    """The pair's image alone."""
    TEXT = 7
    """The pair's caption alone."""
    RETRIEVED_IMAGE = 8
    """Another image, like the pair's, alone."""
    RETRIEVED_TEXT = 9
    """A sentence like the caption, alone."""


MASKED = (Role.VISUAL, Role.BIDIRECTIONAL, Role.SEQ2SEQ)
"""The rows that are masked."""


@dataclass(frozen=True)
class ViewSettings:
    """What decides which rows a unit becomes (see :class:`~vlscale.config_unified.UnifiedSection` for each).

    Attributes:
        contrast: pairs have views at all.
        positives, negatives: rewritten captions of a pair; images, texts: retrieved ones. As many as there are.
        alone: a pair's image and caption are encoded by themselves, too.
        units: units of words are read, where a dataset has them; it changes what is masked, not which rows there are.
        pair_visual_share: of pairs whose regions are masked; seq2seq_share: of texts, and of the other pairs, that are
            generated in part.
        seq2seq_probability, shortest_fragment: bound what a generated text costs.
    """

    contrast: bool = True
    positives: int = 1
    negatives: int = 4
    images: int = 1
    texts: int = 1
    alone: bool = True
    pair_visual_share: float = 0.5
    seq2seq_share: float = 0.5
    seq2seq_probability: float = 0.25
    shortest_fragment: int = 4
    units: bool = True

    @classmethod
    def from_section(cls, section: UnifiedSection) -> ViewSettings:
        """Read the settings from a recipe's ``objectives.unified``."""
        contrast, language = section.contrast, section.language
        wanted = contrast.weight > 0
        return cls(
            contrast=wanted,
            positives=contrast.positives * wanted,
            negatives=contrast.negatives * wanted,
            images=contrast.images * wanted,
            texts=contrast.texts * wanted,
            alone=contrast.alone and wanted,
            pair_visual_share=section.pair_visual_share,
            seq2seq_share=language.seq2seq_share,
            seq2seq_probability=language.seq2seq_probability,
            shortest_fragment=language.shortest_fragment,
            units=language.units,
        )


@dataclass(frozen=True, eq=False)
class Views:
    """What the B rows of a unified step are.

    Attributes:
        datasets: the datasets of the step, in the recipe's order.
        source: int8 [B], which of them the row's text and image are rows of.
        role: int8 [B], see :class:`Role`.
        view: int64 [B], number of the rewritten caption in the dataset's ``rewrites`` (the views of all texts, one
            after the other); -1: the text is the caption itself.
    """

    datasets: tuple[str, ...]
    source: NDArray[np.int8]
    role: NDArray[np.int8]
    view: NDArray[np.int64]

    def take(self, members: NDArray[np.int64] | slice) -> Views:
        """Those of some rows."""
        return Views(self.datasets, self.source[members], self.role[members], self.view[members])

    def joined(self, other: Views) -> Views:
        """Those of these rows and then of others of the same datasets."""
        names = ("source", "role", "view")
        return replace(self, **{name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in names})


def most_fragments(tokens: NDArray[np.int32], probability: float, shortest: int) -> NDArray[np.int32]:
    """int32 [B], most fragments that are taken out of texts of int32 [B] word pieces to be generated.

    Fragments of at least ``shortest`` word pieces are taken until they are ``probability`` of the text; a text shorter
    than a fragment is one.
    """
    wanted = np.ceil(tokens * probability).astype(np.int64)
    return np.maximum(1, -(-wanted // shortest)).astype(np.int32)


def joined(datasets: Iterable[str]) -> str:
    """The name that a step over several datasets gives as its dataset."""
    return _JOINT.join(datasets)


def parted(dataset: str) -> tuple[str, ...]:
    """The datasets of a step that gives ``dataset`` as its dataset."""
    return tuple(dataset.split(_JOINT))
