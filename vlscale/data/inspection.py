"""What a folder of stores holds, as plain JSON types: schema, counts and lengths. Reads side files, no shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vlscale.config_values import is_url
from vlscale.data.chunks import slices
from vlscale.data.companions import RetrievedStore, RewriteStore, UnitStore
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.index import INDEX_NAME, read_bytes
from vlscale.data.remote import CacheSettings
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.data.survey import MOST_TOKENS, Histogram
from vlscale.errors import VlscaleError

AnyStore = TextStore | ImageStore | ClassStore | UnitStore | RewriteStore | RetrievedStore
Kind = Literal["texts", "images", "classes", "units", "rewrites", "retrieved"]
KINDS: tuple[Kind, ...] = get_args(Kind)
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 16
STORES: dict[Kind, type[AnyStore]] = {
    "texts": TextStore,
    "images": ImageStore,
    "classes": ClassStore,
    "units": UnitStore,
    "rewrites": RewriteStore,
    "retrieved": RetrievedStore,
}
"""Kind -> its reader."""


class _AnyMeta(BaseModel):
    """The one key of a meta.json that says what the others mean."""

    model_config = ConfigDict(extra="ignore")
    kind: Kind


@dataclass(frozen=True)
class Stores:
    """The stores of a folder, opened; None where one is absent.

    Attributes:
        path: the folder, or the URL, as the user named it.
        texts, images, classes, units, rewrites, retrieved: the stores.
        dataset: all of them, checked against each other, where they are a dataset's.
    """

    path: Path | str
    texts: TextStore | None = None
    images: ImageStore | None = None
    classes: ClassStore | None = None
    units: UnitStore | None = None
    rewrites: RewriteStore | None = None
    retrieved: RetrievedStore | None = None
    dataset: Dataset | None = None

    def __iter__(self) -> Iterator[tuple[Kind, AnyStore]]:
        """Yield the stores that are there with their kinds."""
        for kind in KINDS:
            store = getattr(self, kind)
            if store is not None:
                yield kind, store

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Vocabulary of the texts."""
        return self.texts.meta.vocabulary if self.texts is not None else None


def find_stores(path: Path | str) -> dict[Kind, Path]:
    """Return kind -> folder of the stores in ``path``, which is a dataset's folder or that of a single store.

    Raises:
        VlscaleError: it is neither.
    """
    if is_url(str(path)):
        raise VlscaleError(
            f"{path}: is a remote; give --cache FOLDER for what is fetched (--verify reads folders only)"
        )
    path = Path(path)
    if not path.is_dir():
        raise VlscaleError(f"{path}: is no folder; name a dataset (images/, texts/) or one of its stores")
    if (path / INDEX_NAME).exists() or (path / "meta.json").exists():
        try:
            kind = _AnyMeta.model_validate_json(read_bytes(path / "meta.json")).kind
        except ValueError:
            raise VlscaleError(
                f"{path / 'meta.json'}: is not of a store: no kind that is one of {', '.join(KINDS)}; restore the file "
                f"or build the store again"
            ) from None
        return {kind: path}
    found = {kind: path / kind for kind in KINDS if (path / kind).is_dir()}
    if not found:
        raise VlscaleError(
            f"{path}: neither a dataset (no images/, texts/ or classes/) nor a store (no {INDEX_NAME}); name the "
            f"folder that data.datasets[].root names, or one of its stores"
        )
    return found


def open_stores(path: Path | str, cache: Path | None = None) -> Stores:
    """Open the stores in ``path``; see :func:`find_stores`. Shards are checked against their hashes when touched.

    Args:
        path: a dataset's folder, or that of a store.
        cache: folder that files are fetched into; ``path`` may then be a remote dataset, or have compressed shards.

    Raises:
        VlscaleError: no store is there, or one is damaged or does not fit the others; or a remote does not answer.
    """
    if cache is not None:
        return _stores_of(path, open_dataset("dataset", path, cache=CacheSettings(cache)))
    found = find_stores(path)
    path = Path(path)
    if path not in found.values() and is_whole(found):
        return _stores_of(path, open_dataset(path.resolve().name or "dataset", path))
    opened: dict[str, Any] = {kind: STORES[kind](folder) for kind, folder in found.items()}
    for store in opened.values():
        store.reader.index.check_side_files()
    return Stores(path, **opened)


def is_whole(found: Mapping[Kind, Path]) -> bool:
    """Can the stores be opened as a dataset: texts and images, images alone, or texts that refer to none?

    Raises:
        VlscaleError: the texts are damaged.
    """
    if "images" in found:
        return True
    return "texts" in found and "classes" not in found and not len(TextStore(found["texts"]).image_refs)


def _stores_of(path: Path | str, dataset: Dataset) -> Stores:
    stores: dict[str, Any] = dict(dataset.stores)
    return Stores(path, **stores, dataset=dataset)


