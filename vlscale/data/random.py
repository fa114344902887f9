"""Counter-based randomness: every draw that touches an example is a pure function of what it is for.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised over NumPy
arrays. The key is a hash of (seed, dataset, purpose); the counter is (example, pass, index). No state is kept, so
the same example gets the same mask on any rank, in any worker, on any world size, and after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int], rounds: int = 10) -> NDArray[np.uint32]:
    """Return uint32 [..., 4] random words for uint32 [..., 4] ``counter`` under a two-word ``key``."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _HALF) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


class Draws:
    """Random numbers for the examples of one dataset under one seed.

    Args:
        seed: the recipe's seed.
        dataset: the dataset's name, or ``""`` for draws that belong to no dataset (the task of a step).
    """

    def __init__(self, seed: int, dataset: str = "") -> None:
        self.seed = seed
        self.dataset = dataset
        self._keys: dict[str, tuple[int, int]] = {}

    def _key(self, purpose: str) -> tuple[int, int]:
        if purpose not in self._keys:
            digest = hashlib.blake2b(f"{self.seed}\0{self.dataset}\0{purpose}".encode(), digest_size=8).digest()
            self._keys[purpose] = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        return self._keys[purpose]

    def bits(self, purpose: str, passes: ArrayLike, examples: ArrayLike, index: ArrayLike = 0) -> NDArray[np.uint32]:
        """Return uint32 [..., 4] for the broadcast of ``passes``, ``examples`` and ``index`` (token, region, trial)."""
        passes, examples, index = np.broadcast_arrays(
            np.asarray(passes, np.uint64), np.asarray(examples, np.uint64), np.asarray(index, np.uint64)
        )
        counter = np.stack([examples & _LOW, examples >> _HALF, passes & _LOW, index & _LOW], axis=-1)
        return philox4x32(counter.astype(np.uint32), self._key(purpose))

    def uniform(
        self, purpose: str, passes: ArrayLike, examples: ArrayLike, index: ArrayLike = 0
    ) -> NDArray[np.float64]:
        """Return float64 [..., 4], four independent uniform numbers in [0, 1) per counter."""
        return self.bits(purpose, passes, examples, index) * 2.0**-32

    def below(
        self, purpose: str, bound: ArrayLike, passes: ArrayLike, examples: ArrayLike, index: ArrayLike = 0
    ) -> NDArray[np.int64]:
        """Return int64 [...], uniform in [0, bound): 64 random bits per draw, so the bias is below 2**-32."""
        words = self.bits(purpose, passes, examples, index).astype(np.uint64)
        wide = (words[..., 0] << _HALF) | words[..., 1]
        return (wide % np.asarray(bound, np.uint64)).astype(np.int64)
