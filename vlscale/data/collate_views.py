"""Collation of unified steps: rows of several datasets, with texts, images or both, in one packed batch.

An image that several rows of a micro-batch show (a pair, its rewritten captions, the image alone) is read and decoded
once, and copied within the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.data.collate import Empty, batch_of, memory_of
from vlscale.data.deal import MicroBatch
from vlscale.data.lengths import SPECIALS
from vlscale.data.packing import Block
from vlscale.data.store_base import within
from vlscale.data.views import Role, Views
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset


def collate_views(
    datasets: Mapping[str, Dataset], micro: MicroBatch, max_regions: int, block: Block | None = None, units: bool = True
) -> RaggedBatch:
    """Read the rows of a unified ``micro`` and pack them.

    Args:
        datasets: name -> opened dataset, at least those of ``micro.views``.
        micro: rows of task ``unified``.
        max_regions: the first n regions of an image are used.
        block: where the tensors shall lie; None allocates them.
        units: deliver which word pieces are masked together, if any dataset knows.

    Returns:
        The batch. Features are of the widest dtype that a dataset stores. ``targets``: ``role`` and ``source``, int64
        [B]; and, with units, ``unit_ends`` int64 [U], places in ``input_ids`` behind each unit's last word piece, with
        ``cu_units`` int32 [B+1]. Only rows whose text is masked have any, and only of a dataset that knows them.

    Raises:
        VlscaleError: a row is damaged (raised by the stores; names store and row).
    """
    views = micro.views
    assert views is not None
    all_of = [datasets[name] for name in views.datasets]
    parts = [part for number, each in enumerate(all_of) if len((part := _Part.of(each, number, micro, views)).rows)]
    empty, kept = memory_of(block)
    input_ids, cu_text = _texts(parts, len(micro), empty)
    features, boxes, cu_regions, region_rows = _images(all_of, parts, len(micro), max_regions, empty)
    batch = batch_of(micro, kept, input_ids, cu_text, features, boxes, cu_regions, region_rows)
    known = units and any(dataset.units is not None for dataset in all_of)
    batch.targets |= {name: kept(target) for name, target in _targets(parts, views, cu_text, known).items()}
    return batch


def _targets(parts: Sequence[_Part], views: Views, cu_text: NDArray[np.int32], units: bool) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {
        "role": views.role.astype(np.int64),
        "source": views.source.astype(np.int64),
    }
    if units:
        found["unit_ends"], found["cu_units"] = _units(parts, cu_text)
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of a micro-batch that are of one dataset.

    Attributes:
        dataset: the dataset.
        rows: int64 [n], their places in the micro-batch.
        texts, images, views: int64 [n], rows of its stores, -1 for none; see :class:`~vlscale.data.views.Views`.
        role: int8 [n].
    """

    dataset: Dataset
    rows: NDArray[np.int64]
    texts: NDArray[np.int64]
    images: NDArray[np.int64]
    views: NDArray[np.int64]
    role: NDArray[np.int8]

    @classmethod
    def of(cls, dataset: Dataset, number: int, micro: MicroBatch, views: Views) -> _Part:
        rows = np.flatnonzero(views.source == number)
        return cls(dataset, rows, micro.texts[rows], micro.images[rows], views.view[rows], views.role[rows])

    @property
    def read(self) -> NDArray[np.int64]:
        """int64, places in ``rows`` of those with a text as it is stored."""
        return np.flatnonzero((self.texts >= 0) & (self.views < 0))

    @property
    def rewritten(self) -> NDArray[np.int64]:
        """int64, places in ``rows`` of those with a rewritten text."""
        return np.flatnonzero(self.views >= 0)


def _texts(parts: Sequence[_Part], rows: int, empty: Empty) -> tuple[Tensor, NDArray[np.int32]]:
    """int64 [Nt] ids with [CLS] and [SEP], and int32 [B+1] cumulative lengths."""
    lengths = np.zeros(rows, np.int64)
    for part in parts:
        read, rewritten = part.read, part.rewritten
        if len(read):
            lengths[part.rows[read]] = part.dataset.texts.lengths_of(part.texts[read]) + SPECIALS
        if len(rewritten):
            assert part.dataset.rewrites is not None
            lengths[part.rows[rewritten]] = part.dataset.rewrites.view_tokens[part.views[rewritten]] + SPECIALS
    cu = _cumulative(lengths)
    input_ids = empty((int(cu[-1]),), torch.int64)
    out = input_ids.numpy()
    starts, stops = cu[:-1].astype(np.int64), cu[1:].astype(np.int64)
    for part in parts:
        read, rewritten = part.read, part.rewritten
        written = part.rows[np.concatenate([read, rewritten])]
        if len(written):
            vocabulary = part.dataset.texts.meta.vocabulary
            out[starts[written]], out[stops[written] - 1] = vocabulary.cls, vocabulary.sep
        if len(read):
            part.dataset.texts.write_ids(part.texts[read], out, starts[part.rows[read]] + 1)
        if len(rewritten):
            assert part.dataset.rewrites is not None
            places = starts[part.rows[rewritten]] + 1
            part.dataset.rewrites.write_ids(part.texts[rewritten], part.views[rewritten], out, places)
    return input_ids, cu


