"""UNIMO (ACL 2021): one encoder for images, texts and pairs, that understands and generates.

The sequence of an example is [image | object tags | text]; each part may be absent. Rows see their whole example, or
texts end in a target that is generated: see :class:`~vlscale.models.unimo_batch.UnimoBatch`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.encoder import Encoder
from vlscale.models.folder import parse_config
from vlscale.models.heads import Pooler, WordHead
from vlscale.models.layers import Linear
from vlscale.models.unimo_batch import JointLayout, UnimoBatch
from vlscale.models.unimo_config import UNIMO_HEADS, UnimoConfig
from vlscale.models.unimo_embeddings import UnimoImageEmbedder, UnimoTextEmbedder
from vlscale.ragged import RaggedBatch

__all__ = ["UNIMO_HEADS", "UnimoBatch", "UnimoConfig", "UnimoEncoded", "UnimoForPretraining"]


@dataclass
class UnimoEncoded:
    """What the encoder makes of a batch of B examples; N positions, Bi of them slots [IMG].

    Attributes:
        hidden: float [N, H], packed [image_0 | tags_0 | text_0 | image_1 | ...].
        layout: where what lies.
        layers: if asked for, the embeddings and each layer's output, all [N, H].
    """

    hidden: Tensor
    layout: JointLayout
    layers: tuple[Tensor, ...] = ()

    @property
    def cu(self) -> Tensor:
        """int32 [B+1], cumulative joint lengths."""
        return self.layout.cu

    @property
    def text_index(self) -> Tensor:
        """int64 [Nt], row in ``hidden`` of each text token."""
        return self.layout.text_rows

    @property
    def region_index(self) -> Tensor:
        """int64 [Nr], row in ``hidden`` of each region."""
        return self.layout.image_rows.index_select(0, self.layout.regions)

    @property
    def text(self) -> Tensor:
        """float [Nt, H], text tokens in the order of ``RaggedBatch.input_ids``."""
        return self.hidden.index_select(0, self.text_index)

    @property
    def tags(self) -> Tensor:
        """float [No, H], tags in the order of ``UnimoBatch.tag_ids``."""
        return self.hidden.index_select(0, self.layout.tag_rows)

    @property
    def regions(self) -> Tensor:
        """float [Nr, H], regions in the order of ``RaggedBatch.boxes``."""
        return self.hidden.index_select(0, self.region_index)

    @property
    def images(self) -> Tensor:
        """float [Bi, H], the slots [IMG] of the examples ``layout.image_examples``."""
        return self.hidden.index_select(0, self.layout.image_rows.index_select(0, self.layout.slots))


class UnimoForPretraining(PretrainingModel, tags=["unimo", "vision-language"]):
    """UNIMO with its heads.

    Every method that looks at single positions takes int64 indices into the text tokens (``RaggedBatch.input_ids``) or
    the regions (``RaggedBatch.boxes``) of the batch; K = 0 is allowed. Outputs have the dtype of the weights.

    Args:
        config: the configuration, or a mapping of its fields.

    Raises:
        VlscaleError: the mapping has an unknown key (the nearest is named) or a value out of range.
    """

    config_type = UnimoConfig
    config: UnimoConfig

    def __init__(self, config: UnimoConfig | dict[str, Any]) -> None:
        super().__init__()
        if not isinstance(config, UnimoConfig):
            config = parse_config(UnimoConfig, config, "UNIMO configuration")
        self.config = config
        width, weights, heads = config.hidden_size, config.weights, config.heads
        self.text_embedder = UnimoTextEmbedder(config)
        self.image_embedder = UnimoImageEmbedder(config) if config.images else None
        self.encoder = Encoder(config, config.activation)
        if "text_pooler" in heads:
            self.text_pooler = Pooler(width, weights, "relu")
        if "image_pooler" in heads:
            self.image_pooler = Pooler(width, weights, "relu")
        if "words" in heads:
            self.word_head = WordHead(self.text_embedder.word, config.layer_norm_eps, weights, config.activation)
        if "features" in heads:
            self.feature_head = Linear(width, config.feature_dim, weights)
        if "classes" in heads:
            self.region_classifier = Linear(width, config.num_classes, weights)
        if "matching" in heads:
            self.match_dropout = nn.Dropout(config.match_dropout)
            self.match_head = Linear(width, 1, weights)

    def forward(self, batch: RaggedBatch, all_layers: bool = False) -> UnimoEncoded:
        """Same as :meth:`encode`."""
        return self.encode(batch, all_layers)

    def encode(
        self,
        batch: RaggedBatch,
        all_layers: bool = False,
        text_delta: Tensor | None = None,
        image_delta: Tensor | None = None,
    ) -> UnimoEncoded:
        """Embed and encode a batch; an example may lack any of image, tags and text.

        Args:
            batch: on the device of the model; a plain RaggedBatch has neither tags nor targets.
            all_layers: also keep the embeddings and every layer's output in ``UnimoEncoded.layers``.
            text_delta: [Nt, H], added to the sum of each text token's embeddings, before the LayerNorm.
            image_delta: [Bi + Nr, D], added to the features of slots and regions, in the order of
                ``JointLayout.image_rows``.

        Raises:
            VlscaleError: the features have another width than the model, images come to a text-only model, or (on a
                CPU) a position, a role, a turn or a target is out of range.
        """
        batch = UnimoBatch.of(batch)
        batch = replace(batch, sizes=batch.measured)
        check_batch(batch, self.config)
        layout = JointLayout(batch, batch.measured)
        rows = [layout.tag_rows, layout.text_rows]
        parts = [self.text_embedder(batch, text_delta)]
        if self.image_embedder is not None:
            rows.append(layout.image_rows)
            parts.append(self.image_embedder(batch, layout, image_delta))
        joint_NH = parts[0].new_empty(batch.tokens, self.config.hidden_size)
        joint_NH = joint_NH.index_copy(0, torch.cat(rows), torch.cat(parts))
        layers = [joint_NH] if all_layers else None
        hidden_NH = self.encoder(joint_NH, layout.cu, batch.longest, layers, layout.visibility)
        return UnimoEncoded(hidden_NH, layout, tuple(layers or ()))

    def pool_text(self, encoded: UnimoEncoded, examples: Tensor | None = None) -> Tensor:
        """Return [K, H], the pooled [CLS] of the examples (int64 [K]; None: of all, which then must have a text).

        Raises:
            VlscaleError: all are asked for, and some have no text; or the model has no such head.
        """
        self._require("text_pooler")
        rows = _of_all(encoded.layout.first_text, examples, encoded.layout.sizes.texts, "text")
        return self.text_pooler(encoded.hidden.index_select(0, rows))

    def pool_image(self, encoded: UnimoEncoded, examples: Tensor | None = None) -> Tensor:
        """Return [K, H], the pooled [IMG] of the examples (int64 [K]; None: of all, which then must have an image).

        Raises:
            VlscaleError: all are asked for, and some have no image; or the model has no such head.
        """
        self._require("image_pooler")
        rows = _of_all(encoded.cu[:-1].long(), examples, encoded.layout.sizes.images, "image")
        return self.image_pooler(encoded.hidden.index_select(0, rows))

    def match_scores(self, encoded: UnimoEncoded, examples: Tensor | None = None) -> Tensor:
        """Return [K], how well image and text of the examples match (a logit); see :meth:`pool_image`."""
        return self.match_pooled(self.pool_text(encoded, examples), self.pool_image(encoded, examples))

    def match_pooled(self, text_KH: Tensor, image_KH: Tensor) -> Tensor:
        """Return [K], how well pooled texts and images match, wherever they were encoded."""
        self._require("matching")
        fused_KH = text_KH * image_KH if self.config.match_fusion == "mul" else text_KH + image_KH
        return self.match_head(self.match_dropout(fused_KH)).squeeze(1)

    def external_parameters(self) -> list[tuple[nn.Module, Tensor]]:
        """Return (module, parameter) where a module's forward reads a parameter that another module owns."""
        return [(self.word_head, self.text_embedder.word.weight)] if "words" in self.config.heads else []


