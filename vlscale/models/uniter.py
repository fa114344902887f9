"""UNITER (Chen et al., "UNITER: UNiversal Image-TExt Representation Learning", ECCV 2020) on packed batches.

One encoder reads [text | regions] of each example. Nothing is padded: embeddings, norms and projections run on all
positions of the micro-batch at once, and attention stays within the examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.encoder import Encoder, EncoderConfig
from vlscale.models.folder import parse_config
from vlscale.models.heads import FeatureHead, Pooler, RegionClassifier, WordHead
from vlscale.models.layers import Embedding, Linear
from vlscale.ragged import RaggedBatch

Head = Literal["words", "features", "classes", "matching"]
HEADS: tuple[Head, ...] = get_args(Head)
"""The pre-training heads: masked words, regressed features, region classes, image-text matching."""
BOX_WIDTH = 7
REGION_TYPE = 1


class UniterConfig(EncoderConfig):
    """Everything that decides the shape and the arithmetic of a UNITER. The defaults are the published base model."""

    vocab_size: int = Field(28996, ge=1, le=1 << 24)
    max_position_embeddings: int = Field(512, ge=1, le=1 << 20, description="longest text, with [CLS] and [SEP]")
    type_vocab_size: int = Field(2, ge=2, le=1 << 16, description="row 0: text, row 1: regions, by default")
    feature_dim: int = Field(2048, ge=1, le=1 << 20, description="width of a region feature")
    num_classes: int = Field(1601, ge=1, le=1 << 20, description="classes of the detector, background included")
    heads: tuple[Head, ...] = Field(HEADS, description="pre-training heads; a fine-tuned checkpoint may lack some")
    vocab_fingerprint: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of the texts' vocabulary that the word table was trained with"
    )


@dataclass
class Encoded:
    """What the encoder makes of a batch of B examples with Nt text positions and Nr regions; N = Nt + Nr.

    Attributes:
        hidden: float [N, H], packed [text_0 | regions_0 | text_1 | ...].
        cu: int32 [B+1], cumulative joint lengths.
        text_index: int64 [Nt], row in ``hidden`` of each text position.
        region_index: int64 [Nr], row in ``hidden`` of each region.
        layers: if asked for, the embeddings and each layer's output, all [N, H].
    """

    hidden: Tensor
    cu: Tensor
    text_index: Tensor
    region_index: Tensor
    layers: tuple[Tensor, ...] = ()

    @property
    def text(self) -> Tensor:
        """float [Nt, H], text positions in the order of ``RaggedBatch.input_ids``."""
        return self.hidden.index_select(0, self.text_index)

    @property
    def regions(self) -> Tensor:
        """float [Nr, H], regions in the order of ``RaggedBatch.boxes``."""
        return self.hidden.index_select(0, self.region_index)


class TextEmbedder(nn.Module):
    """``drop(LN(word + position + type))``.

    Row 0 of the word table is an ordinary row: there is no padding that it would have to stand for.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        self.word = Embedding(config.vocab_size, config.hidden_size, config.weights)
        self.position = Embedding(config.max_position_embeddings, config.hidden_size, config.weights)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor, positions: Tensor, types_NH: Tensor) -> Tensor:
        """Return [Nt, H] for int64 [Nt] ids and positions and the type vectors [Nt, H]."""
        return self.dropout(self.norm(self.word(input_ids) + self.position(positions) + types_NH))


class ImageEmbedder(nn.Module):
    """``drop(LN(LN(W f) + LN(W g) + type))`` of a region's feature f and box vector g.

    ``mask_embedding`` [D] is added to the (zeroed) feature of a masked region. The published table has a second row,
    for regions that are not masked, which is forced to zero; it is not kept here.
    """

    def __init__(self, config: UniterConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.projection = Linear(config.feature_dim, width, config.weights)
        self.projection_norm = nn.LayerNorm(width, eps)
        self.box = Linear(BOX_WIDTH, width, config.weights)
        self.box_norm = nn.LayerNorm(width, eps)
        self.mask_embedding = nn.Parameter(torch.empty(config.feature_dim))
        nn.init.normal_(self.mask_embedding, std=config.initializer_range)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, features_RD: Tensor, boxes_R4: Tensor, types_RH: Tensor, region_mask: Tensor | None) -> Tensor:
        """Return [Nr, H] for features [Nr, D], boxes [Nr, 4], type vectors [Nr, H] and bool [Nr] masked regions."""
        features_RD = features_RD.to(self.projection.weight.dtype)
        if region_mask is not None:
            features_RD = features_RD + region_mask[:, None] * self.mask_embedding
        boxes_R7 = box_vectors(boxes_R4).to(self.box.weight.dtype)
        regions_RH = self.projection_norm(self.projection(features_RD)) + self.box_norm(self.box(boxes_R7))
        return self.dropout(self.norm(regions_RH + types_RH))


def box_vectors(boxes_R4: Tensor) -> Tensor:
    """Return [R, 7] (x1, y1, x2, y2, w, h, w*h) for [R, 4] boxes (x1, y1, x2, y2) in 0..1."""
    sides_R2 = boxes_R4[:, 2:] - boxes_R4[:, :2]
    return torch.cat([boxes_R4, sides_R2, sides_R2.prod(1, keepdim=True)], dim=1)


