"""UNIMO's inputs: words with positions, and image features with boxes, each behind its own LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlscale.models.layers import Embedding, Linear
from vlscale.models.unimo_batch import JointLayout, UnimoBatch
from vlscale.models.unimo_config import UnimoConfig
from vlscale.ragged import owners

LOCATION_WIDTH = 5
WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)
"""The box of the slot [IMG]."""


class UnimoTextEmbedder(nn.Module):
    """``drop(LN(word + position))`` for object tags and texts, with types, roles and turns where a model has them."""

    def __init__(self, config: UnimoConfig) -> None:
        super().__init__()
        width, weights = config.hidden_size, config.weights
        self.first_position = config.first_position
        self.word = Embedding(config.vocab_size, width, weights)
        self.position = Embedding(config.max_position_embeddings, width, weights)
        self.types = Embedding(config.type_vocab_size, width, weights) if config.type_vocab_size else None
        self.roles = Embedding(config.role_vocab_size, width, weights) if config.role_vocab_size else None
        self.turns = Embedding(config.turn_vocab_size, width, weights) if config.turn_vocab_size else None
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, batch: UnimoBatch, delta_NH: Tensor | None = None) -> Tensor:
        """Return [No + Nt, H], tags first.

        Args:
            batch: see :class:`~vlscale.models.unimo_batch.UnimoBatch`.
            delta_NH: [Nt, H], added to the texts' sums before the norm (adversarial training).
        """
        ids = batch.input_ids if batch.tag_ids is None else torch.cat([batch.tag_ids, batch.input_ids])
        tags = ids.numel() - batch.input_ids.numel()
        summed_NH = self.word(ids) + self.position(self.positions(batch))
        if self.types is not None:
            type_ids = torch.zeros_like(batch.input_ids) if batch.text_types is None else batch.text_types
            summed_NH = summed_NH + self.types(_after(type_ids, tags))
        of_text = [
            table(ids_N)
            for table, ids_N in ((self.roles, batch.role_ids), (self.turns, batch.turn_ids))
            if table is not None and ids_N is not None
        ]
        for extra_NH in (*of_text, *([] if delta_NH is None else [delta_NH])):
            summed_NH = summed_NH + _after(extra_NH, tags)
        return self.dropout(self.norm(summed_NH))

    def positions(self, batch: UnimoBatch) -> Tensor:
        """int64 [No + Nt], rows of the position table; those of tags first."""
        parts = []
        if batch.tag_ids is not None and batch.cu_tags is not None:
            parts.append(_or_counted(batch.tag_positions, batch.cu_tags, batch.tag_ids.numel(), self.first_position))
        parts.append(_or_counted(batch.text_positions, batch.cu_text, batch.input_ids.numel(), self.first_position))
        return torch.cat(parts)


class UnimoImageEmbedder(nn.Module):
    """``drop(LN(W f + V g))`` of a feature f and its location g, for the slot [IMG] and every region.

    The slot's feature is the mean of the image's region features, of those that are not masked where some are (a mean
    over all would tell what is hidden), and zero where all are. Its box is the whole image.
    """

    def __init__(self, config: UnimoConfig) -> None:
        super().__init__()
        self.projection = Linear(config.feature_dim, config.hidden_size, config.weights)
        self.location = Linear(LOCATION_WIDTH, config.hidden_size, config.weights)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, batch: UnimoBatch, layout: JointLayout, delta_ND: Tensor | None = None) -> Tensor:
        """Return [Bi + Nr, H]: [IMG] and regions of the first image, of the second, ...

        Args:
            batch: see :class:`~vlscale.models.unimo_batch.UnimoBatch`.
            layout: of the batch.
            delta_ND: [Bi + Nr, D], added to the features (adversarial training), in the order of the result.
        """
        dtype = self.projection.weight.dtype
        features_RD = batch.features.to(dtype if dtype.itemsize >= 4 else torch.float32)
        if not features_RD.shape[0]:  # texts need not come with features of any width
            features_RD = features_RD.new_zeros(0, self.projection.in_features)
        slots_BD = global_features(features_RD, batch, layout)
        order = torch.cat([layout.slots, layout.regions])
        rows_ND = features_RD.new_empty(order.numel(), features_RD.shape[1])
        rows_ND = rows_ND.index_copy(0, order, torch.cat([slots_BD, features_RD]))
        whole_B4 = batch.boxes.new_tensor(WHOLE_IMAGE).expand(slots_BD.shape[0], 4)
        boxes_N4 = batch.boxes.new_empty(order.numel(), 4).index_copy(0, order, torch.cat([whole_B4, batch.boxes]))
        if delta_ND is not None:
            rows_ND = rows_ND + delta_ND
        locations_N5 = location_vectors(boxes_N4).to(dtype)
        return self.dropout(self.norm(self.projection(rows_ND.to(dtype)) + self.location(locations_N5)))


def global_features(features_RD: Tensor, batch: UnimoBatch, layout: JointLayout) -> Tensor:
    """Return [Bi, D], the mean of each image's unmasked region features, zero if all are masked."""
    if not features_RD.shape[0]:
        return features_RD
    counts_B = batch.region_counts.long()
    if batch.region_mask is None:
        kept_B = counts_B
    else:
        features_RD = features_RD.masked_fill(batch.region_mask[:, None], 0.0)
        # int64 additions commute exactly, so that this is the same in every order
        kept_B = torch.zeros_like(counts_B).index_add(0, batch.region_owner(), (~batch.region_mask).long())
    sums_BD = torch.segment_reduce(features_RD, "sum", lengths=counts_B, unsafe=True)
    return (sums_BD / kept_B.clamp(min=1)[:, None]).index_select(0, layout.image_examples)


def location_vectors(boxes_R4: Tensor) -> Tensor:
    """Return [R, 5] (x1, y1, x2, y2, area) for [R, 4] boxes (x1, y1, x2, y2) in 0..1."""
    sides_R2 = boxes_R4[:, 2:] - boxes_R4[:, :2]
    return torch.cat([boxes_R4, sides_R2.prod(1, keepdim=True)], dim=1)


def _or_counted(given: Tensor | None, cu: Tensor, total: int, first: int) -> Tensor:
    if given is not None:
        return given
    return torch.arange(first, first + total, device=cu.device) - cu.long().index_select(0, owners(cu, total))


def _after(values: Tensor, zeros: int) -> Tensor:
    """``values`` behind so many rows of zeros."""
    return torch.cat([values.new_zeros(zeros, *values.shape[1:]), values]) if zeros else values
