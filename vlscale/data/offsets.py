"""Offsets: where each row's part begins in a packed array, without holding one number per row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlscale.data.chunks import slices

STRIDE = 64
"""Rows per number held: a hundred million rows need 12 MB, and a look-up adds up at most 63 lengths."""

CHUNK = STRIDE << 14


class Offsets:
    """The running sum of ``lengths``, from 0, as an array [M+1] would hold it.

    Args:
        lengths: int [M], each at least 0; memory-mapped arrays are read once, a chunk at a time.
    """

    def __init__(self, lengths: NDArray[Any]) -> None:
        self._lengths = lengths
        self._coarse = np.zeros(len(lengths) // STRIDE + 2, np.int64)
        for part in slices(len(lengths), CHUNK):
            sums = np.add.reduceat(lengths[part], np.arange(0, part.stop - part.start, STRIDE), dtype=np.int64)
            first = part.start // STRIDE + 1
            self._coarse[first : first + len(sums)] = sums
        np.cumsum(self._coarse, out=self._coarse)

    def __len__(self) -> int:
        """M + 1."""
        return len(self._lengths) + 1

    @property
    def total(self) -> int:
        """Sum of all lengths."""
        return int(self[len(self._lengths)])

    def __getitem__(self, rows: Any) -> Any:
        """Return int64 offsets of int [...] ``rows`` in 0..M, in their shape, or of a slice.

        Raises:
            IndexError: a row is outside 0..M.
        """
        if isinstance(rows, slice):
            begin, end, step = rows.indices(len(self))
            if step == 1 and end > begin:  # a running sum is sixty times less work
                return np.cumsum(np.append(self[np.array([begin])], self._lengths[begin : end - 1]), dtype=np.int64)
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() > len(self._lengths)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} are not all in 0..{len(self._lengths)}")
        block = wanted // STRIDE
        places = (block * STRIDE)[..., None] + np.arange(STRIDE)
        before = places < wanted[..., None]
        if not len(self._lengths):
            return self._coarse[block]
        rest = np.where(before, self._lengths[np.minimum(places, len(self._lengths) - 1)], 0)
        return self._coarse[block] + rest.sum(-1, dtype=np.int64)
