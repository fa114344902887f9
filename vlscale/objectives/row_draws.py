"""Random numbers for the rows of a batch that come from several datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.data.random import Draws
from vlscale.data.views import parted
from vlscale.errors import VlscaleError
from vlscale.ragged import RaggedBatch


@dataclass(frozen=True, eq=False)
class RowDraws:
    """What is drawn for a row depends on (seed, its dataset, purpose, pass, example, index), never on the other rows.

    Attributes:
        draws: one per dataset of the step.
        source: int64 [B], which of them a row is of.
        passes: int64 [B]; examples: int64 [B], the keys of the rows.
    """

    draws: Sequence[Draws]
    source: NDArray[np.int64]
    passes: NDArray[np.int64]
    examples: NDArray[np.int64]

    @classmethod
    def of(cls, batch: RaggedBatch, draws: Sequence[Draws]) -> RowDraws:
        """Those of the rows of a unified batch on the CPU.

        Raises:
            VlscaleError: a row's source (``targets["source"]``) is none of the datasets.
        """
        source = batch.targets["source"].numpy()
        if source.size and not 0 <= source.min() <= source.max() < len(draws):
            raise VlscaleError(
                f"dataset {batch.dataset!r}: a row's source is {source[(source < 0) | (source >= len(draws))][0]}, the "
                f"step has {len(draws)} datasets; give prepare_views one Draws for each"
            )
        return cls(draws, source, batch.passes.numpy(), batch.examples.numpy())

    def uniform(self, purpose: str, rows: NDArray[np.int64], index: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Return float64 [n, 4], uniform in [0, 1), for int64 [n] rows and one index or one per row."""
        found = np.empty((len(rows), 4))
        index = np.broadcast_to(np.asarray(index, np.int64), rows.shape)
        source = self.source[rows]
        for number in np.unique(source):
            mine = source == number
            of_rows = rows[mine]
            found[mine] = self.draws[number].uniform(purpose, self.passes[of_rows], self.examples[of_rows], index[mine])
        return found


def named_row(batch: RaggedBatch, row: int) -> str:
    """Return ``dataset pairs, pass 0, example 17``: where a row of a batch on the CPU comes from."""
    names = parted(batch.dataset)
    source = int(batch.targets["source"][row]) if "source" in batch.targets else 0
    name = names[source] if 0 <= source < len(names) else batch.dataset
    return f"dataset {name}, pass {int(batch.passes[row])}, example {int(batch.examples[row])}"
