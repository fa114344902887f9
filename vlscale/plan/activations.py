"""Memory of activations, from coefficients that were measured on a CPU (``tests/plan/test_activations.py`` repeats it).

Per token a layer saves, in elements of the working dtype, ``9 H + 2 I``: the inputs of the four projections (the gelu's
input and output with them), query, key and value, both sums before a norm, the attention's output, and a copy of it
that only a CPU makes, where examples are attended one by one and concatenated. Beside that: two dropout masks of H
elements (of the working dtype on a CPU, one byte each on CUDA), and in float32 one log-sum-exp per head and four
statistics of the norms. Pre- and post-norm layers save the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from vlscale.models.registry import ModelConfig

WIDTH_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
LAYER_H, LAYER_I, LAYER_STATISTICS = 8.0, 2.0, 4
"""Saved per token and layer: H-wide and I-wide elements; float32 statistics beside one per head."""
CPU_COPY_H = 1.0
"""H-wide elements per token and layer that only the CPU's attention keeps."""
TEXT_H, REGION_H = 2.0, 4.0
"""Saved by the embedders: H-wide elements per text position and per region, the joint sequence included."""
TEXT_BYTES, REGION_BYTES = 32, 68
"""Saved by the embedders: indices, boxes and statistics, bytes per position."""
LOSS_BYTES = {"mlm": 12.0, "mrfr": 12.0, "mrc": 12.0, "mrckl": 24.0, "itm": 12.0, "unified": 12.0}
"""Per element of a task's output (K x V, K x D, K x C, B x 2), all float32: most that is alive around the loss."""
SOURCE_H, TARGET_H = 4.0, 2.0
"""Saved per token and layer beside that where a text of the batch is generated: sources and targets attend apart."""
UNIMO_H, UNIMO_TEXT_BYTES, UNIMO_IMAGE_BYTES = 2.0, 24, 36
"""Saved by a UNIMO's embedders, per text position and per region or [IMG]; of the latter two also its features."""
POOL_H = 3.0
"""H-wide elements that are saved per [IMG] or [CLS] that is pooled and compared."""
CLASS_BYTES = 16.0
"""As ``LOSS_BYTES``, of the classes of task ``unified``, whose labels are distributions."""
FEATURE_COPIES = 3.0
"""Copies of all features, in float32, while a UNIMO lays [IMG] and regions into one sequence."""
ALIGNED_ROWS = 4.0
"""Times that the sequence's rows are there while optimal transport runs backward: rows, gradients, both laid back."""
_UNIFIED_COUNTS = ("slots", "masked_regions", "pooled", "generated")
HEAD_H = 6.0
"""H-wide elements that a head saves per position that it looks at."""


