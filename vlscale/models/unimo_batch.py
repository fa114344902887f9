"""UNIMO's batch: what a RaggedBatch holds, with object tags, targets that are generated, and where everything lies.

The joint order of an example is [image | object tags | text], the image being its global slot [IMG] and its regions.
An image without a region has no slot: the example is text only. Nothing is padded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from vlscale.models.layers import Visibility
from vlscale.ragged import RaggedBatch, cumulative, owners


@dataclass(frozen=True)
class JointSizes:
    """Numbers that index tensors are laid out with; on a GPU they must be known without asking the device.

    Attributes:
        images: examples that have regions.
        texts: examples that have a text.
        targets: text tokens of all targets.
        longest_source: positions of the longest source, image and tags included.
        longest_target: tokens of the longest target.
    """

    images: int
    texts: int
    targets: int
    longest_source: int
    longest_target: int


@dataclass
class UnimoBatch(RaggedBatch):
    """A RaggedBatch with what UNIMO knows beside it. Everything here may be left out.

    Attributes:
        tag_ids: int64 [No], word pieces of the objects' names, between image and text.
        cu_tags: int32 [B+1], cumulative counts of them.
        prefix_len: int32 [B], text tokens that belong to the source; those after them are the target, which sees the
            source and what precedes it, and which the source does not see. None: no example has a target, everything
            sees everything. 0 with an image: a caption is generated.
        text_positions: int64 [Nt], rows of the position table; by default each text counts from the first position.
        tag_positions: int64 [No], likewise.
        role_ids: int64 [Nt], who speaks (dialogue).
        turn_ids: int64 [Nt], how many turns ago (dialogue).
        sizes: noted when a batch leaves the CPU.
    """

    tag_ids: Tensor | None = None
    cu_tags: Tensor | None = None
    prefix_len: Tensor | None = None
    text_positions: Tensor | None = None
    tag_positions: Tensor | None = None
    role_ids: Tensor | None = None
    turn_ids: Tensor | None = None
    sizes: JointSizes | None = None

    @classmethod
    def of(cls, batch: RaggedBatch) -> UnimoBatch:
        """The batch itself, or a RaggedBatch without tags and targets as one."""
        if isinstance(batch, UnimoBatch):
            return batch
        return cls(**{item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)} | {"max_joint": None})

    @property
    def tag_counts(self) -> Tensor:
        """int32 [B], tag tokens of each example."""
        return torch.zeros_like(self.text_lengths) if self.cu_tags is None else self.cu_tags.diff()

    @property
    def image_slots(self) -> Tensor:
        """int32 [B], 1 where an example has an image and with it the slot [IMG]."""
        return (self.region_counts > 0).int()

    @property
    def cu_joint(self) -> Tensor:
        """int32 [B+1], cumulative lengths of image, tags and text together."""
        lengths = self.image_slots + self.region_counts + self.tag_counts + self.text_lengths
        return cumulative(lengths)

    @property
    def tokens(self) -> int:
        """Real positions: the slots [IMG], regions, tags and text tokens."""
        tags = 0 if self.tag_ids is None else self.tag_ids.numel()
        return super().tokens + tags + self.measured.images

    @property
    def target_lengths(self) -> Tensor:
        """int32 [B], text tokens that are generated."""
        return torch.zeros_like(self.text_lengths) if self.prefix_len is None else self.text_lengths - self.prefix_len

    @property
    def measured(self) -> JointSizes:
        """The noted sizes, or those of the tensors (which waits for a GPU)."""
        if self.sizes is not None:
            return self.sizes
        targets = self.target_lengths
        sources = self.cu_joint.diff() - targets
        return JointSizes(
            int(self.image_slots.sum()),
            int((self.text_lengths > 0).sum()),
            int(targets.sum()),
            int(sources.max()) if len(self) else 0,
            int(targets.max()) if len(self) else 0,
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on ``device``, its sizes noted; copies from pinned memory do not block."""
        moved = RaggedBatch.to(dataclasses.replace(self, sizes=self.measured), device)
        assert isinstance(moved, type(self))
        return moved


@dataclass(frozen=True)
class JointLayout:
    """Where the parts of a batch lie among its N packed positions.

    Attributes:
        batch: the batch.
        sizes: its sizes.
    """

    batch: UnimoBatch
    sizes: JointSizes

    @cached_property
    def cu(self) -> Tensor:
        """int32 [B+1], cumulative joint lengths."""
        return self.batch.cu_joint

    @cached_property
    def image_examples(self) -> Tensor:
        """int64 [Bi], the examples that have an image."""
        return owners(self._cu_slots, self.sizes.images)

    @cached_property
    def image_rows(self) -> Tensor:
        """int64 [Bi + Nr], the rows of images: [IMG] and regions of the first, of the second, ..."""
        return _rows(self.cu_images, self.sizes.images + self.batch.boxes.shape[0], self._start)

    @cached_property
    def cu_images(self) -> Tensor:
        """int32 [B+1], cumulative lengths of images, the slots [IMG] with them."""
        return self.batch.cu_regions + self._cu_slots

    @cached_property
    def slots(self) -> Tensor:
        """int64 [Bi], where in the images' rows the slots [IMG] are."""
        before = self.batch.cu_regions.long().index_select(0, self.image_examples)
        return before + torch.arange(self.sizes.images, device=before.device)

    @cached_property
    def regions(self) -> Tensor:
        """int64 [Nr], where in the images' rows the regions are."""
        owner = self.batch.region_owner()
        return torch.arange(owner.numel(), device=owner.device) + self._cu_slots.long()[1:].index_select(0, owner)

    @cached_property
    def tag_rows(self) -> Tensor:
        """int64 [No], the rows of tags."""
        if self.batch.tag_ids is None or self.batch.cu_tags is None:
            return self._start.new_zeros(0)
        offset = self._start + self.batch.image_slots + self.batch.region_counts
        return _rows(self.batch.cu_tags, self.batch.tag_ids.numel(), offset)

    @cached_property
    def first_text(self) -> Tensor:
        """int64 [B], the row of each text's first token, where there is a text."""
        return self._start + self.batch.image_slots + self.batch.region_counts + self.batch.tag_counts

    @cached_property
    def text_rows(self) -> Tensor:
        """int64 [Nt], the rows of text tokens."""
        return _rows(self.batch.cu_text, self.batch.input_ids.numel(), self.first_text)

    @cached_property
    def visibility(self) -> Visibility | None:
        """Which rows see which; None if all rows of an example see each other."""
        if self.batch.prefix_len is None:
            return None
        targets = self.batch.target_lengths
        sources = self.cu.diff() - targets
        cu_source, cu_target = cumulative(sources), cumulative(targets)
        source_rows = _rows(cu_source, self.batch.tokens - self.sizes.targets, self._start)
        target_rows = _rows(cu_target, self.sizes.targets, self._start + sources)
        return Visibility(
            source_rows, cu_source, self.sizes.longest_source, target_rows, cu_target, self.sizes.longest_target
        )

    @cached_property
    def _cu_slots(self) -> Tensor:
        return cumulative(self.batch.image_slots)

    @cached_property
    def _start(self) -> Tensor:
        return self.cu[:-1].long()


def _rows(cu: Tensor, total: int, offset_B: Tensor) -> Tensor:
    """int64 [total]: the m-th of example i's positions is row ``offset_B[i] + m``."""
    owner = owners(cu, total)
    within = torch.arange(total, device=cu.device) - cu.long().index_select(0, owner)
    return within + offset_B.long().index_select(0, owner)