def _images(
    datasets: Sequence[Dataset], parts: Sequence[_Part], rows: int, max_regions: int, empty: Empty
) -> tuple[Tensor, Tensor, NDArray[np.int32], NDArray[np.int64]]:
    """[Nr, D] features, float32 [Nr, 4] boxes, int32 [B+1] cumulative counts, and int64 [Nr] rows of classes."""
    shown = [(part, np.flatnonzero(part.images >= 0)) for part in parts]
    shown = [(part, at) for part, at in shown if len(at)]
    counts = np.zeros(rows, np.int32)
    for part, at in shown:
        counts[part.rows[at]] = part.dataset.images.counts_of(part.images[at], max_regions)
    cu = _cumulative(counts)
    firsts = cu[:-1].astype(np.int64)
    stores = [dataset.images for dataset in datasets if "images" in dataset.stores]
    dtype = np.result_type(*(store.feature_dtype for store in stores)) if stores else np.dtype(np.float32)
    width = stores[0].meta.feature_dim if stores else 0
    features = empty((int(cu[-1]), width), getattr(torch, dtype.name))
    boxes = empty((int(cu[-1]), 4), torch.float32)
    region_rows = np.empty(int(cu[-1]), np.int64)
    for part, at in shown:
        placed = part.rows[at]
        _read_once(part, part.images[at], counts[placed], firsts[placed], features.numpy(), boxes.numpy())
        places = np.repeat(firsts[placed], counts[placed]) + within(counts[placed])
        region_rows[places] = part.dataset.images.region_rows(part.images[at], counts[placed])
    return features, boxes, cu, region_rows


def _read_once(
    part: _Part,
    images: NDArray[np.int64],
    counts: NDArray[np.int32],
    firsts: NDArray[np.int64],
    features: NDArray[Any],
    boxes: NDArray[np.float32],
) -> None:
    """Write the regions of int64 [n] ``images`` to ``firsts``; each is decoded for the first row that shows it."""
    store = part.dataset.images
    _, leader, follows = np.unique(images, return_index=True, return_inverse=True)
    if store.feature_dtype == features.dtype:
        store.write_regions(images[leader], counts[leader], features, boxes, firsts[leader])
    else:  # another dataset's are wider
        total = int(counts[leader].sum())
        stored, placed = np.empty((total, features.shape[1]), store.feature_dtype), np.empty((total, 4), np.float32)
        store.write_regions(images[leader], counts[leader], stored, placed)
        places = np.repeat(firsts[leader], counts[leader]) + within(counts[leader])
        features[places], boxes[places] = stored, placed
    copies = np.flatnonzero(leader[follows] != np.arange(len(images)))
    spans = zip(firsts[leader[follows[copies]]].tolist(), firsts[copies].tolist(), counts[copies].tolist(), strict=True)
    for source, target, count in spans:
        features[target : target + count] = features[source : source + count]
        boxes[target : target + count] = boxes[source : source + count]


def _units(parts: Sequence[_Part], cu_text: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """int64 [U] places behind the last word piece of each unit, and int32 [B+1] cumulative counts."""
    counts = np.zeros(len(cu_text) - 1, np.int64)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    for part in parts:
        masked = np.flatnonzero((part.role == Role.BIDIRECTIONAL) | (part.role == Role.SEQ2SEQ))
        if not len(masked) or part.dataset.units is None:
            continue
        rows = part.rows[masked]
        units, number = (each.astype(np.int64) for each in part.dataset.units.packed(part.texts[masked]))
        ends = units[:, 1]
        counts[rows] = number
        found.append((rows, number, np.repeat(cu_text[rows] + 1, number) + ends))
    cu = _cumulative(counts)
    placed = np.empty(int(cu[-1]), np.int64)
    for rows, number, ends in found:
        placed[np.repeat(cu[rows].astype(np.int64), number) + within(number)] = ends
    return placed, cu


def _cumulative(lengths: NDArray[Any]) -> NDArray[np.int32]:
    cu = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu[1:])
    return cu
