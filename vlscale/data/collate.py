"""Collation: the rows of a micro-batch become one packed RaggedBatch, unmasked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.data.deal import MicroBatch
from vlscale.data.lengths import SPECIALS
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset


def collate(dataset: Dataset, micro: MicroBatch, max_regions: int, cls: int, sep: int) -> RaggedBatch:
    """Read the rows of ``micro`` and pack them.

    Args:
        dataset: the opened dataset that ``micro`` names.
        micro: text and image rows; a text row or image row may be a partner's.
        max_regions: the first n regions of an image are used.
        cls: id of [CLS], put in front of each text.
        sep: id of [SEP], put behind each text.

    Returns:
        The batch, with ``targets["itm_labels"]`` int64 [B] (1 match, 0 negative) if the task is itm.

    Raises:
        VlscaleError: a row is damaged (raised by the stores; names store and row).
    """
    words, lengths = dataset.texts.input_ids(micro.texts)
    input_ids, cu_text = add_specials(words, lengths, cls, sep)
    features, boxes, counts, region_rows = dataset.images.regions(micro.images, max_regions)
    batch = RaggedBatch(
        task=micro.task,
        dataset=micro.dataset,
        input_ids=torch.from_numpy(input_ids),
        cu_text=torch.from_numpy(cu_text),
        features=torch.from_numpy(features),
        boxes=torch.from_numpy(boxes),
        cu_regions=torch.from_numpy(_cumulative(counts)),
        passes=torch.from_numpy(micro.passes),
        examples=torch.from_numpy(micro.examples),
        images=torch.from_numpy(micro.images),
        group=torch.from_numpy(micro.group),
        region_rows=torch.from_numpy(region_rows),
        weight=micro.weight,
    )
    if micro.task == "itm":
        batch.targets["itm_labels"] = torch.from_numpy(micro.labels.astype(np.int64))
    return batch


def add_specials(
    words: NDArray[np.int64], lengths: NDArray[np.int32], cls: int, sep: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Put ``cls`` in front of and ``sep`` behind each of B packed texts.

    Args:
        words: int64 [sum(lengths)]; lengths: int [B].

    Returns:
        int64 [sum(lengths) + 2 B] and the int32 [B+1] cumulative lengths of the longer texts.
    """
    cu = _cumulative(lengths + SPECIALS)
    input_ids = np.empty(int(cu[-1]), np.int64)
    is_word = np.ones(len(input_ids), bool)
    is_word[cu[:-1]] = is_word[cu[1:] - 1] = False
    input_ids[cu[:-1]] = cls
    input_ids[cu[1:] - 1] = sep
    input_ids[is_word] = words
    return input_ids, cu


def _cumulative(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    cu = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu[1:])
    return cu
