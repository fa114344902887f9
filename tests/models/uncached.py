"""The rival of the cache: every hypothesis is encoded anew, source and all, for each new token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from vlscale.models.generation import search
from vlscale.models.generation.decoder import Decoder
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.ragged import cumulative


class UncachedDecoder(Decoder):
    """A decoder without memory, for sources of image and text."""

    def begin(self) -> Tensor:
        """Scores of the first new tokens."""
        first = self.settings.bos_token_id
        assert first is not None
        rows = torch.arange(self.size)
        self.ids = torch.full((self.size, 1), first)
        logits = self._anew(rows, self.ids)
        self.ids = self.ids.repeat_interleave(self.hypotheses, 0)
        return logits

    def step(self, tokens_R: Tensor, parents_R: Tensor | None, live: Sequence[int], live_L: Tensor) -> Tensor:
        """Scores of the next tokens of live hypotheses."""
        ids = self.ids if parents_R is None else self.ids.index_select(0, parents_R)
        self.ids = torch.cat([ids, tokens_R[:, None]], 1)
        return self._anew(live_L // self.hypotheses, self.ids.index_select(0, live_L))

    def _anew(self, examples: Tensor, ids_LT: Tensor) -> Tensor:
        batch, new = self.batch, ids_LT.shape[1]
        texts = batch.input_ids.split(batch.text_lengths.tolist())
        features, boxes = (each.split(batch.region_counts.tolist()) for each in (batch.features, batch.boxes))
        chosen = examples.tolist()
        lengths, counts = batch.text_lengths[examples], batch.region_counts[examples]
        nothing = torch.zeros(len(chosen), dtype=torch.int64)
        first = self.model.config.first_position
        positions = [torch.cat([torch.arange(n), torch.arange(new)]) for n in lengths.tolist()]
        whole = UnimoBatch(
            task="uncached",
            dataset="uncached",
            input_ids=torch.cat([torch.cat([texts[i], ids]) for i, ids in zip(chosen, ids_LT, strict=True)]),
            cu_text=cumulative(lengths + new),
            features=torch.cat([features[i] for i in chosen]),
            boxes=torch.cat([boxes[i] for i in chosen]),
            cu_regions=cumulative(counts),
            passes=nothing,
            examples=nothing,
            images=nothing,
            group=nothing.int(),
            region_rows=torch.zeros(int(counts.sum()), dtype=torch.int64),
            text_positions=torch.cat(positions) + first,
            prefix_len=lengths,
        )
        return self.model.mlm_logits(self.model.encode(whole), whole.cu_text[1:].long() - 1)


@contextmanager
def without_cache() -> Iterator[None]:
    """Let ``generate`` decode without a cache."""
    kept = search.Decoder
    search.Decoder = UncachedDecoder  # type: ignore[misc]
    try:
        yield
    finally:
        search.Decoder = kept  # type: ignore[misc]


def without_tags(batch: UnimoBatch) -> UnimoBatch:
    """The batch as sources that :class:`UncachedDecoder` can read."""
    return replace(batch, tag_ids=None, cu_tags=None, region_mask=None, sizes=None)