@dataclass(frozen=True)
class Load:
    """What a micro-batch holds.

    Attributes:
        task: its task.
        text: text positions with [CLS] and [SEP]; regions: regions; examples: examples.
        targets: masked positions (itm: examples).
        masked_features: whether region features are copied to be masked (all tasks but itm and, unless masking is
            joint, mlm).
        pairs: sum of squared lengths, what attention works on.
        cells: sum of words x regions that optimal transport works on; 0 without; padded_cells: as its plan is laid out.
        longest: positions of the longest example.
        slots: slots [IMG]; masked_regions: regions that are predicted beside the words, which ``targets`` counts;
            pooled: [IMG] and [CLS] that are pooled; generated: positions of the targets that texts end in. All of
            task ``unified`` alone.
    """

    task: str
    text: float
    regions: float
    examples: float
    targets: float
    masked_features: bool
    pairs: float = 0.0
    cells: float = 0.0
    padded_cells: float = 0.0
    longest: float = 0.0
    slots: float = 0.0
    masked_regions: float = 0.0
    pooled: float = 0.0
    generated: float = 0.0

    def scaled(self, factor: float) -> Load:
        """Return a load of the same composition, ``factor`` times as large."""
        names = ("text", "regions", "examples", "targets", "pairs", "cells", "padded_cells", *_UNIFIED_COUNTS)
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    @property
    def tokens(self) -> float:
        """Positions of all examples."""
        return self.text + self.regions + self.slots


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes on one GPU while a micro-batch runs.

    Attributes:
        embeddings: saved by the embedders.
        layers: saved by the encoder's layers, inputs of checkpointed layers included.
        recomputed: most that a layer computed again, and gradients on their way, add in the backward pass.
        loss: most that a head, its logits, its loss and their gradients add.
        peak: most that is alive at one time; less than the sum, because the loss is gone when layers run backward.
    """

    embeddings: float
    layers: float
    recomputed: float
    loss: float
    peak: float


def checkpointed(policy: str, layers: int) -> list[bool]:
    """Which layers ``none``, ``full`` or ``every N`` computes again; see :class:`vlscale.models.encoder.Encoder`."""
    match = re.fullmatch(r"every ([1-9][0-9]*)", policy)
    stride = int(match[1]) if match else int(policy == "full")
    return [bool(stride) and index % stride == 0 for index in range(layers)]


def layer_bytes(config: ModelConfig, precision: str, cpu: bool = False) -> float:
    """Return the bytes that one layer saves per token when it is not checkpointed."""
    width = WIDTH_BYTES[precision]
    elements = (LAYER_H + (CPU_COPY_H if cpu else 0.0)) * config.hidden_size + LAYER_I * config.intermediate_size
    mask = (width if cpu else 1) if config.hidden_dropout > 0 else 0
    return width * elements + 2 * mask * config.hidden_size + 4 * (config.num_attention_heads + LAYER_STATISTICS)


def activation_bytes(
    config: ModelConfig, load: Load, precision: str, policy: str = "none", cpu: bool = False
) -> ActivationBytes:
    """Predict what forward and backward hold beyond weights, gradients and the batch itself.

    Args:
        config: the model.
        load: the micro-batch.
        precision: ``fp32``, ``fp16`` or ``bf16``.
        policy: activation checkpointing.
        cpu: as measured on a CPU; otherwise as CUDA's kernels keep it (one copy of the attention's output, masks of one
            byte), which has not been measured.
    """
    width, hidden = WIDTH_BYTES[precision], config.hidden_size
    embeddings = _embeddings(config, load, width, cpu)
    layer, kept = layer_bytes(config, precision, cpu) * load.tokens, width * hidden * load.tokens
    if load.generated:
        layer += width * hidden * (SOURCE_H * (load.tokens - load.generated) + TARGET_H * load.generated)
    # Gradients of the FFN's inner row and of a weight beside it; that of its output takes the room of a freed sum.
    passing = width * (load.tokens * config.intermediate_size + hidden * config.intermediate_size)
    held = most = 0.0
    for again in checkpointed(policy, config.num_hidden_layers):
        most = max(most, held + layer)
        held += kept if again else layer
    loss, left = _loss(config, load, width)
    # At the end the word table's gradient appears; where a head shares the table: both parts and their sum. Masked
    # features have a gradient of their own, through which the mask's vector learns.
    words = width * config.vocab_size * hidden * (3 if load.task in ("mlm", "unified") else 1)
    features = 2 * width * config.feature_dim * (load.regions + hidden) if load.masked_features else 0.0
    if load.task == "unified":
        features = FEATURE_COPIES * 4 * config.feature_dim * (load.regions + load.slots)
    peak = max(embeddings + held + loss, embeddings + most + passing + left, words, features)
    return ActivationBytes(embeddings, held, most + passing - held, loss, peak)


def _embeddings(config: ModelConfig, load: Load, width: int, cpu: bool) -> float:
    mask = (width if cpu else 1) if config.hidden_dropout > 0 else 0
    hidden = config.hidden_size
    if load.task == "unified":
        images = width * config.feature_dim + UNIMO_H * width * hidden + mask * hidden + UNIMO_IMAGE_BYTES
        texts = UNIMO_H * width * hidden + mask * hidden + UNIMO_TEXT_BYTES
        return load.text * texts + (load.regions + load.slots) * images
    text = load.text * (TEXT_H * width * hidden + mask * hidden + TEXT_BYTES)
    regions = load.regions * (REGION_H * width * hidden + mask * hidden + REGION_BYTES)
    copies = load.regions * width * config.feature_dim if load.masked_features else 0.0
    return text + regions + copies


def _loss(config: ModelConfig, load: Load, width: int) -> tuple[float, float]:
    """Most bytes around the loss, and those that stay while the layers run backward (gradients of tied weights)."""
    if load.task == "unified":
        return _unified_loss(config, load, width)
    outputs = {"mlm": config.vocab_size, "mrfr": config.feature_dim, "itm": 2}.get(load.task, config.num_classes)
    tied = {"mlm": config.vocab_size, "mrfr": config.feature_dim}.get(load.task, 0) * config.hidden_size * width
    aligned = _alignment(config, load, width)
    around = aligned + load.targets * (LOSS_BYTES[load.task] * outputs + HEAD_H * width * config.hidden_size)
    head_backward = aligned + load.targets * ((4 + width) * outputs + HEAD_H * width * config.hidden_size) + tied
    return max(around, head_backward), float(tied)


def _unified_loss(config: ModelConfig, load: Load, width: int) -> tuple[float, float]:
    """The same of task ``unified``: heads run one after the other and backward in the opposite order.

    Each head keeps one float32 copy of its outputs until its turn. Both heads for words give the word table a gradient,
    also where they have no row.
    """
    hidden, words = config.hidden_size, config.vocab_size
    generated = min(load.generated, load.targets)
    masked = load.targets - generated
    table = float(words * hidden * width)
    kept = 4.0 * load.masked_regions * (config.feature_dim + 2 * config.num_classes)
    kept += width * hidden * (HEAD_H * load.targets + load.masked_regions + POOL_H * load.pooled)
    most = LOSS_BYTES["unified"] * words
    regions = load.masked_regions * (LOSS_BYTES["mrfr"] * config.feature_dim + CLASS_BYTES * config.num_classes)
    around = kept + max(most * generated + 4.0 * words * masked, most * masked + table, 3 * table)
    return max(around, regions + table), table


def _alignment(config: ModelConfig, load: Load, width: int) -> float:
    """Bytes of optimal transport: rows of words and regions, the padded plans, norms, and the rows' gradients.

    The cost matrix is never stored by the compiled kernels; gradients are laid back into the sequence one by one.
    """
    if not load.cells:
        return 0.0
    rows = load.tokens * config.hidden_size * width
    return ALIGNED_ROWS * rows + 4.0 * load.padded_cells + 8.0 * load.tokens
