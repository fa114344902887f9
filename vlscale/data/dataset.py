"""A dataset: stores of texts, images and, for some tasks, classes, opened together and checked against each other."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vlscale.config_values import is_url
from vlscale.data.fetch import shown
from vlscale.data.lengths import DatasetLengths, first_outside
from vlscale.data.reader import FilesOf
from vlscale.data.remote import CachedRoot, CacheSettings, open_root
from vlscale.data.schema import Vocabulary
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.errors import VlscaleError


class Dataset:
    """One opened dataset; made by :func:`open_dataset`.

    Attributes:
        name: its name in the recipe.
        root: its folder; for a remote, the one in the cache.
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
    def num_types(self) -> int:
        """Kinds of segments that the texts have; 1: none."""
        return self.texts.num_types

    @property
    def feature_dim(self) -> int:
        """Width D of the region features."""
        return self.images.meta.feature_dim

    @property
    def num_classes(self) -> int | None:
        """Number C of classes, or None without a classes store."""
        return None if self.classes is None else self.classes.meta.num_classes


def open_dataset(name: str, root: Path | str, verify: bool = True, cache: CacheSettings | None = None) -> Dataset:
    """Open the dataset in ``root``; reads indexes, meta.json and side files, no shard.

    Args:
        name: its name in the recipe.
        root: folder or URL with images/, texts/ and, for mrc and mrckl, classes/.
        verify: check the hashes of side files now, and each shard's when it is first touched.
        cache: fetch everything into a cache first, shards when they are needed; a URL needs one, and a folder may
            have one (a slow mount, compressed shards).

    Raises:
        VlscaleError: a store is missing, damaged, or does not fit the others; or a remote does not answer.
    """
    if cache is None and is_url(root):
        raise VlscaleError(f"dataset {name}: {shown(root)} is a remote; set data.cache to a folder for what is fetched")
    if not is_url(root):
        root = Path(root)
        for part in ("texts", "images"):
            if not (root / part).is_dir():
                raise VlscaleError(
                    f"dataset {name}: {root / part} is no folder; set data.datasets[].root to a folder with texts/ and "
                    f"images/, or build the dataset first"
                )
    remote = None if cache is None else open_root(root, cache)
    place = Path(root) if remote is None else remote.folder
    texts = TextStore(place / "texts", verify, _files(remote, "texts"))
    images = ImageStore(place / "images", verify, _files(remote, "images"))
    _check_refs(place, texts, images)
    classes = None
    if (place / "classes").exists():
        classes = ClassStore(place / "classes", verify, _files(remote, "classes"))
        regions = images.region_ptr.total
        if len(classes) != regions:
            raise VlscaleError(
                f"{place / 'classes'}: {len(classes)} rows, but the images have {regions} regions; build it again"
            )
    for store in (texts, images, classes):
        if verify and store is not None:
            store.reader.index.check_side_files()  # last: what the other checks say is more to the point
    return Dataset(name, place, texts, images, classes)


def _files(remote: CachedRoot | None, store: str) -> FilesOf | None:
    return None if remote is None else partial(remote.files, store)


def _check_refs(root: Path, texts: TextStore, images: ImageStore) -> None:
    refs = texts.image_refs
    at = first_outside(refs, 0, len(images))
    if at is not None:
        row = int(np.searchsorted(texts.image_ptr, at, side="right")) - 1
        raise VlscaleError(
            f"{root / 'texts' / 'image_refs.npy'}: text row {row} refers to image row {refs[at]}, but images/ has "
            f"{len(images)} rows; build both stores again"
        )
