"""Packing: a batch travels from a reader process as one block of shared memory, however many tensors it holds.

One block means one file descriptor per batch in flight and one pinned copy, instead of some fifteen of each.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlscale.ragged import RaggedBatch

_ALIGN = 64


@dataclass
class PackedBatch:
    """A RaggedBatch whose tensors lie one after the other in one uint8 buffer.

    Attributes:
        buffer: uint8 [bytes].
        layout: (field, key in targets or None, dtype, shape, first byte) per tensor.
        others: the fields that are no tensors.
    """

    buffer: Tensor
    layout: list[tuple[str, str | None, torch.dtype, tuple[int, ...], int]]
    others: dict[str, Any]

    @classmethod
    def pack(cls, batch: RaggedBatch) -> PackedBatch:
        """Copy the tensors of ``batch`` into one block of shared memory."""
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
        layout, size = [], 0
        for name, key, tensor in tensors:
            layout.append((name, key, tensor.dtype, tuple(tensor.shape), size))
            size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        packed = cls(torch.empty(size, dtype=torch.uint8).share_memory_(), layout, others)
        for (_, _, tensor), view in zip(tensors, packed._views(), strict=True):
            view.copy_(tensor)
        return packed

    def unpack(self) -> RaggedBatch:
        """Return the batch; its tensors are views of the buffer."""
        fields: dict[str, Any] = {**self.others, "targets": {}}
        for (name, key, *_), view in zip(self.layout, self._views(), strict=True):
            if key is None:
                fields[name] = view
            else:
                fields["targets"][key] = view
        return RaggedBatch(**fields)

    def pin_memory(self) -> PackedBatch:
        """Return the same in page-locked memory (called by PyTorch's loader)."""
        return dataclasses.replace(self, buffer=self.buffer.pin_memory())

    def _views(self) -> list[Tensor]:
        return [
            self.buffer[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for _, _, dtype, shape, begin in self.layout
        ]
