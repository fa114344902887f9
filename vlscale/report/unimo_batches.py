"""Batches for questions to a UNIMO: images alone, texts alone, and rows of word pieces that a question has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.data.dataset import Dataset
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.ragged import cumulative

BATCH_TOKENS = 8192
"""Word pieces and regions of one batch."""


def with_specials(dataset: Dataset, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the word pieces of int64 [B] texts, each int64 [t + 2] with [CLS] and [SEP].

    Raises:
        VlscaleError: the store is damaged.
    """
    ids, lengths = dataset.texts.input_ids(rows)
    vocabulary = dataset.texts.meta.vocabulary
    parts = np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])
    return [np.concatenate([[vocabulary.cls], part, [vocabulary.sep]]) for part in parts]


def make_batch(
    dataset: Dataset, texts: Sequence[NDArray[np.int64]], images: NDArray[np.int64], max_regions: int
) -> UnimoBatch:
    """Put rows of word pieces and images together.

    Args:
        dataset: where the images are; may have none.
        texts: int64 [t_i] word pieces with special tokens, for each of B rows; t_i = 0 is no text.
        images: int64 [B] rows of the images store; -1 is no image.
        max_regions: the first n regions of an image are used.
    """
    count = len(texts)
    features, boxes = np.zeros((0, 1), np.float32), np.zeros((0, 4), np.float32)
    counts, region_rows = np.zeros(count, np.int32), np.zeros(0, np.int64)
    if (images >= 0).any():
        features, boxes, counts, region_rows = dataset.images.regions(images, max_regions)
    lengths = torch.tensor([len(text) for text in texts])
    return UnimoBatch(
        task="unified",
        dataset=dataset.name,
        input_ids=torch.from_numpy(np.concatenate([*texts, np.zeros(0, np.int64)])),
        cu_text=cumulative(lengths),
        features=torch.from_numpy(features),
        boxes=torch.from_numpy(boxes),
        cu_regions=cumulative(torch.from_numpy(counts)),
        passes=torch.zeros(count, dtype=torch.long),
        examples=torch.arange(count),
        images=torch.from_numpy(images),
        group=torch.arange(count, dtype=torch.int32),
        region_rows=torch.from_numpy(region_rows),
    )


def cut(costs: NDArray[np.int64]) -> Iterator[slice]:
    """Cut rows of int64 [B] ``costs``, in order, into batches of at most :data:`BATCH_TOKENS`, of a row at least."""
    total, begin = np.cumsum(costs), 0
    while begin < len(costs):
        before = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, before + BATCH_TOKENS, side="right")))
        yield slice(begin, end)
        begin = end


def images_alone(
    dataset: Dataset, rows: NDArray[np.int64], max_regions: int, device: torch.device
) -> Iterator[tuple[slice, UnimoBatch]]:
    """Yield places in int64 [B] ``rows`` and the batch of these images, without a text, on ``device``."""
    none = np.zeros(0, np.int64)
    for part in cut(dataset.images.counts_of(rows, max_regions).astype(np.int64) + 1):
        chosen = rows[part]
        yield part, make_batch(dataset, [none] * len(chosen), chosen, max_regions).to(device)


def texts_alone(dataset: Dataset, rows: NDArray[np.int64], device: torch.device) -> Iterator[tuple[slice, UnimoBatch]]:
    """Yield places in int64 [B] ``rows`` and the batch of these texts, without an image, on ``device``."""
    for part in cut(dataset.texts.lengths_of(rows).astype(np.int64) + 2):
        chosen = rows[part]
        no_images = np.full(len(chosen), -1, np.int64)
        yield part, make_batch(dataset, with_specials(dataset, chosen), no_images, 1).to(device)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's weights are."""
    first: Tensor = next(model.parameters())
    return first.device
