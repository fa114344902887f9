"""A dataset: stores of texts, images and, for some tasks, classes, opened together and checked against each other."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlscale.data.lengths import DatasetLengths
from vlscale.data.schema import Vocabulary
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.errors import VlscaleError


class Dataset:
    """One opened dataset; made by :func:`open_dataset`.

    Attributes:
        name: its name in the recipe.
        root: its folder.
        texts: the texts.
        images: the images.
        classes: the regions' class probabilities, or None.
    """

    def __init__(self, name: str, root: Path, texts: TextStore, images: ImageStore, classes: ClassStore | None) -> None:
        self.name = name
        self.root = root
        self.texts = texts
        self.images = images
        self.classes = classes

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.texts)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lengths"}

    @cached_property
    def lengths(self) -> DatasetLengths:
        """What a plan needs of the dataset, memory-mapped."""
        return DatasetLengths(
            name=self.name,
            tokens=self.texts.lengths,
            image_ptr=self.texts.image_ptr,
            image_refs=self.texts.image_refs,
            regions=self.images.lengths,
            text_shards=self.texts.shard_ends,
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the indexes (with the shards' hashes), meta.json and side files of all stores.

        Neither the dataset's name nor its place enters, so a copy has the same fingerprint.
        """
        parts = [store.digests() for store in (self.texts, self.images, self.classes) if store is not None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the texts."""
        return self.texts.meta.vocabulary

    @property
    def feature_dim(self) -> int:
        """Width D of the region features."""
        return self.images.meta.feature_dim

    @property
    def num_classes(self) -> int | None:
        """Number C of classes, or None without a classes store."""
        return None if self.classes is None else self.classes.meta.num_classes


def open_dataset(name: str, root: Path | str, verify: bool = True) -> Dataset:
    """Open the dataset in ``root``; reads indexes, meta.json and side files, no shard.

    Args:
        name: its name in the recipe.
        root: folder with images/, texts/ and, for mrc and mrckl, classes/.
        verify: check each shard's hash when it is first touched.

    Raises:
        VlscaleError: a store is missing, damaged, or does not fit the others.
    """
    root = Path(root)
    for part in ("texts", "images"):
        if not (root / part).is_dir():
            raise VlscaleError(
                f"dataset {name}: {root / part} is no folder; set data.datasets[].root to a folder with texts/ and "
                f"images/, or build the dataset first"
            )
    texts = TextStore(root / "texts", verify)
    images = ImageStore(root / "images", verify)
    refs = texts.image_refs
    bad = (refs < 0) | (refs >= len(images))
    if bad.any():
        at = int(np.argmax(bad))
        row = int(np.searchsorted(texts.image_ptr, at, side="right")) - 1
        raise VlscaleError(
            f"{root / 'texts' / 'image_refs.npy'}: text row {row} refers to image row {refs[at]}, but images/ has "
            f"{len(images)} rows; build both stores again"
        )
    classes = None
    if (root / "classes").exists():
        classes = ClassStore(root / "classes", verify)
        regions = int(images.region_ptr[-1])
        if len(classes) != regions:
            raise VlscaleError(
                f"{root / 'classes'}: {len(classes)} rows, but the images have {regions} regions; build it again"
            )
    return Dataset(name, root, texts, images, classes)
