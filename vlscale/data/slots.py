"""Slots: a loader's shared memory, allocated once and used again for batch after batch.

Fresh shared memory is slow: the kernel clears every page and enters it into a page table at first touch, which makes
the first copy into a block several times slower than the next one. So a loader keeps a fixed number of equal slots in
one allocation. Reader processes write batches into them; the training process uses them where they lie.

A slot is free again when the last tensor that looks into it is gone. Whoever keeps a batch keeps its slot: it is never
overwritten. When no slot is free, or a batch is larger than one, the batch travels in a block of its own.

The memory has no name: nothing can be left behind in /dev/shm, and its size does not depend on that of /dev/shm. With
``pin`` it is page-locked, so that workers write into memory that the GPU reads by itself.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import deque
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_BYTES = 4 << 30
"""Most memory that one loader's slots may take."""


class Slots:
    """``count`` slots of ``size`` bytes each; fewer, perhaps none, where they would exceed :data:`MAX_BYTES`.

    It may be sent to a child process that is being started; there, slots can be written but not lent.

    Args:
        count: number of slots.
        size: bytes of a slot, rounded up to whole pages. Pages are taken when they are first touched.
        pin: page-lock the memory for CUDA, all of it at once.

    Attributes:
        count, size: as granted.
        pinned: whether the memory is page-locked; it is not where the driver refuses.
    """

    def __init__(self, count: int, size: int, pin: bool = False) -> None:
        self.size = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.count = max(0, min(count, MAX_BYTES // self.size))
        self._descriptor = _nameless(max(self.count * self.size, mmap.PAGESIZE))
        weakref.finalize(self, os.close, self._descriptor)
        self._memory = self._map(self._descriptor)
        self.pinned = pin and self.count > 0 and _page_lock(self._memory)
        self._free = deque(reversed(range(self.count)))

    def _map(self, descriptor: int) -> NDArray[np.uint8]:
        return np.frombuffer(mmap.mmap(descriptor, max(self.count * self.size, mmap.PAGESIZE)), np.uint8)

    def acquire(self) -> int | None:
        """Take a free slot; None if there is none."""
        try:
            return self._free.pop()  # the last one used: it may still be in the cache, and the others stay untouched
        except IndexError:
            return None

    def release(self, slot: int) -> None:
        """Give back a slot that was taken and is not lent."""
        self._free.append(slot)  # a deque's ends are safe for threads, and the last tensor may die in any of them

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def write(self, slot: int) -> Tensor:
        """Return uint8 [size], the memory of a slot that was taken; whoever took it sees to its life."""
        return torch.from_numpy(self._part(slot))

    def lend(self, slot: int) -> Tensor:
        """Return the memory of a slot; it becomes free when the tensor and all its views are gone."""
        part = self._part(slot)
        # PyTorch's storage holds the array for as long as any tensor looks into it.
        weakref.finalize(part, self.release, slot).atexit = False
        return torch.from_numpy(part)

    def _part(self, slot: int) -> NDArray[np.uint8]:
        return self._memory[slot * self.size : (slot + 1) * self.size]

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "count": self.count, "descriptor": reduction.DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.size, self.count = state["size"], state["count"]
        descriptor = state["descriptor"].detach()
        self._memory = self._map(descriptor)  # which holds a descriptor of its own
        os.close(descriptor)
        self.pinned = False
        self._free = deque()


def _nameless(size: int) -> int:
    """Open ``size`` bytes of shared memory that no other process can find."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("vlscale", os.MFD_CLOEXEC)
    else:
        descriptor, name = tempfile.mkstemp(prefix="vlscale-")
        os.unlink(name)
    os.ftruncate(descriptor, size)
    return descriptor


def _page_lock(memory: NDArray[np.uint8]) -> bool:
    address = memory.ctypes.data
    runtime = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        return False
    weakref.finalize(memory, _unlock, address).atexit = False  # runs before the memory is unmapped
    return True


def _unlock(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
