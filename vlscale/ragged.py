"""RaggedBatch: packed sequences with cumulative lengths, the one currency between data, models and objectives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RaggedBatch:
    """A micro-batch of B examples, each a text of t_i tokens with an image of r_i regions, without any padding.

    ``Nt = sum(t_i)`` and ``Nr = sum(r_i)``. Either modality may be absent from an example (t_i = 0 or r_i = 0).

    Attributes:
        task: name of the objective that this batch is for (``mlm``, ``mrfr``, ``mrc``, ``mrckl``, ``itm``).
        dataset: name of the dataset that the examples come from; keys the random draws.
        input_ids: int64 [Nt], word pieces including [CLS] and [SEP], masked where the objective says so; a text of
            several segments has a [SEP] after each.
        cu_text: int32 [B+1], cumulative text lengths; text i is ``input_ids[cu_text[i]:cu_text[i+1]]``.
        features: [Nr, D], region features in the dtype they are stored in (float16 or float32), which a model casts to
            its own; zero at masked regions.
        boxes: float32 [Nr, 4], (x1, y1, x2, y2) in 0..1 of the image's width and height.
        cu_regions: int32 [B+1], cumulative region counts.
        passes: int64 [B], how many times the dataset had been gone through before this example was drawn.
        examples: int64 [B], text row of each example; (dataset, pass, example) keys every random draw.
        images: int64 [B], image row whose regions are used (the partner's, for a replaced image); -1 for none.
        group: int32 [B], examples of one group stay in one micro-batch (pair losses are taken within a group).
        region_rows: int64 [Nr], row of each region in the class-probability store.
        region_mask: bool [Nr] or None; True where the region is masked (its feature is zero, its box is visible).
        text_types: int64 [Nt] or None (all 0): types of the texts' segments (VCR: question 0, answer 2, rationale 3).
        region_types: int64 [Nr] or None (all 1).
        targets: tensors that only the objective reads (see each objective's ``prepare``).
        weight: 1.0, or 0.0 for an empty slot, whose loss and counts do not enter the step.
        max_joint: tokens of the longest example, noted when a batch leaves the CPU; read it as ``longest``.
        max_text, max_regions: the longest text and the most regions of one image, noted at the same time.
    """

    task: str
    dataset: str
    input_ids: Tensor
    cu_text: Tensor
    features: Tensor
    boxes: Tensor
    cu_regions: Tensor
    passes: Tensor
    examples: Tensor
    images: Tensor
    group: Tensor
    region_rows: Tensor
    region_mask: Tensor | None = None
    text_types: Tensor | None = None
    region_types: Tensor | None = None
    targets: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 1.0
    max_joint: int | None = None
    max_text: int | None = None
    max_regions: int | None = None

    def __len__(self) -> int:
        """Number of examples B."""
        return self.cu_text.numel() - 1

    @property
    def text_lengths(self) -> Tensor:
        """int32 [B], tokens of each text including specials."""
        return self.cu_text.diff()

    @property
    def region_counts(self) -> Tensor:
        """int32 [B], regions of each example."""
        return self.cu_regions.diff()

    @property
    def cu_joint(self) -> Tensor:
        """int32 [B+1], cumulative lengths of text and regions together."""
        return self.cu_text + self.cu_regions

    @property
    def longest(self) -> int:
        """Tokens (text and regions) of the longest example; for a batch moved by :meth:`to`, without a device sync."""
        if self.max_joint is not None:
            return self.max_joint
        return int(self.cu_joint.diff().max()) if len(self) else 0

    @property
    def tokens(self) -> int:
        """Real tokens: text tokens and regions together, the unit that budgets are counted in."""
        return self.input_ids.numel() + self.boxes.shape[0]

    def text_owner(self) -> Tensor:
        """int64 [Nt], the example that each text token belongs to."""
        return owners(self.cu_text, self.input_ids.numel())

    def region_owner(self) -> Tensor:
        """int64 [Nr], the example that each region belongs to."""
        return owners(self.cu_regions, self.boxes.shape[0])

    def map(self, function) -> RaggedBatch:
        """Return a copy with ``function`` applied to every tensor."""
        changed = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = function(value)
            elif item.name == "targets":
                changed[item.name] = {key: function(tensor) for key, tensor in value.items()}
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device | str) -> RaggedBatch:
        """Return the batch on ``device``; copies from pinned memory do not block."""
        moved = self.map(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.cu_text.device.type == "cpu" or not len(self):
            return moved
        text, regions = int(self.text_lengths.max()), int(self.region_counts.max())
        return dataclasses.replace(moved, max_joint=self.longest, max_text=text, max_regions=regions)

    def pin_memory(self) -> RaggedBatch:
        """Return the batch in page-locked memory (called by the loader)."""
        return self.map(lambda tensor: tensor.pin_memory())


def owners(cu: Tensor, total: int) -> Tensor:
    """Return int64 [total], the index of the segment of ``cu`` ([B+1], cumulative lengths) each position falls in."""
    counts = cu.diff().long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=cu.device), counts, output_size=total)


def cumulative(lengths: Tensor) -> Tensor:
    """Return int32 [B+1] cumulative lengths, starting with 0, of int [B] ``lengths``."""
    cu = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu[1:])
    return cu
