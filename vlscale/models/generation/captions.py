"""Sources of captions: images of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.errors import VlscaleError
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.ragged import cumulative

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset
    from vlscale.data.schema import Vocabulary


def caption_batch(
    dataset: Dataset,
    image_rows: Sequence[int] | NDArray[np.int64],
    max_regions: int,
    vocabulary: Vocabulary | None = None,
) -> UnimoBatch:
    """Images whose captions are to be generated, each with the empty text [CLS] [SEP].

    That is the source of a whole caption in pre-training, where every word piece of a pair's text may be a fragment
    that was taken out. A model that was fine-tuned on images without a text wants them without it.

    Args:
        dataset: where the images are.
        image_rows: B rows of its images store, at least one.
        max_regions: the first n regions of an image are used, as in training.
        vocabulary: of the model; by default that of the dataset's texts.

    Returns:
        The batch, on the CPU, features in the dtype that they are stored in.

    Raises:
        VlscaleError: there is no such row, or no row is given; ``max_regions`` is below 1; the dataset has no images;
            it has no texts, and no vocabulary is given; the store is damaged.
    """
    rows = np.asarray(image_rows)
    where, images = f"caption_batch, dataset {dataset.name!r}", dataset.images
    if rows.ndim != 1 or not rows.size or rows.dtype.kind not in "iu":
        raise VlscaleError(f"{where}: image_rows is {rows.dtype} {list(rows.shape)}; give at least one row number")
    outside = rows[(rows < 0) | (rows >= len(images))]
    if outside.size:
        raise VlscaleError(f"{where}: there is no image row {outside[0]}; give rows 0 to {len(images) - 1}")
    if max_regions < 1:
        raise VlscaleError(f"{where}: max_regions is {max_regions}; give at least 1")
    rows = rows.astype(np.int64)
    features, boxes, counts, region_rows = images.regions(rows, max_regions)
    vocabulary = vocabulary or dataset.texts.meta.vocabulary
    each = torch.arange(len(rows))
    return UnimoBatch(
        task="unified",
        dataset=dataset.name,
        input_ids=torch.tensor([vocabulary.cls, vocabulary.sep]).repeat(len(rows)),
        cu_text=cumulative(torch.full_like(each, 2)),
        features=torch.from_numpy(features),
        boxes=torch.from_numpy(boxes),
        cu_regions=cumulative(torch.from_numpy(counts)),
        passes=torch.zeros_like(each),
        examples=each,
        images=torch.from_numpy(rows),
        group=each.int(),
        region_rows=torch.from_numpy(region_rows),
    )