def facts(stores: Stores) -> dict[str, Any]:
    """Return schema and counts: ``path, fingerprint, stores, vocabulary`` and the references between stores."""
    found: dict[str, Any] = {
        "path": str(stores.path),
        "fingerprint": stores.dataset.fingerprint if stores.dataset is not None else None,
        "stores": {kind: _store_facts(store) for kind, store in stores},
    }
    if stores.vocabulary is not None:
        found["vocabulary"] = vocabulary_facts(stores.vocabulary)
    if stores.texts is not None:
        ptr = stores.texts.image_ptr
        found["texts_without_image"] = sum(
            int((ptr[part.start + 1 : part.stop + 1] == ptr[part]).sum()) for part in slices(len(stores.texts))
        )
    if stores.texts is not None and stores.images is not None:
        met = np.zeros(len(stores.images), bool)
        refs = stores.texts.image_refs
        for part in slices(len(refs)):
            met[refs[part]] = True
        found["images_without_text"] = int(len(met) - met.sum())
    return found


def vocabulary_facts(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return size, fingerprint, special tokens (role -> [id, token]) and the range random words are drawn from."""
    special = {role: getattr(vocabulary, role) for role in SPECIAL_TOKENS}
    return {
        "size": vocabulary.size,
        "fingerprint": vocabulary.fingerprint,
        "special": {role: [index, vocabulary.tokens[index]] for role, index in special.items()},
        "random_range": list(vocabulary.random_range),
    }


def _store_facts(store: AnyStore) -> dict[str, Any]:
    index = store.reader.index
    sizes = [shard.bytes for shard in index.shards]
    names = getattr(store.meta, "class_names", None)
    found: dict[str, Any] = {
        "rows": len(store),
        "shards": len(index.shards),
        "bytes": sum(sizes),
        "compressed_bytes": sum(shard.zip.bytes for shard in index.shards if shard.zip is not None),
        "largest_shard_bytes": max(sizes, default=0),
        "shards_without_hash": sum(shard.xxh64 is None for shard in index.shards),
        "columns": {column.name: column.encoding for column in index.columns},
        "meta": store.meta.model_dump(exclude={"vocabulary", "class_names"}),
        "class_names": None if names is None else len(names),
        "digest": index.digest,
    }
    if isinstance(store, ImageStore):
        found["regions"] = _total(store.lengths)
        width = np.dtype(store.meta.feature_dtype).itemsize * store.meta.feature_dim
        found["raw_feature_bytes"] = found["regions"] * width
    if isinstance(store, TextStore):
        found["tokens"] = _total(store.lengths)
        found["tokenizer"] = store.tokenizer_path is not None
    if isinstance(store, UnitStore):
        found["units"] = _total(store.lengths)
    if isinstance(store, RewriteStore):
        found["views"], found["positive_views"] = len(store.view_tokens), _total(store.view_positive)
    if isinstance(store, RetrievedStore):
        found["images"], found["texts"] = _total(store.image_counts), _total(store.text_counts)
    return found


def _total(array: NDArray[Any]) -> int:
    return sum(int(array[part].sum(dtype=np.int64)) for part in slices(len(array)))


def length_histograms(stores: Stores) -> dict[str, Histogram]:
    """Count lengths.

    Returns:
        ``tokens``: word pieces per text without [CLS] and [SEP]; ``regions`` per image; ``joint``: what a text runs
        with its first image, [CLS], [SEP] and all regions included. Those that the stores at hand can tell.

    Raises:
        VlscaleError: a length is absurd.
    """
    found: dict[str, Histogram] = {}
    if stores.texts is not None:
        found["tokens"] = _histogram(stores.texts, "tokens")
    if stores.images is not None:
        found["regions"] = _histogram(stores.images, "regions")
    if stores.dataset is not None and stores.dataset.kind == "pairs":
        lengths, joint = stores.dataset.lengths, Histogram()
        for part in slices(len(lengths)):
            rows = np.arange(part.start, part.stop)
            joint.add(lengths.costs(rows, lengths.first_image(rows), MOST_TOKENS))
        found["joint"] = joint
    return found


def _histogram(store: TextStore | ImageStore, unit: str) -> Histogram:
    found = Histogram()
    for part in slices(len(store)):
        values = np.asarray(store.lengths[part])
        if int(values.max()) > MOST_TOKENS:
            row = part.start + int(values.argmax())
            raise VlscaleError(
                f"{store.folder / 'lengths.npy'}: row {row} has {values.max()} {unit}, more than {MOST_TOKENS}; build "
                f"the store again"
            )
        found.add(values)
    return found


def describe_histogram(histogram: Histogram) -> dict[str, Any]:
    """Return ``count, total, least, most, mean``, ``quantiles`` ({"0.5": 12}) and ``bins`` ([low, high, count])."""
    counts = histogram.counts
    count = int(counts.sum())
    if not count:
        return {"count": 0, "total": 0, "quantiles": {}, "bins": []}
    below = np.cumsum(counts)
    least, most = histogram.least, histogram.most
    width = -(-(most - least + 1) // BINS)
    edges = range(least, most + 1, width)
    return {
        "count": count,
        "total": int(counts @ np.arange(len(counts))),
        "least": least,
        "most": most,
        "mean": histogram.mean,
        "quantiles": {str(share): int(np.searchsorted(below, share * count)) for share in QUANTILES},
        "bins": [[low, min(low + width - 1, most), int(counts[low : low + width].sum())] for low in edges],
    }
