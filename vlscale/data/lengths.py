"""DatasetLengths: the few integers per row that whole optimiser steps are planned from, without reading a row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.beside import Beside, Kind
from vlscale.data.chunks import slices
from vlscale.errors import VlscaleError

SPECIALS = 2
"""[CLS] and [SEP], which every text of a batch carries and no store holds."""


@dataclass(frozen=True, eq=False)
class DatasetLengths:
    """Lengths and references of one dataset of N texts and M images.

    Attributes:
        name: the dataset's name in the recipe; it keys random draws.
        tokens: int32 [N], word pieces of each text without [CLS] and [SEP].
        image_ptr: int64 [N+1]; text i refers to images ``image_refs[image_ptr[i]:image_ptr[i+1]]``.
        image_refs: int64 [image_ptr[-1]], rows of the image store. Pre-training pairs a text with its FIRST image; the
            others only keep a negative from sharing an image with its text.
        regions: int32 [M], regions of each image.
        text_shards: int64 [S+1], cumulative number of texts per shard, from 0 to N.
        images_only: there are no texts; "text" i then stands for image i, and has no word piece and no [CLS] or [SEP]
            (see :meth:`of_images`).
        beside: the stores beside the texts, which unified steps are planned from.

    Raises:
        VlscaleError: the arrays contradict each other (a damaged or mixed-up store).
    """

    name: str
    tokens: NDArray[np.int32]
    image_ptr: NDArray[np.int64]
    image_refs: NDArray[np.int64]
    regions: NDArray[np.int32]
    text_shards: NDArray[np.int64]
    images_only: bool = False
    beside: Beside = field(default_factory=Beside)

    @classmethod
    def of_images(cls, name: str, regions: NDArray[np.int32], image_shards: NDArray[np.int64]) -> DatasetLengths:
        """A dataset without texts, whose M images are met in the texts' stead.

        Args:
            name: the dataset's name.
            regions: int32 [M], regions of each image.
            image_shards: int64 [S+1], cumulative number of images per shard, from 0 to M.
        """
        images = len(regions)
        tokens = np.broadcast_to(np.int32(0), (images,))  # takes no memory
        return cls(name, tokens, np.arange(images + 1), np.arange(images), regions, image_shards, images_only=True)

    def __post_init__(self) -> None:
        for name in ("tokens", "image_ptr", "image_refs", "regions", "text_shards"):
            # A memory map is indexed faster as what it is underneath.
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        texts, images = len(self.tokens), len(self.regions)
        self._require(
            len(self.image_ptr) == texts + 1, f"image_ptr has {len(self.image_ptr)} entries, expected {texts + 1}"
        )
        self._require(rises(self.image_ptr), "image_ptr does not rise from 0")
        self._require(
            int(self.image_ptr[-1]) == len(self.image_refs),
            f"image_ptr ends at {int(self.image_ptr[-1])}, but there are {len(self.image_refs)} image references",
        )
        self._require(len(self.text_shards) >= 1 and rises(self.text_shards), "text_shards does not rise from 0")
        self._require(
            int(self.text_shards[-1]) == texts, f"the text shards hold {int(self.text_shards[-1])} of {texts} texts"
        )
        row = None if self.images_only else first_outside(self.tokens, 1, None)
        self._require(row is None, f"text row {row} has no tokens")
        at = first_outside(self.image_refs, 0, images)
        self._require(at is None, f"image reference {at} is outside the {images} rows of the image store")
        row = first_outside(self.regions, 1, None)
        self._require(row is None, f"image row {row} has no regions")

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            raise VlscaleError(f"dataset {self.name}: {problem}; the store is damaged or mixed up: build it again")

    def __len__(self) -> int:
        """Number of texts N, over-long ones included."""
        return len(self.tokens)

    @property
    def kind(self) -> Kind:
        """What the dataset is made of; ``texts``: there are no images at all."""
        if self.images_only:
            return "images"
        return "pairs" if len(self.regions) else "texts"

    @property
    def specials(self) -> int:
        """Tokens that each text has beside its word pieces."""
        return 0 if self.images_only else SPECIALS

    def first_image(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [B], the image row that pre-training pairs with each text; -1 where a text refers to none."""
        begin = self.image_ptr[rows]
        has = self.image_ptr[rows + 1] > begin
        if has.all():
            return np.asarray(self.image_refs[begin], np.int64)
        first = np.full(len(rows), -1, np.int64)
        first[has] = self.image_refs[begin[has]]
        return first

    @cached_property
    def most_references(self) -> int:
        """Most images that one text refers to."""
        return max(
            (int(np.diff(self.image_ptr[part.start : part.stop + 1]).max()) for part in slices(len(self))), default=0
        )

    def refers_to(self, texts: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [B]: does text ``texts[i]`` refer to image row ``images[i]``, as its first image or as another?"""
        found = self.first_image(texts) == images
        if self.most_references > 1:
            begin, end = self.image_ptr[texts], self.image_ptr[texts + 1]
            for place in range(1, self.most_references):
                inside = begin + place < end
                found[inside] |= self.image_refs[(begin + place)[inside]] == images[inside]
        return found

    def costs(self, texts: NDArray[np.int64], images: NDArray[np.int64], max_regions: int) -> NDArray[np.int32]:
        """int32 [B], tokens that each (text, image) pair runs: word pieces, [CLS], [SEP] and regions (none for -1)."""
        costs = self.tokens[texts] + np.int32(self.specials)
        if len(self.regions):
            regions = np.minimum(self.regions[images], np.int32(max_regions))
            costs += np.where(images >= 0, regions, np.int32(0))
        return costs.astype(np.int32)

    @cached_property
    def digest(self) -> str:
        """Hex digest of every array here; stands in for the store's own fingerprint where there is none.

        What stands beside the texts is not in it, as it is not in :attr:`vlscale.data.dataset.Dataset.fingerprint`.
        """
        digest = hashlib.blake2b(self.name.encode(), digest_size=16)
        for array, kind in (
            (self.tokens, "<i4"),
            (self.image_ptr, "<i8"),
            (self.image_refs, "<i8"),
            (self.regions, "<i4"),
            (self.text_shards, "<i8"),
        ):
            digest.update(np.ascontiguousarray(array, kind).data)
        if self.images_only:
            digest.update(b"images only")
        return digest.hexdigest()


def rises(array: NDArray[np.int64]) -> bool:
    """Does the array begin at 0 and never fall?"""
    if not len(array) or int(array[0]) != 0:
        return False
    return all(
        bool(np.all(array[part.start + 1 : part.stop + 1] >= array[part.start : part.stop]))
        for part in slices(len(array) - 1)
    )


def first_outside(array: NDArray[Any], low: int, high: int | None) -> int | None:
    """Place of the first element below ``low`` or not below ``high``; None if there is none."""
    for part in slices(len(array)):
        piece = array[part]
        if int(piece.min()) < low or (high is not None and int(piece.max()) >= high):
            bad = piece < low
            if high is not None:
                bad |= piece >= high
            return part.start + int(np.argmax(bad))
    return None
