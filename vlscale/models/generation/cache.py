"""Keys and values that are kept, as a pool of rows that grows, and which of them a hypothesis sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlscale.models.encoder import Encoder, EncoderLayer
from vlscale.models.layers import Continuation
from vlscale.ragged import cumulative, owners


class KeyValueCache:
    """Keys and values of every layer, one row per position, packed.

    A source's rows are kept once, whatever the number of its hypotheses. A generated token has one row, and hypotheses
    name the rows that they are made of in a table, so that choosing among beams moves row numbers, never keys. Rows of
    hypotheses that were dropped stay until the end: there are at most as many as tokens were ever run.

    Args:
        encoder: whose layers' keys and values are kept.
        lengths: rows of each example's source.
        hypotheses: per example.
        like: decides dtype and device.
    """

    def __init__(self, encoder: Encoder, lengths: Sequence[int], hypotheses: int, like: Tensor) -> None:
        self._lengths = [*lengths]
        self._hypotheses = hypotheses
        device = like.device
        self._of_source = torch.tensor(self._lengths, device=device)
        self._begin = self._of_source.cumsum(0) - self._of_source
        self._used = sum(self._lengths)
        self._table = torch.zeros(len(self._lengths) * hypotheses, 0, dtype=torch.int64, device=device)
        self.layers = [self._allocate(layer, self._used, like) for layer in encoder.layers]

    @staticmethod
    def _allocate(layer: torch.nn.Module, rows: int, like: Tensor) -> Tensor:
        assert isinstance(layer, EncoderLayer)
        heads = layer.attention.heads
        kind = like.device.type  # projections have autocast's dtype where it is on
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return like.new_empty(rows, 2, heads, like.shape[1] // heads, dtype=dtype)

    @property
    def generated(self) -> int:
        """Tokens that every hypothesis has so far."""
        return self._table.shape[1]

    def source(self) -> Continuation:
        """All sources at once: their rows fill the cache, and those of an example see each other."""
        rows = torch.arange(self._used, device=self._table.device)
        cu = cumulative(self._of_source)
        longest = max(self._lengths)
        return Continuation(rows, None, cu, longest, cu, longest)

    def reorder(self, parents_R: Tensor) -> None:
        """Let hypothesis r be what hypothesis ``parents_R[r]`` (int64 [R], over all examples) was."""
        self._table = self._table.index_select(0, parents_R)

    def step(self, live_L: Tensor, examples: Sequence[int]) -> Continuation:
        """One new token for some hypotheses.

        Args:
            live_L: int64 [L], which ones.
            examples: the example of each, on the host: how many rows they see must be known without asking the device.
        """
        device, count, before = self._table.device, live_L.numel(), self.generated
        slots = torch.arange(self._used, self._used + count, device=device)
        self._reserve(count)
        column = torch.zeros_like(self._table[:, 0]) if before else self._table.new_zeros(self._table.shape[0])
        self._table = torch.cat([self._table, column.index_copy(0, live_L, slots)[:, None]], 1)
        example_L = torch.div(live_L, self._hypotheses, rounding_mode="floor")
        source_L = self._of_source.index_select(0, example_L)
        sizes = [self._lengths[example] + before + 1 for example in examples]
        cu_seen, total = cumulative(source_L + (before + 1)), sum(sizes)
        owner = owners(cu_seen, total)
        within = torch.arange(total, device=device) - cu_seen.long().index_select(0, owner)
        generated = within - source_L.index_select(0, owner)
        of_source = self._begin.index_select(0, example_L).index_select(0, owner) + within
        of_table = self._table[live_L.index_select(0, owner), generated.clamp(min=0)]
        seen = torch.where(generated < 0, of_source, of_table)
        cu_new = torch.arange(count + 1, dtype=torch.int32, device=device)
        return Continuation(slots, seen, cu_new, 1, cu_seen, max(sizes))

    def share(self, hypotheses: int) -> None:
        """Give every example so many hypotheses, all equal to its only one."""
        rows = torch.arange(len(self._lengths), device=self._table.device).repeat_interleave(hypotheses)
        self._table, self._hypotheses = self._table.index_select(0, rows), hypotheses

    def _reserve(self, rows: int) -> None:
        """Make room, doubling what there is so that copies stay rare."""
        self._used += rows
        for index, layer in enumerate(self.layers):
            if layer.shape[0] < self._used:
                grown = layer.new_empty(max(self._used, 2 * layer.shape[0]), *layer.shape[1:])
                grown[: layer.shape[0]] = layer
                self.layers[index] = grown
