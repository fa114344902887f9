"""Class probabilities of a batch's masked regions: read by region, only where the objective has masked one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlscale.data.packing import Block
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.data.dataset import Dataset
    from vlscale.data.store import ClassStore


def needs_classes(objective: Any, dataset: Dataset) -> bool:
    """Whether regions of ``dataset`` can be masked for ``objective``, a preparer that reads class probabilities."""
    if not objective.needs_class_probs or dataset.kind == "texts":
        return False
    return dataset.kind == "images" or getattr(objective, "pair_visual_share", 1.0) > 0


def class_probs(datasets: Sequence[Dataset], batch: RaggedBatch, block: Block | None = None) -> Tensor | None:
    """[K, C], probabilities of the regions ``targets["region_positions"]``.

    Args:
        datasets: those that the batch is of; of several, ``targets["source"]`` numbers each example's.
        batch: a prepared batch on the CPU.
        block: where the tensor shall lie; None allocates it.

    Returns:
        Of the stored dtype, the widest of several; None if no dataset has classes.

    Raises:
        VlscaleError: a row is damaged.
    """
    stores = [dataset.classes for dataset in datasets]
    there = [store for store in stores if store is not None]
    if not there:
        return None
    positions = batch.targets["region_positions"]
    rows = batch.region_rows[positions].numpy()
    dtype, classes = np.result_type(*(store.dtype for store in there)), there[0].meta.num_classes
    shape = (len(rows), classes)
    probs = torch.empty(shape, dtype=getattr(torch, dtype.name)) if block is None else block.empty(shape, _torch(dtype))
    if len(datasets) == 1:
        there[0].write_probs(rows, probs.numpy())
        return probs
    source = batch.targets["source"].numpy()[batch.region_owner().numpy()[positions.numpy()]]
    for number in np.unique(source).tolist():
        store = stores[number]
        assert store is not None, datasets[number].name
        _write(store, rows, np.flatnonzero(source == number), probs.numpy())
    return probs


def _write(store: ClassStore, rows: NDArray[np.int64], at: NDArray[np.int64], out: NDArray[Any]) -> None:
    if len(at) == len(rows) and store.dtype == out.dtype:
        store.write_probs(rows, out)
    else:
        out[at] = store.probs(rows[at])


def _torch(dtype: np.dtype[Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype.name)
    return found
