"""A dataset: stores of texts, images, classes and what stands beside the texts, opened together and checked.

Texts alone, images alone, and texts with images are datasets of the kinds ``texts``, ``images`` and ``pairs``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vlscale.config_values import is_url
from vlscale.data.beside import Beside, Kind
from vlscale.data.companions import RetrievedStore, RewriteStore, UnitStore, open_companion
from vlscale.data.fetch import shown
from vlscale.data.lengths import DatasetLengths, first_outside
from vlscale.data.reader import FilesOf
from vlscale.data.remote import CachedRoot, CacheSettings, open_root
from vlscale.data.schema import Vocabulary
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.data.store_base import Store
from vlscale.errors import VlscaleError

_STORES: dict[str, Any] = {"texts": TextStore, "images": ImageStore, "classes": ClassStore}
_BESIDE: dict[str, Any] = {"units": UnitStore, "rewrites": RewriteStore, "retrieved": RetrievedStore}


class Dataset:
    """One opened dataset; made by :func:`open_dataset`.

    Attributes:
        name: its name in the recipe.
        root: its folder; for a remote, the one in the cache.
        stores: the stores that are there, by the names of their folders: texts, images, classes, units, rewrites,
            retrieved.
    """

    def __init__(self, name: str, root: Path, stores: dict[str, Store]) -> None:
        self.name = name
        self.root = root
        self.stores = stores

    def __len__(self) -> int:
        """Number of texts; of images, if there are no texts."""
        return len(self.images if self.kind == "images" else self.texts)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lengths"}

    @property
    def kind(self) -> Kind:
        """What the dataset is made of; an images store without rows counts as none."""
        if "texts" not in self.stores:
            return "images"
        return "pairs" if len(self.stores.get("images", ())) else "texts"

    @property
    def texts(self) -> TextStore:
        """The texts.

        Raises:
            VlscaleError: there is no such store.
        """
        return self.require("texts")

    @property
    def images(self) -> ImageStore:
        """The images.

        Raises:
            VlscaleError: there is no such store.
        """
        return self.require("images")

    def require(self, name: str) -> Any:
        """Return a store.

        Raises:
            VlscaleError: it is not there.
        """
        if name not in self.stores:
            raise VlscaleError(
                f"dataset {self.name}: {self.root / name} is not there, and {name} are needed; build the store, or "
                f"leave the dataset out"
            )
        return self.stores[name]

    @property
    def classes(self) -> ClassStore | None:
        """The regions' class probabilities."""
        return self.stores.get("classes")  # type: ignore[return-value]

    @property
    def units(self) -> UnitStore | None:
        """Which word pieces are masked together."""
        return self.stores.get("units")  # type: ignore[return-value]

    @property
    def rewrites(self) -> RewriteStore | None:
        """Rewritten captions."""
        return self.stores.get("rewrites")  # type: ignore[return-value]

    @property
    def retrieved(self) -> RetrievedStore | None:
        """Images and texts like each text's own."""
        return self.stores.get("retrieved")  # type: ignore[return-value]

    @cached_property
    def lengths(self) -> DatasetLengths:
        """What a plan needs of the dataset, memory-mapped."""
        if self.kind == "images":
            lengths = DatasetLengths.of_images(self.name, self.images.lengths, self.images.reader.ends)
            return replace(lengths, beside=self._beside())
        return DatasetLengths(
            name=self.name,
            tokens=self.texts.lengths,
            image_ptr=self.texts.image_ptr,
            image_refs=self.texts.image_refs,
            regions=self.images.lengths if "images" in self.stores else np.zeros(0, np.int32),
            text_shards=self.texts.shard_ends,
            beside=self._beside(),
        )

    def _beside(self) -> Beside:
        digests = {name: self.stores[name].reader.index.digest for name in ("images", "texts") if name in self.stores}
        return Beside(
            self.rewrites, self.retrieved, digests.get("images"), digests.get("texts"), str(self.root), self.units
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the indexes (with the shards' hashes), meta.json and side files of texts, images and classes.

        Neither the dataset's name nor its place enters, so a copy has the same fingerprint. Nor does what stands beside
        the texts, which not every run reads: a plan names what it does (:meth:`vlscale.data.beside.Beside.read`).
        """
        parts = [store.digests() for name, store in self.stores.items() if name in _STORES]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The vocabulary of the texts, if there are any."""
        return self.texts.meta.vocabulary if "texts" in self.stores else None

    @property
    def num_types(self) -> int:
        """Kinds of segments that the texts have; 1: none."""
        return self.texts.num_types if "texts" in self.stores else 1

    @property
    def feature_dim(self) -> int | None:
        """Width D of the region features, if there are images."""
        return self.images.meta.feature_dim if "images" in self.stores else None

    @property
    def num_classes(self) -> int | None:
        """Number C of classes, or None without a classes store."""
        return None if self.classes is None else self.classes.meta.num_classes


def open_dataset(name: str, root: Path | str, verify: bool = True, cache: CacheSettings | None = None) -> Dataset:
    """Open the dataset in ``root``; reads indexes, meta.json and side files, no shard.

    Args:
        name: its name in the recipe.
        root: folder or URL with images/ or texts/ or both, and optionally classes/ (for mrc, mrckl and unified) and,
            beside the texts, units/, rewrites/ and retrieved/ (for unified).
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
        if not any((root / part).is_dir() for part in ("texts", "images")):
            raise VlscaleError(
                f"dataset {name}: {root / 'texts'} is no folder, nor is images/; set data.datasets[].root to a folder "
                f"with texts/ and images/ (or one of them, for task unified), or build the dataset first"
            )
    remote = None if cache is None else open_root(root, cache)
    place = Path(root) if remote is None else remote.folder
    stores: dict[str, Store] = {}
    for part, kind in _STORES.items():
        if (place / part).exists():
            stores[part] = kind(place / part, verify, _files(remote, part))
    texts, images, classes = (stores.get(part) for part in _STORES)
    if isinstance(texts, TextStore):
        _check_refs(place, texts, images)
        for part, beside in _BESIDE.items():
            found = open_companion(beside, place / part, texts, verify, _files(remote, part))
            if found is not None:
                stores[part] = found
    regions = images.region_ptr.total if isinstance(images, ImageStore) else 0
    if classes is not None and len(classes) != regions:
        raise VlscaleError(
            f"{place / 'classes'}: {len(classes)} rows, but the images have {regions} regions; build it again"
        )
    for store in stores.values():
        if verify:
            store.reader.index.check_side_files()  # last: what the other checks say is more to the point
    return Dataset(name, place, stores)


def _files(remote: CachedRoot | None, store: str) -> FilesOf | None:
    return None if remote is None else partial(remote.files, store)


def _check_refs(root: Path, texts: TextStore, images: Store | None) -> None:
    refs, rows = texts.image_refs, 0 if images is None else len(images)
    at = first_outside(refs, 0, rows)
    if at is not None:
        if images is None:
            raise VlscaleError(
                f"{root / 'images'} is no folder, but texts refer to images: build the images store (texts that refer "
                f"to none need none)"
            )
        row = int(np.searchsorted(texts.image_ptr, at, side="right")) - 1
        raise VlscaleError(
            f"{root / 'texts' / 'image_refs.npy'}: text row {row} refers to image row {refs[at]}, but images/ has "
            f"{rows} rows; build both stores again"
        )