class UniterForPretraining(PretrainingModel, tags=["uniter", "vision-language"]):
    """UNITER with its pre-training heads.

    Every method that looks at masked positions takes int64 indices into the text positions (``RaggedBatch.input_ids``)
    or the regions (``RaggedBatch.boxes``) of the batch; K = 0 is allowed. Outputs have the dtype of the weights.

    Args:
        config: the configuration, or a mapping of its fields.

    Raises:
        VlscaleError: the mapping has an unknown key (the nearest is named) or a value out of range.
    """

    config_type = UniterConfig
    config: UniterConfig

    def __init__(self, config: UniterConfig | dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, UniterConfig):
            config = parse_config(UniterConfig, config, "UNITER configuration")
        self.config = config
        width, eps, weights = config.hidden_size, config.layer_norm_eps, config.weights
        self.type_embedding = Embedding(config.type_vocab_size, width, weights)  # one table for both modalities
        self.text_embedder = TextEmbedder(config)
        self.image_embedder = ImageEmbedder(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(width, weights)
        if "words" in config.heads:
            self.word_head = WordHead(self.text_embedder.word, eps, weights)
        if "features" in config.heads:
            self.feature_head = FeatureHead(self.image_embedder.projection, eps, weights)
        if "classes" in config.heads:
            self.region_classifier = RegionClassifier(width, config.num_classes, eps, weights)
        if "matching" in config.heads:
            self.itm_head = Linear(width, 2, weights)

    def forward(self, batch: RaggedBatch, all_layers: bool = False) -> Encoded:
        """Same as :meth:`encode`."""
        return self.encode(batch, all_layers)

    def encode(self, batch: RaggedBatch, all_layers: bool = False) -> Encoded:
        """Embed and encode a batch; an example may lack its text or its regions.

        Args:
            batch: on the device of the model.
            all_layers: also keep the embeddings and every layer's output in ``Encoded.layers``.

        Raises:
            VlscaleError: the features have another width than the model, or (on a CPU) a text is too long for it or has
                segments of a type that it does not know.
        """
        self._check(batch)
        text_NH, regions_RH = self.embed_text(batch), self.embed_regions(batch)
        cu = batch.cu_joint
        # Position j of text i is preceded by all earlier texts (j counts them) and by the regions of earlier examples.
        text_index = _offset(batch.cu_regions, batch.text_owner())
        region_index = _offset(batch.cu_text[1:], batch.region_owner())
        joint = text_NH.new_empty(batch.tokens, self.config.hidden_size)
        joint = joint.index_copy(0, torch.cat([text_index, region_index]), torch.cat([text_NH, regions_RH]))
        layers = [joint] if all_layers else None
        hidden = self.encoder(joint, cu, batch.longest, layers)
        return Encoded(hidden, cu, text_index, region_index, tuple(layers or ()))

    def embed_text(self, batch: RaggedBatch) -> Tensor:
        """Return [Nt, H], the text embeddings; positions count from 0 in each text, types are 0 unless given."""
        owner = batch.text_owner()
        positions = torch.arange(owner.numel(), device=owner.device) - batch.cu_text.long().index_select(0, owner)
        types = torch.zeros_like(batch.input_ids) if batch.text_types is None else batch.text_types
        return self.text_embedder(batch.input_ids, positions, self.type_embedding(types))

    def embed_regions(self, batch: RaggedBatch) -> Tensor:
        """Return [Nr, H], the region embeddings; types are 1 unless given."""
        count, device = batch.boxes.shape[0], batch.boxes.device
        types = batch.region_types
        if types is None:
            types = torch.full((count,), REGION_TYPE, dtype=torch.int64, device=device)
        return self.image_embedder(batch.features, batch.boxes, self.type_embedding(types), batch.region_mask)

    def pool(self, encoded: Encoded) -> Tensor:
        """Return [B, H], the pooled first position of each example ([CLS] where there is a text)."""
        return self.pooler(encoded.hidden.index_select(0, encoded.cu[:-1].long()))

    def itm_logits(self, encoded: Encoded) -> Tensor:
        """Return [B, 2], scores of (no match, match)."""
        self._require("matching")
        return self.itm_head(self.pool(encoded))

    def external_parameters(self) -> list[tuple[nn.Module, Tensor]]:
        """Return (module, parameter) where a module's forward reads a parameter that another module owns.

        Partitioned training has to gather the parameter for that module too.
        """
        shared: list[tuple[nn.Module, Tensor]] = []
        if "words" in self.config.heads:
            shared.append((self.word_head, self.text_embedder.word.weight))
        if "features" in self.config.heads:
            shared.append((self.feature_head, self.image_embedder.projection.weight))
        return shared

    def _check(self, batch: RaggedBatch) -> None:
        if batch.features.shape[1] != self.config.feature_dim:
            raise VlscaleError(
                f"dataset {batch.dataset!r}: region features are {batch.features.shape[1]} wide, the model expects "
                f"{self.config.feature_dim}; set model.config.feature_dim"
            )
        limit = self.config.max_position_embeddings
        if batch.input_ids.device.type == "cpu" and len(batch) and int(batch.text_lengths.max()) > limit:
            raise VlscaleError(
                f"dataset {batch.dataset!r}: a text has {int(batch.text_lengths.max())} tokens with [CLS] and [SEP], "
                f"the model has {limit} positions; lower data.max_text_tokens or raise max_position_embeddings"
            )
        types, rows = batch.text_types, self.config.type_vocab_size
        if types is not None and types.device.type == "cpu" and types.numel() and int(types.max()) >= rows:
            raise VlscaleError(
                f"dataset {batch.dataset!r}: texts have segments of type {int(types.max())}, the model has {rows} "
                f"types; set model.config.type_vocab_size"
            )


def _offset(cu: Tensor, owner: Tensor) -> Tensor:
    """int64 [M]: position m plus what ``cu`` says precedes it in its example's joint sequence."""
    return torch.arange(owner.numel(), device=owner.device) + cu.long().index_select(0, owner)
