"""Verification: every shard against its hash, every side file against the others and, on request, every row.

Unlike training, which stops at the first damage that it meets, this goes on and lists all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlscale.data.beside import MODALITIES
from vlscale.data.chunks import slices
from vlscale.data.companion_base import Companion
from vlscale.data.companions import RetrievedStore, RewriteStore, UnitStore
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.expansion import own_candidates
from vlscale.data.index import HASH, INDEX_NAME, RESTORE, file_hash, file_size, read_bytes
from vlscale.data.inspection import STORES, AnyStore, Kind, find_stores, is_whole
from vlscale.data.rows import image_problem
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.errors import VlscaleError

MOST_LISTED = 1000
"""Problems that are kept; further ones are only counted."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", re.ASCII)
_PROBS_ROWS = 4096
_LISTS = 4096

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)``, in bytes of shards or in rows."""


@dataclass
class Verification:
    """What a verification has found.

    Attributes:
        stores, shards, bytes, rows: how much was checked.
        found: number of problems.
        problems: the first ones, each a line that names file or row, what was found and what was expected.
        packed: stores of which only compressed shards are there: these were hashed, what is in them was not looked at.
    """

    stores: int = 0
    shards: int = 0
    bytes: int = 0
    rows: int = 0
    found: int = 0
    problems: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Note a problem."""
        self.found += 1
        if len(self.problems) < MOST_LISTED:
            self.problems.append(" ".join(problem.split()))


@dataclass(frozen=True)
class _Listed:
    """One shard as index.json lists it, whatever else is wrong there."""

    path: Path
    bytes: int
    xxh64: str | None
    packed: bool


def verify(path: Path | str, rows: bool = False, progress: Progress = lambda what, done, total: None) -> Verification:
    """Check everything in a dataset's folder, or in a single store's.

    Args:
        path: see :func:`vlscale.data.inspection.find_stores`.
        rows: decode every row as well, and compare it with the side files, the vocabulary and the other stores.
        progress: told how far it is.

    Raises:
        VlscaleError: no store is there at all.
    """
    folders = find_stores(path)
    path = Path(path)
    report = Verification(stores=len(folders))
    damaged = {kind: _verify_shards(kind, folder, report, progress) for kind, folder in folders.items()}
    opened = {
        kind: None if kind in report.packed else _open(kind, folder, damaged[kind], report)
        for kind, folder in folders.items()
    }
    if "images" not in folders and path not in folders.values():
        _miss_images(path, opened, report)
    whole = {kind: store for kind, store in opened.items() if store is not None}
    if path not in folders.values() and len(whole) == len(folders) and is_whole(folders):
        try:
            dataset = open_dataset("dataset", path, verify=False)
        except VlscaleError as error:
            report.add(str(error))
            return report
        if rows:
            _verify_lists(dataset, report)
    if rows:
        _verify_rows(whole, damaged, report, progress)
    return report


