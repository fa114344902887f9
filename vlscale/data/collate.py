"""Collation: the rows of a micro-batch become one packed RaggedBatch, unmasked.

Every size is known from the side files before a row is read, so everything is read straight to its final place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.data.deal import MicroBatch
from vlscale.data.lengths import SPECIALS
from vlscale.data.packing import Block
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
Kept = Callable[[NDArray[Any]], Tensor]


def collate(
    dataset: Dataset, micro: MicroBatch, max_regions: int, cls: int, sep: int, block: Block | None = None
) -> RaggedBatch:
    """Read the rows of ``micro`` and pack them.

    Args:
        dataset: the opened dataset that ``micro`` names.
        micro: text and image rows; a text row or image row may be a partner's.
        max_regions: the first n regions of an image are used.
        cls: id of [CLS], put in front of each text.
        sep: id of [SEP], put behind each text.
        block: where the tensors shall lie; None allocates them.

    Returns:
        The batch, with ``targets["itm_labels"]`` int64 [B] (1 match, 0 negative) if the task is itm. Features have the
        stored dtype.

    Raises:
        VlscaleError: a row is damaged (raised by the stores; names store and row).
    """
    texts, images = dataset.texts, dataset.images
    cu_text = _cumulative(texts.lengths_of(micro.texts) + SPECIALS)
    counts = images.counts_of(micro.images, max_regions)
    cu_regions = _cumulative(counts)
    regions = int(cu_regions[-1])

    empty, kept = memory_of(block)
    input_ids = empty((int(cu_text[-1]),), torch.int64)
    features = empty((regions, images.meta.feature_dim), getattr(torch, images.feature_dtype.name))
    boxes = empty((regions, 4), torch.float32)
    text_types = empty(tuple(input_ids.shape), torch.int64) if texts.num_types > 1 else None
    types = None if text_types is None else text_types.numpy()
    write_texts(dataset, micro.texts, cu_text, cls, sep, input_ids.numpy(), types)
    images.write_regions(micro.images, counts, features.numpy(), boxes.numpy())
    region_rows = images.region_rows(micro.images, counts)
    batch = batch_of(micro, kept, input_ids, cu_text, features, boxes, cu_regions, region_rows, text_types)
    if micro.task == "itm":
        batch.targets["itm_labels"] = kept(micro.labels.astype(np.int64))
    return batch


def memory_of(block: Block | None) -> tuple[Empty, Kept]:
    """What makes an empty tensor, and one of an array, in ``block`` if there is one."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype) if block is None else block.empty(shape, dtype)

    def kept(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if block is None else block.empty(tensor.shape, tensor.dtype).copy_(tensor)

    return empty, kept


def batch_of(
    micro: MicroBatch,
    kept: Kept,
    input_ids: Tensor,
    cu_text: NDArray[np.int32],
    features: Tensor,
    boxes: Tensor,
    cu_regions: NDArray[np.int32],
    region_rows: NDArray[np.int64],
    text_types: Tensor | None = None,
) -> RaggedBatch:
    """The batch of a micro-batch whose texts and regions have been read; see :class:`RaggedBatch` for each."""
    return RaggedBatch(
        task=micro.task,
        dataset=micro.dataset,
        input_ids=input_ids,
        cu_text=kept(cu_text),
        features=features,
        boxes=boxes,
        cu_regions=kept(cu_regions),
        passes=kept(micro.passes),
        examples=kept(micro.examples),
        images=kept(micro.images),
        group=kept(micro.group),
        region_rows=kept(region_rows),
        text_types=text_types,
        weight=micro.weight,
    )


def write_texts(
    dataset: Dataset,
    rows: NDArray[np.int64],
    cu_text: NDArray[np.int32],
    cls: int,
    sep: int,
    out: NDArray[np.int64],
    types: NDArray[np.int64] | None = None,
) -> None:
    """Write [CLS], word pieces and [SEP] of int64 [B] ``rows`` into int64 [Nt] ``out``.

    Args:
        dataset: the opened dataset.
        rows: rows of the texts store.
        cu_text: int32 [B+1], cumulative lengths with the two special tokens.
        cls: id of [CLS]; sep: id of [SEP].
        out: int64 [Nt].
        types: int64 [Nt], for the type of each token; [CLS] has that of the first word piece, [SEP] of the last.

    Raises:
        VlscaleError: a row is damaged.
    """
    starts, stops = cu_text[:-1].astype(np.int64), cu_text[1:].astype(np.int64)
    out[starts] = cls
    out[stops - 1] = sep
    dataset.texts.write_ids(rows, out, starts + 1, types)
    if types is not None:
        types[starts], types[stops - 1] = types[starts + 1], types[stops - 2]


def _cumulative(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    cu = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu[1:])
    return cu
