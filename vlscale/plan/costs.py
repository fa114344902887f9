"""Seconds of a micro-step and of an update from a calibration: the operations of the model, counted."""

from __future__ import annotations

from dataclasses import dataclass

from vlscale.config import Recipe
from vlscale.data.views import UNIFIED
from vlscale.kernels.attention import PER_EXAMPLE_FROM
from vlscale.models.registry import ModelConfig
from vlscale.models.unimo_embeddings import LOCATION_WIDTH
from vlscale.models.uniter import BOX_WIDTH
from vlscale.plan.activations import FEATURE_COPIES, Load, checkpointed
from vlscale.plan.calibration import Attention, Calibration
from vlscale.plan.curves import between
from vlscale.plan.model import tensor_count

_LOSSES = {"mlm": "entropy", "mrc": "entropy", "mrckl": "divergence", "mrfr": "square", "itm": "entropy"}
_JOINT_COPIES = 4
"""Additions' worth of copying when text and regions are laid into one sequence, forward and backward."""


@dataclass(frozen=True)
class MicroStep:
    """Seconds of a micro-step by what they are spent on.

    Attributes:
        layers: the encoder, each layer once; recomputed: layers computed again, for checkpointing or a window.
        embeddings: both embedders; head: the task's head and loss; transport: optimal transport.
        gradients: tables' gradients and accumulation; fixed: what does not depend on size.
    """

    layers: float
    recomputed: float
    embeddings: float
    head: float
    transport: float
    gradients: float
    fixed: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