def _listed_shards(folder: Path) -> list[_Listed]:
    """Shards that index.json lists; names that leave the folder, and entries that are none, are left to read_index."""
    try:
        index = json.loads(read_bytes(folder / INDEX_NAME))
    except (ValueError, RecursionError):
        return []
    found = []
    entries = index.get("shards") if isinstance(index, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        for key in ("raw_data", "zip_data"):
            file = entry.get(key) if isinstance(entry, dict) else None
            name = file.get("basename") if isinstance(file, dict) else None
            if not isinstance(file, dict) or not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
                continue
            size, hashes = file.get("bytes"), file.get("hashes")
            if key == "raw_data" and entry.get("zip_data") and not (folder / name).exists():
                continue  # only the compressed file is kept
            if type(size) is int:
                xxh64 = hashes.get(HASH) if isinstance(hashes, dict) else None
                xxh64 = xxh64 if isinstance(xxh64, str) else None
                found.append(_Listed(folder / name, size, xxh64, key == "zip_data"))
                break
    return found


def _verify_shards(kind: Kind, folder: Path, report: Verification, progress: Progress) -> set[Path]:
    """Hash every shard; returns the damaged ones."""
    try:
        shards = _listed_shards(folder)
    except VlscaleError as error:
        report.add(str(error))
        return set()
    damaged, total, done = set(), sum(shard.bytes for shard in shards), 0
    if any(shard.packed for shard in shards):
        report.packed.append(kind)
    for shard in shards:
        progress(f"{kind}: hashes", done, total)
        try:
            _check_file(shard)
        except VlscaleError as error:
            report.add(str(error))
            damaged.add(shard.path)
        report.shards += 1
        report.bytes += shard.bytes
        done += shard.bytes
    progress(f"{kind}: hashes", total, total)
    return damaged


def _check_file(shard: _Listed) -> None:
    size = file_size(shard.path, "which index.json lists")
    if size != shard.bytes:
        raise VlscaleError(f"{shard.path}: {size} bytes, expected {shard.bytes} by index.json; {RESTORE}")
    if shard.xxh64 is None:
        raise VlscaleError(f"{shard.path}: index.json records no {HASH} for it; write the store with hashes")
    found = file_hash(shard.path)
    if found != shard.xxh64:
        raise VlscaleError(
            f"{shard.path}: damaged: its {HASH} is {found}, expected {shard.xxh64} by index.json; {RESTORE}"
        )


def _open(kind: Kind, folder: Path, damaged: set[Path], report: Verification) -> AnyStore | None:
    """Open a store, which checks index.json, meta.json and side files; None if that fails."""
    try:
        store = STORES[kind](folder, verify=False)
        store.reader.index.check_side_files()
        return store
    except VlscaleError as error:
        # A shard that is missing or of another size has been listed already.
        if not any(str(error).startswith(f"{path}:") for path in damaged):
            report.add(str(error))
        return None


def _miss_images(path: Path, opened: dict[Kind, AnyStore | None], report: Verification) -> None:
    """A dataset without images/ is whole only if nothing refers to an image."""
    texts = opened.get("texts")
    if "classes" in opened or (isinstance(texts, TextStore) and len(texts.image_refs)):
        report.add(f"{path / 'images'}: is missing, but the other stores refer to it; restore it or build it again")


def _verify_rows(
    stores: dict[Kind, AnyStore], damaged: dict[Kind, set[Path]], report: Verification, progress: Progress
) -> None:
    images, texts, classes = stores.get("images"), stores.get("texts"), stores.get("classes")
    ids: NDArray[np.uint64] | None = None
    if isinstance(images, ImageStore):
        ids = np.zeros(len(images), np.uint64)
        for row, decoded in _rows("images", images, damaged, report, progress):
            ids[row] = _hashed(decoded["id"])
            problem = image_problem(decoded, int(images.lengths[row]), images.meta.feature_dim)
            if problem:
                report.add(f"{images.folder}: row {row}: {problem}; build the store again")
    if isinstance(texts, TextStore):
        known = ids if not damaged.get("images") else None
        for row, decoded in _rows("texts", texts, damaged, report, progress):
            problem = _text_problem(texts, row, decoded, known)
            if problem:
                report.add(f"{texts.folder}: row {row}: {problem}; build the store again")
    if isinstance(classes, ClassStore) and not damaged["classes"]:
        _verify_probs(classes, report, progress)
    beside = texts if isinstance(texts, TextStore) and not damaged["texts"] else None
    for kind in ("units", "rewrites", "retrieved"):
        store = stores.get(kind)
        if isinstance(store, Companion) and not damaged[kind]:
            _verify_beside(kind, store, beside, report, progress)


def _verify_beside(
    kind: Kind, store: Companion, texts: TextStore | None, report: Verification, progress: Progress
) -> None:
    """Decode every row of a store beside the texts as batches and people do, and compare it with its text."""
    for row in range(len(store)):
        progress(f"{kind}: rows", row, len(store))
        report.rows += 1
        try:
            if isinstance(store, UnitStore):
                (units,) = store.units_of(np.array([row]))
                if texts is not None and units[-1, 1] != texts.lengths[row]:
                    store.fail(row, f"units of {units[-1, 1]} word pieces, but the text has {texts.lengths[row]}")
            elif isinstance(store, RewriteStore):
                store.rewrites(row)
            elif isinstance(store, RetrievedStore):
                store.images_of(row)
                store.texts_of(row)
            if texts is not None and store.row(row)["id"] != texts.row(row)["id"]:
                store.fail(row, f"is of text {store.row(row)['id']!r}, expected {texts.row(row)['id']!r}")
        except VlscaleError as error:
            report.add(str(error))
    progress(f"{kind}: rows", len(store), len(store))


def _verify_lists(dataset: Dataset, report: Verification) -> None:
    """Look for the original in the lists of candidates that are rows of the dataset itself; see check_original."""
    retrieved = dataset.retrieved
    if retrieved is None:
        return
    try:
        lengths = dataset.lengths
    except VlscaleError as error:
        report.add(str(error))
        return
    for kind in MODALITIES:
        collection = retrieved.collection(kind)
        if collection is None or collection.digest != lengths.beside.digest_of(kind):
            continue
        for part in slices(len(lengths), _LISTS):
            texts = np.arange(part.start, part.stop)
            try:
                packed, counts = retrieved.packed(kind, texts)
            except VlscaleError:  # a row that cannot be read is listed by itself; the others wait until it is mended
                continue
            found, owners = packed.astype(np.int64), np.repeat(texts, counts)
            for at in np.flatnonzero(own_candidates(lengths, kind, owners, found)).tolist():
                try:
                    retrieved.check_original(kind, int(owners[at]), found[at : at + 1], found[at : at + 1])
                except VlscaleError as error:
                    report.add(str(error))


def _rows(
    kind: Kind, store: AnyStore, damaged: dict[Kind, set[Path]], report: Verification, progress: Progress
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, decoded) of each row that can be decoded; rows of damaged shards are passed over."""
    bad_shards = {path.name for path in damaged[kind]}
    first = 0
    for entry in json.loads(read_bytes(store.folder / INDEX_NAME))["shards"]:
        last = first + int(entry["samples"])
        if entry["raw_data"]["basename"] not in bad_shards:
            said = ""
            for row in range(first, last):
                progress(f"{kind}: rows", row, len(store))
                report.rows += 1
                try:
                    decoded = store.row(row)
                except VlscaleError as error:
                    if str(error) == said:  # it is the shard that cannot be read, not this row
                        break
                    said = str(error)
                    report.add(said)
                    continue
                yield row, decoded
        first = last
    progress(f"{kind}: rows", len(store), len(store))


def _text_problem(texts: TextStore, row: int, decoded: dict[str, Any], ids: NDArray[np.uint64] | None) -> str | None:
    words, size = decoded["input_ids"], texts.meta.vocabulary.size
    if words.shape != (int(texts.lengths[row]),):
        return f"input_ids {list(words.shape)}, expected [{texts.lengths[row]}] by lengths.npy"
    if words.min() < 0 or words.max() >= size:
        return f"input_ids span {words.min()}..{words.max()}, outside the vocabulary of {size}"
    if texts.num_types > 1:
        types = decoded["type_ids"]
        if types.shape != words.shape or types.min() < 0 or types.max() >= texts.num_types:
            return f"type_ids {list(types.shape)} are not {len(words)} numbers in 0..{texts.num_types - 1}"
    names, refs = decoded["images"], texts.image_refs[texts.image_ptr[row] : texts.image_ptr[row + 1]]
    if not isinstance(names, list) or len(names) != len(refs):
        return f"refers to the images {str(names)[:80]}, but image_ptr.npy counts {len(refs)}"
    if ids is not None:
        for name, ref in zip(names, refs.tolist(), strict=True):
            if _hashed(name) != ids[ref]:
                return f"refers to image {str(name)[:80]!r}, but image_refs.npy to row {ref}, which is another image"
    return None


def _hashed(name: Any) -> int:
    """The first 64 bits that stand for an image's id, so that a million ids take 8 MB."""
    return xxhash.xxh64_intdigest(str(name).encode())


def _verify_probs(classes: ClassStore, report: Verification, progress: Progress) -> None:
    for first in range(0, len(classes), _PROBS_ROWS):
        rows = np.arange(first, min(first + _PROBS_ROWS, len(classes)))
        progress("classes: rows", first, len(classes))
        report.rows += len(rows)
        try:
            classes.probs(rows)
        except VlscaleError:  # find out which
            for row in rows:
                try:
                    classes.probs(np.array([row]))
                except VlscaleError as error:
                    report.add(str(error))
    progress("classes: rows", len(classes), len(classes))
