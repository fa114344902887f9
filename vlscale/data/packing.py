"""Packing: a batch travels from a reader process as one block of memory, however many tensors it holds.

Where a loader has a free slot (see :mod:`~vlscale.data.slots`), the batch is laid out in it from the start, and packing
only notes where everything lies. Otherwise its tensors are copied into one fresh block of shared memory: one file
descriptor per batch in flight, instead of some fifteen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlscale.ragged import RaggedBatch

_ALIGN = 64


class Block:
    """Memory in which the tensors of one batch are laid out one after the other, each at a multiple of 64 bytes.

    Args:
        buffer: uint8 [bytes].
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._begin = buffer.data_ptr()
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor inside the block, or outside of it if the block is full."""
        size = math.prod(shape) * dtype.itemsize
        first = self._used
        if first + size > len(self.buffer):
            return torch.empty(tuple(shape), dtype=dtype)
        self._used = first + -(-size // _ALIGN) * _ALIGN
        return self.buffer[first : first + size].view(dtype).view(tuple(shape))

    def place(self, tensor: Tensor) -> int | None:
        """Return the first byte of ``tensor`` in the block, copying it there if need be; None: the block is full."""
        inside = self._inside(tensor)
        if inside is None:
            copied = self.empty(tensor.shape, tensor.dtype)
            copied.copy_(tensor)
            inside = self._inside(copied)
        return inside

    def _inside(self, tensor: Tensor) -> int | None:
        first = tensor.data_ptr() - self._begin
        size = tensor.numel() * tensor.element_size()
        if not size:
            return 0
        inside = first >= 0 and first + size <= len(self.buffer) and first % tensor.element_size() == 0
        return first if inside and tensor.is_contiguous() else None


@dataclass
class PackedBatch:
    """A batch whose tensors lie in one uint8 buffer.

    Attributes:
        buffer: uint8 [bytes]; None where the batch lies in a slot.
        slot: number of the slot, or None.
        layout: (field, key in targets or None, dtype, shape, first byte) per tensor.
        others: the fields that are no tensors.
        kind: the batch's class, which may have more fields than a RaggedBatch.
    """

    buffer: Tensor | None
    slot: int | None
    layout: list[tuple[str, str | None, torch.dtype, tuple[int, ...], int]]
    others: dict[str, Any]
    kind: type[RaggedBatch] = RaggedBatch

    @classmethod
    def pack(cls, batch: RaggedBatch, block: Block | None = None, slot: int | None = None) -> PackedBatch:
        """Put all tensors of ``batch`` into one block.

        Args:
            batch: may lie in ``block`` already, in parts or altogether; what does is not copied.
            block: memory of ``slot``. Without one, or if it is too small, a block of shared memory is made.
            slot: its number.
        """
        tensors, others = _taken_apart(batch)
        if block is not None:
            places = [block.place(tensor) for _, _, tensor in tensors]
            if None not in places:
                return cls(None, slot, _layout(tensors, places), others, type(batch))
        sizes = [-(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN for _, _, tensor in tensors]
        storage = torch.UntypedStorage._new_shared(max(sum(sizes), _ALIGN))
        block = Block(torch.empty(0, dtype=torch.uint8).set_(storage))
        places = [block.place(tensor) for _, _, tensor in tensors]
        return cls(block.buffer, None, _layout(tensors, places), others, type(batch))

    def unpack(self, buffer: Tensor | None = None) -> RaggedBatch:
        """Return the batch; its tensors are views of the buffer, or of ``buffer``, the memory of its slot."""
        buffer = self.buffer if buffer is None else buffer
        assert buffer is not None
        fields: dict[str, Any] = {**self.others, "targets": {}}
        for name, key, dtype, shape, begin in self.layout:
            view = buffer[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            if key is None:
                fields[name] = view
            else:
                fields["targets"][key] = view
        return self.kind(**fields)


def _taken_apart(batch: RaggedBatch) -> tuple[list[tuple[str, str | None, Tensor]], dict[str, Any]]:
    """The tensors of a batch as (field, key in targets or None, tensor), and its other fields."""
    tensors: list[tuple[str, str | None, Tensor]] = []
    others: dict[str, Any] = {}
    for item in dataclasses.fields(batch):
        value = getattr(batch, item.name)
        if item.name == "targets":
            tensors += [("targets", key, tensor) for key, tensor in value.items()]
        elif isinstance(value, Tensor):
            tensors.append((item.name, None, value))
        else:
            others[item.name] = value
    return tensors, others


def _layout(
    tensors: list[tuple[str, str | None, Tensor]], places: list[int | None]
) -> list[tuple[str, str | None, torch.dtype, tuple[int, ...], int]]:
    return [
        (name, key, tensor.dtype, tuple(tensor.shape), place or 0)
        for (name, key, tensor), place in zip(tensors, places, strict=True)
    ]