def check_batch(batch: UnimoBatch, config: UnimoConfig) -> None:
    """Compare a batch with a model; values are looked at on a CPU only.

    Raises:
        VlscaleError: see :meth:`UnimoForPretraining.encode`.
    """
    where = f"dataset {batch.dataset!r}"
    if batch.boxes.shape[0] and not config.images:
        raise VlscaleError(f"{where}: has images, the model is text-only (images: false); take a model with images")
    if batch.boxes.shape[0] and batch.features.shape[1] != config.feature_dim:
        raise VlscaleError(
            f"{where}: region features are {batch.features.shape[1]} wide, the model expects {config.feature_dim}; set "
            "model.config.feature_dim"
        )
    if batch.input_ids.device.type != "cpu" or not len(batch):
        return
    for what, lengths, positions in (
        ("a text has", batch.text_lengths, batch.text_positions),
        ("an image's tags have", batch.tag_counts, batch.tag_positions),
    ):
        if positions is None and int(lengths.max()) > config.longest_text:
            raise VlscaleError(
                f"{where}: {what} {int(lengths.max())} tokens with [CLS] and [SEP], the model has "
                f"{config.longest_text} positions; lower data.max_text_tokens or raise max_position_embeddings"
            )
    for name, ids, rows in (
        ("text_positions", batch.text_positions, config.max_position_embeddings),
        ("tag_positions", batch.tag_positions, config.max_position_embeddings),
        ("text_types", batch.text_types, config.type_vocab_size),
        ("role_ids", batch.role_ids, config.role_vocab_size),
        ("turn_ids", batch.turn_ids, config.turn_vocab_size),
    ):
        if rows and ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise VlscaleError(
                f"{where}: {name} goes from {int(ids.min())} to {int(ids.max())}, the model has rows 0 to {rows - 1}"
            )
    prefix = batch.prefix_len
    if prefix is not None and bool(((prefix < 0) | (prefix > batch.text_lengths)).any()):
        raise VlscaleError(f"{where}: prefix_len is negative or longer than its text; it counts tokens of the text")


def _of_all(rows_B: Tensor, examples: Tensor | None, having: int, what: str) -> Tensor:
    if examples is not None:
        return rows_B.index_select(0, examples)
    if having != rows_B.numel():
        raise VlscaleError(f"{rows_B.numel() - having} of {rows_B.numel()} examples have no {what}; name those that do")
    return rows_B


def expected_unimo_shapes(config: UnimoConfig) -> dict[str, torch.Size]:
    """Name -> shape of every tensor of the model; nothing is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in UnimoForPretraining(config).state_dict().items()}
