"""FLOPs of training a model on a batch, as the arithmetic needs them: nothing counts that is computed twice."""

from __future__ import annotations

from torch import Tensor

from vlscale.models.registry import ModelConfig
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.models.unimo_config import UnimoConfig
from vlscale.ragged import RaggedBatch


def model_flops(config: ModelConfig, batch: RaggedBatch) -> float:
    """Return the FLOPs of forward and backward on ``batch``.

    6 per weight and row it is applied to; attention costs 12 H per pair of positions that see each other, and layer.
    The heads count at the positions they are applied to.
    """
    if isinstance(config, UnimoConfig):
        return _unimo_flops(config, UnimoBatch.of(batch))
    width = config.hidden_size
    weights = layer_weights(config) * batch.tokens
    weights += batch.boxes.shape[0] * config.feature_dim * width
    words = batch.targets.get("token_positions")
    masked = batch.targets.get("region_positions")
    if words is not None:
        weights += words.numel() * (width * width + width * config.vocab_size)
    if masked is not None:
        outputs = config.num_classes if "class_probs" in batch.targets else config.feature_dim
        weights += masked.numel() * (width * width + width * outputs)
    if "itm_labels" in batch.targets:
        weights += len(batch) * width * width
    return 6.0 * weights + attention_flops(config, float(batch.cu_joint.diff().double().square().sum()))


def layer_weights(config: ModelConfig) -> int:
    """Return the weights of all layers that every token passes through."""
    width = config.hidden_size
    return config.num_hidden_layers * (4 * width * width + 2 * width * config.intermediate_size)


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Return the FLOPs, forward and backward, of all layers' attention between so many pairs of positions."""
    return 12.0 * config.hidden_size * config.num_hidden_layers * pairs


def seen_pairs(batch: RaggedBatch) -> float:
    """Return the pairs of positions that attention works on: sources see themselves, targets the whole example."""
    lengths = batch.cu_joint.diff().double()
    if not isinstance(batch, UnimoBatch) or batch.prefix_len is None:
        return float(lengths.square().sum())
    targets = batch.target_lengths.double()
    return float(((lengths - targets).square() + targets * lengths).sum())


def _unimo_flops(config: UnimoConfig, batch: UnimoBatch) -> float:
    """The features get no gradient, so that their projection costs 4 per weight and row."""
    width, targets = config.hidden_size, batch.targets
    slots = batch.boxes.shape[0] + int(batch.image_slots.sum())

    def rows(*names: str) -> int:
        return sum(found.numel() for name in names if isinstance(found := targets.get(name), Tensor))

    words = rows("bidirectional_positions", "seq2seq_positions")
    pooled = rows("contrast_images", "contrast_texts", "window_images", "window_texts")
    outputs = config.feature_dim + (config.num_classes if "class_probs" in targets else 0)
    weights = layer_weights(config) * batch.tokens
    weights += words * (width * width + width * config.vocab_size)
    weights += rows("region_positions") * width * outputs + pooled * width * width
    return 6.0 * weights + 4.0 * slots * config.feature_dim * width + attention_flops(config, seen_pairs(batch))