class Costs:
    """Predicts a recipe's steps on the machine of a calibration.

    Args:
        calibration: what was measured.
        config: of the model; recipe: optimal transport's iterations.
    """

    def __init__(self, calibration: Calibration, config: ModelConfig, recipe: Recipe) -> None:
        self._found, self._config, self._recipe = calibration, config, recipe

    def micro_step(self, load: Load, policy: str, parameters: int) -> MicroStep:
        """Return seconds of forward and backward of ``load``, gradients accumulated.

        Args:
            load: the micro-batch.
            policy: activation checkpointing.
            parameters: of the model.
        """
        found, config = self._found, self._config
        forward, both = self._layer(load)
        table = found.table.at(config.vocab_size * config.hidden_size)
        accumulated = found.accumulate.at(parameters) + found.tensor_s * tensor_count(config)
        return MicroStep(
            config.num_hidden_layers * both,
            (sum(checkpointed(policy, config.num_hidden_layers)) + first_passes(self._recipe, config)) * forward,
            self._embeddings(load),
            self._head(load),
            self._transport(load),
            table + accumulated,
            found.micro_step_s,
        )

    def update(self, owned: float) -> float:
        """Return seconds of the optimiser on ``owned`` parameters."""
        return self._found.optimizer.at(owned)

    def _product(self, rows: float, fan_in: int, fan_out: int, input_gradient: bool = True) -> tuple[float, float]:
        """Forward, and forward with backward."""
        forward = self._found.products.at(rows, fan_in, fan_out)
        weight = self._found.products_weight.at(rows, fan_in, fan_out)
        inputs = self._found.products_input.at(rows, fan_in, fan_out) if input_gradient else 0.0
        return forward, forward + weight + inputs

    def _layer(self, load: Load) -> tuple[float, float]:
        found, config, rows = self._found, self._config, load.tokens
        width, inner = config.hidden_size, config.intermediate_size
        parts = [
            self._product(rows, width, 3 * width),
            self._product(rows, width, width),
            self._product(rows, width, inner),
            self._product(rows, inner, width),
            (found.gelu.forward.at(rows * inner), found.gelu.both.at(rows * inner)),
            *[(found.norm.forward.at(rows * width), found.norm.both.at(rows * width))] * 2,
            attention_seconds(found.attention, width, load, self._pads(load)),
        ]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    def _pads(self, load: Load) -> bool:
        """Whether attention pads: short examples on a CPU do, see :func:`vlscale.kernels.attention.attention`."""
        if self._config.attention_backend != "auto":
            return self._config.attention_backend == "padded"
        return self._found.machine.kind == "cpu" and load.longest < PER_EXAMPLE_FROM

    def _embeddings(self, load: Load) -> float:
        found, config = self._found, self._config
        width, features = config.hidden_size, config.feature_dim
        if load.task == "unified":
            return self._unimo_embeddings(load)
        text, regions = load.text * width, load.regions * width
        copies = 4 if load.masked_features else 1  # cast; masked vector added, its gradient multiplied and summed
        return (
            found.norm.both.at(text)
            + 3 * found.copy_.at(text)
            + copies * found.copy_.at(load.regions * features)
            + self._product(load.regions, features, width, load.masked_features)[1]
            + self._product(load.regions, BOX_WIDTH, width, False)[1]
            + 3 * found.norm.both.at(regions)
            + _JOINT_COPIES * found.copy_.at(text + regions)
        )

    def _unimo_embeddings(self, load: Load) -> float:
        """A UNIMO's: features are masked, laid beside [IMG], cast, and projected without a gradient of their own."""
        found, config = self._found, self._config
        width, images = config.hidden_size, load.regions + load.slots
        return (
            found.norm.both.at((load.text + images) * width)
            + 2 * found.copy_.at(load.text * width)
            + (FEATURE_COPIES + 1) * found.copy_.at(images * config.feature_dim)
            + self._product(images, config.feature_dim, width, False)[1]
            + self._product(images, LOCATION_WIDTH, width, False)[1]
            + _JOINT_COPIES * found.copy_.at(load.tokens * width)
        )

    def _unified_heads(self, load: Load) -> float:
        """All heads of task ``unified``: words, regressed features, classes, pooled [IMG] and [CLS]."""
        found, config = self._found, self._config
        width, words, regions = config.hidden_size, load.targets, load.masked_regions
        total = self._product(words, width, width)[1] + self._product(words, width, config.vocab_size)[1]
        total += found.gelu.both.at(words * width) + found.norm.both.at(words * width)
        total += 3 * found.copy_.at(width * config.vocab_size)  # gradients of the tied table: two heads' and the texts'
        for each in (config.feature_dim, config.num_classes):
            total += self._product(regions, width, each)[1]
        total += self._product(load.pooled, width, width)[1]
        total += found.losses["entropy"].at(words * config.vocab_size)
        total += found.losses["square"].at(regions * config.feature_dim)
        return total + found.losses["divergence"].at(regions * config.num_classes)

    def _head(self, load: Load) -> float:
        found, config, task = self._found, self._config, load.task
        if task == "unified":
            return self._unified_heads(load)
        width = config.hidden_size
        dense = self._product(load.targets, width, width)[1]
        outputs = {"mlm": config.vocab_size, "mrfr": config.feature_dim, "itm": 2}.get(task, config.num_classes)
        total = dense + self._product(load.targets, width, outputs)[1]
        if task != "itm":
            total += found.gelu.both.at(load.targets * width) + found.norm.both.at(load.targets * width)
        if task in ("mlm", "mrfr"):  # both parts of a tied weight's gradient are added
            total += found.copy_.at(width * outputs)
        return total + found.losses[_LOSSES[task]].at(load.targets * outputs)  # type: ignore[index]

    def _transport(self, load: Load) -> float:
        if not load.cells:
            return 0.0
        example, cell, product = self._found.transport
        iterations = self._recipe.objectives.wra.iterations
        return load.examples * example + load.cells * (cell * iterations + product * self._config.hidden_size)


def first_passes(recipe: Recipe, config: ModelConfig) -> int:
    """Layers that run once more in each micro-step, without gradients: all of them where contrast has a window."""
    contrast = recipe.objectives.unified.contrast
    windowed = UNIFIED in recipe.tasks and contrast.weight > 0 and contrast.window
    return config.num_hidden_layers if windowed else 0


def attention_seconds(found: Attention, width: int, load: Load, padded: bool) -> tuple[float, float]:
    """Return seconds of attention, forward, and forward with backward.

    Args:
        found: what was measured.
        width: of the model; load: the micro-batch.
        padded: every example takes the room of the longest.
    """
    tokens, pairs = load.tokens, load.pairs
    if padded:
        tokens, pairs = load.examples * load.longest, load.examples * load.longest**2

    def at(fits: tuple[tuple[float, float, float], ...]) -> float:
        def seconds(index: int) -> float:
            a, b, c = fits[index]
            return max(a * load.examples + b * tokens + c * pairs, 1e-12)

        inside = min(max(width, found.widths[0]), found.widths[-1])
        return between(width, found.widths, seconds) * width / inside

    if padded:
        return at(found.padded_forward), at(found.padded_both)
    return at(found.forward), at(found.both)
