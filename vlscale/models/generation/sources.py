"""What texts are generated from: a batch without the targets that it may hold, and what a host knows of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.generation.settings import TargetPositions
from vlscale.models.unimo_batch import JointSizes, UnimoBatch
from vlscale.ragged import RaggedBatch, cumulative, owners

_OF_TEXT = ("text_positions", "text_types", "role_ids", "turn_ids")


@dataclass(frozen=True)
class Sources:
    """B sources on the device, and their sizes on the host.

    Attributes:
        batch: texts end after their ``prefix_len`` tokens, which is None; its sizes are noted.
        lengths: positions of each, image and tags included.
        texts: text tokens of each.
        first: int64 [B], position of the first token of each generated text.
        last_first: the largest of them.
    """

    batch: UnimoBatch
    lengths: list[int]
    texts: list[int]
    first: Tensor
    last_first: int

    @classmethod
    def read(cls, batch: RaggedBatch, positions: TargetPositions = "restart", first_position: int = 0) -> Sources:
        """Cut the targets off. The device is waited for here, once, to learn all sizes.

        Args:
            batch: on any device.
            positions: how generated texts count theirs; see ``GenerationSettings.target_positions``.
            first_position: of the model.

        Raises:
            VlscaleError: a ``prefix_len`` is negative or longer than its text, or there is not one for each text.
        """
        batch = UnimoBatch.of(batch)
        whole_B = batch.text_lengths.long()
        if batch.prefix_len is not None and batch.prefix_len.shape != whole_B.shape:
            raise VlscaleError(
                f"generate, dataset {batch.dataset!r}: prefix_len is {list(batch.prefix_len.shape)}, the batch has "
                f"{whole_B.numel()} texts; give one number for each"
            )
        kept_B = whole_B if batch.prefix_len is None else batch.prefix_len.long()
        first_B = _first_positions(batch, kept_B, positions, first_position)
        asked = torch.stack([whole_B, kept_B, batch.region_counts.long(), batch.tag_counts.long(), first_B])
        whole, texts, regions, tags, first = asked.tolist()
        _check_prefixes(batch.dataset, whole, texts)
        lengths = [(r > 0) + r + tag + text for r, tag, text in zip(regions, tags, texts, strict=True)]
        longest = max(lengths, default=0)
        source = replace(
            batch if batch.prefix_len is None else _without_targets(batch, kept_B, sum(texts)),
            sizes=JointSizes(sum(r > 0 for r in regions), sum(text > 0 for text in texts), 0, longest, 0),
            max_joint=longest,
            max_text=max(texts, default=0),
            max_regions=max(regions, default=0),
        )
        return cls(source, lengths, texts, first_B, max(first, default=0))


def _first_positions(batch: UnimoBatch, kept_B: Tensor, kind: TargetPositions, first_position: int) -> Tensor:
    if kind == "restart":
        return torch.full_like(kept_B, first_position)
    if kind == "reference":
        return kept_B
    if batch.text_positions is None or not batch.text_positions.numel():
        return kept_B + first_position
    last_B = (batch.cu_text[:-1].long() + kept_B - 1).clamp(0, batch.text_positions.numel() - 1)
    return torch.where(kept_B > 0, batch.text_positions.index_select(0, last_B) + 1, first_position)


def _check_prefixes(dataset: str, whole: list[int], kept: list[int]) -> None:
    for example, (tokens, prefix) in enumerate(zip(whole, kept, strict=True)):
        if not 0 <= prefix <= tokens:
            raise VlscaleError(
                f"generate, dataset {dataset!r}: prefix_len of example {example} is {prefix}, its text has {tokens} "
                f"tokens; give 0 to {tokens}"
            )


def _without_targets(batch: UnimoBatch, kept_B: Tensor, total: int) -> UnimoBatch:
    cu = cumulative(kept_B)
    moved_B = (batch.cu_text[:-1] - cu[:-1]).long()
    kept = torch.arange(total, device=cu.device) + moved_B.index_select(0, owners(cu, total))
    given = {name: value for name in _OF_TEXT if (value := getattr(batch, name)) is not None}
    return replace(
        batch,
        input_ids=batch.input_ids.index_select(0, kept),
        cu_text=cu,
        **{name: value.index_select(0, kept) for name, value in given.items()},
        prefix_len=None,
    )
