"""Short measurements of the operations that a training step is made of, on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlscale.config import Recipe, WraSection
from vlscale.kernels.attention import attention
from vlscale.kernels.ipot import ipot_distance
from vlscale.models.registry import ModelConfig
from vlscale.plan.calibration import Attention, Passes
from vlscale.plan.clock import Clock
from vlscale.plan.curves import Curve, Surface
from vlscale.plan.memory import Zero
from vlscale.plan.trial import DTYPES, FlatStates

Call = Callable[[], object]
Key = tuple[str | int, ...]
"""Which computation of an operation, and its sizes."""
WIDTHS = {"cpu": (64, 128, 256, 512, 768, 1024), "cuda": (128, 256, 512, 768, 1024, 2048)}
ROWS = {"cpu": (16, 128, 1024, 3072), "cuda": (64, 512, 4096, 16384)}
ELEMENTS = {
    "cpu": (10_000, 100_000, 1_000_000, 4_000_000, 12_000_000),
    "cuda": (100_000, 1_000_000, 10_000_000, 100_000_000),
}
STATES = {
    "cpu": (100_000, 1_000_000, 4_000_000, 8_000_000, 12_000_000),
    "cuda": (1_000_000, 10_000_000, 100_000_000),
}
LENGTHS, SHORT_LENGTHS = (16, 48, 96), (8, 16, 24)
"""Lengths of the examples that attention is measured on, and how many of their positions are measured at a time."""
POSITIONS = {"cpu": 768, "cuda": 12_288}
ROUNDS, LEAST_S = 2, 0.002
CELLS = ((8, 24, 10, 1), (8, 24, 50, 1), (24, 60, 10, 1), (24, 60, 50, 1), (24, 60, 10, 4))
"""Words, regions, iterations and factor of the width, of the transport that is measured."""
_EXAMPLES = 16


class Operators:
    """Measures operations as a recipe's model runs them; measured again, each keeps its least time.

    Args:
        config: of the model: its widths, dropout and vocabulary.
        precision: of weights and activations.
        device: where.
    """

    def __init__(self, config: ModelConfig, precision: str, device: torch.device) -> None:
        self._config, self._device, self._dtype = config, device, DTYPES[precision]
        self.clock = Clock(device)
        self._kind = device.type
        self._least_so_far: dict[tuple[str, Key], float] = {}

    def products(self) -> tuple[Surface, Surface, Surface]:
        """Seconds of a projection, of the gradient of its input, and of that of its weight."""
        widths, heights = WIDTHS[self._kind], ROWS[self._kind]
        calls: dict[Key, Call] = {}
        for width in widths:
            weight, bias = self._draw(width, width), self._draw(width)
            for rows in heights:
                x, gradient = self._draw(rows, width), self._draw(rows, width)
                calls["forward", width, rows] = partial(F.linear, x, weight, bias)
                calls["input", width, rows] = partial(torch.mm, gradient, weight)
                calls["weight", width, rows] = partial(_weight_gradient, gradient, x)
        found = self._least("products", calls)

        def surface(kind: str) -> Surface:
            seconds = [[found[kind, width, rows] for rows in heights] for width in widths]
            return Surface(widths=widths, curves=[Curve(sizes=heights, seconds=times) for times in seconds])

        return surface("forward"), surface("input"), surface("weight")

    def norm(self) -> Passes:
        """Dropout, residual sum and LayerNorm."""
        width, rate = self._config.hidden_size, self._config.hidden_dropout
        norm = nn.LayerNorm(width).to(self._device, self._dtype)

        def call(size: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
            x, y = (self._leaf(max(1, size // width), width) for _ in range(2))
            return [x, y, *norm.parameters()], lambda: norm(x + F.dropout(y, rate))

        return self._passes("norm", call)

    def gelu(self) -> Passes:
        """The activation of the feed-forward block."""

        def call(size: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
            x = self._leaf(size)
            return [x], lambda: F.gelu(x)

        return self._passes("gelu", call)

    def copy(self) -> Curve:
        """An addition of two tensors into a third."""
        sizes = ELEMENTS[self._kind]
        return self._curve("copy", {size: partial(torch.add, self._draw(size), self._draw(size)) for size in sizes})

    def attention(self) -> Attention:
        """Attention over examples of three lengths, packed and padded, at the model's width and at others."""
        config = self._config
        each = config.hidden_size // config.num_attention_heads
        widths = sorted({each * heads for heads in (2, 4, 12, 16, config.num_attention_heads)})
        packed = "packed" if self._kind == "cpu" else "auto"
        calls: dict[Key, Call] = {}
        for backend, lengths in ((packed, LENGTHS), ("padded", SHORT_LENGTHS)):
            for width in widths:
                for length in lengths:
                    forward, both = self._attend(width, each, length, backend)
                    calls[backend, "forward", width, length], calls[backend, "both", width, length] = forward, both
        found = self._least("attention", calls)

        def fits(backend: str, kind: str, lengths: tuple[int, ...]) -> list[tuple[float, float, float]]:
            seconds = [[found[backend, kind, width, length] for length in lengths] for width in widths]
            return [self._quadratic(times, lengths) for times in seconds]

        return Attention(
            widths=widths,
            forward=fits(packed, "forward", LENGTHS),
            both=fits(packed, "both", LENGTHS),
            padded_forward=fits("padded", "forward", SHORT_LENGTHS),
            padded_both=fits("padded", "both", SHORT_LENGTHS),
        )

    def _attend(self, width: int, each: int, length: int, backend: str) -> tuple[Call, Call]:
        examples = POSITIONS[self._kind] // length
        bounds = torch.arange(0, examples * length + 1, length, dtype=torch.int32, device=self._device)
        if backend == "padded":
            bounds[1:-1] -= 1  # the first example is short, so that a mask is needed, as it mostly is
        rows = int(bounds[-1])
        qkv, gradient = self._leaf(rows, 3, width // each, each), self._draw(rows, width)
        rate, most = self._config.attention_dropout, int(bounds.diff().max())

        def forward() -> Tensor:
            q, k, v = qkv.unbind(1)
            mixed = attention(q, k, v, bounds, bounds, most, most, dropout_p=rate, backend=backend)
            return mixed.reshape(rows, width)

        return forward, partial(_gradient, forward, [qkv], gradient)

    def _quadratic(self, times: Sequence[float], lengths: Sequence[int]) -> tuple[float, float, float]:
        examples = [POSITIONS[self._kind] // length for length in lengths]
        rows = [[n, n * length, n * length**2] for n, length in zip(examples, lengths, strict=True)]
        a, b, c = np.linalg.solve(np.array(rows, np.float64), np.array(times)).tolist()
        return a, b, c

    def losses(self) -> dict[Any, Curve]:
        """Each loss with its gradient, on float32 outputs as wide as the vocabulary and the classes."""

        def entropy(logits: Tensor, _: Tensor) -> Tensor:
            labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            return F.cross_entropy(logits, labels, reduction="sum") + 0 * logits.detach().argmax(1).sum()

        def divergence(logits: Tensor, other: Tensor) -> Tensor:
            loss = F.kl_div(F.log_softmax(logits, 1), other, reduction="none").mean(1).sum()
            return loss + 0 * logits.detach().argmax(1).sum() + 0 * other.argmax(1).sum()

        def square(logits: Tensor, other: Tensor) -> Tensor:
            return F.mse_loss(logits, other, reduction="none").mean(1).sum() + 0 * other.square().mean(1).sum()

        kinds = {
            "entropy": (entropy, self._config.vocab_size),
            "divergence": (divergence, self._config.num_classes),
            "square": (square, self._config.feature_dim),
        }
        sizes = ELEMENTS[self._kind]
        calls: dict[Key, Call] = {}
        for name, (loss, width) in kinds.items():
            for size in sizes:
                logits = self._leaf(max(1, size // width), width)
                other = torch.rand(logits.shape, device=self._device)
                calls[name, size] = partial(_loss_gradient, loss, logits, other)
        found = self._least("losses", calls)
        return {name: Curve(sizes=sizes, seconds=[found[name, size] for size in sizes]) for name in kinds}

    def table(self) -> Curve:
        """Gradient of a table of vectors, of which a few rows are looked up."""
        width = self._config.hidden_size
        ids = torch.arange(8, device=self._device)
        sizes = STATES[self._kind]
        tables = {size: self._leaf(max(8, size // width), width) for size in sizes}
        return self._curve("table", {size: partial(_table_gradient, ids, table) for size, table in tables.items()})

    def states(self, recipe: Recipe, zero: Zero) -> tuple[Curve, Curve, float]:
        """Accumulating gradients and updating weights over their number, and seconds per tensor of accumulating."""
        zero = Zero(max(1, zero.stage), zero.precision, zero.accumulation_bytes, zero.communication_bytes)
        calls: dict[Key, Call] = {}
        sizes = STATES[self._kind]
        for size in sizes:
            flat, parameters = self._flat(recipe, zero, [size])
            calls["accumulate", size] = partial(_accumulate, flat, parameters, torch.zeros_like(parameters[0]))
            calls["update", size] = flat.step
        flat, parameters = self._flat(recipe, zero, [64] * 100)
        calls["tensors", 100] = partial(_accumulate, flat, parameters, torch.zeros_like(parameters[0]))
        found = self._least("states", calls)
        accumulate, update = (
            Curve(sizes=sizes, seconds=[found[kind, size] for size in sizes]) for kind in ("accumulate", "update")
        )
        return accumulate, update, found["tensors", 100] / 100

    def _flat(self, recipe: Recipe, zero: Zero, sizes: Sequence[int]) -> tuple[FlatStates, list[nn.Parameter]]:
        holder = nn.Module()
        holder.list = nn.ParameterList([nn.Parameter(self._draw(size)) for size in sizes])
        return FlatStates(holder, recipe, zero, 1), list(holder.list)

    def transport(self, section: WraSection) -> tuple[float, float, float]:
        """Seconds per example, per cell and iteration, and per cell and unit of width; forward and backward."""
        calls: dict[Key, Call] = {}
        rows = []
        for words, regions, iterations, wider in CELLS:
            width = self._config.hidden_size * wider
            x, y = (self._leaf(_EXAMPLES * length, width) for length in (words, regions))
            cu_x, cu_y = (
                torch.arange(0, _EXAMPLES * length + 1, length, dtype=torch.int32, device=self._device)
                for length in (words, regions)
            )
            distance = partial(
                ipot_distance, x, y, cu_x, cu_y, beta=section.beta, iterations=iterations, backend=section.backend,
                max_words=words, max_regions=regions,
            )  # fmt: skip
            calls[words, regions, iterations, wider] = partial(_gradient_of_sum, distance, (x, y))
            cells = _EXAMPLES * words * regions
            rows.append([_EXAMPLES, cells * iterations, cells * width])
        times = self._least("transport", calls)
        seconds = np.array(list(times.values()))
        scaled = np.array(rows, np.float64) / seconds[:, None]  # relative errors count alike
        fit = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0].clip(min=0.0)
        return float(fit[0]), float(fit[1]), float(fit[2])

    def _passes(self, name: str, call: Callable[[int], tuple[list[Tensor], Callable[[], Tensor]]]) -> Passes:
        calls: dict[Key, Call] = {}
        sizes = ELEMENTS[self._kind]
        for size in sizes:
            leaves, forward = call(size)
            calls["forward", size] = forward
            calls["both", size] = partial(_gradient, forward, leaves, torch.ones_like(forward()))
        found = self._least(name, calls)
        return Passes(
            forward=Curve(sizes=sizes, seconds=[found["forward", size] for size in sizes]),
            both=Curve(sizes=sizes, seconds=[found["both", size] for size in sizes]),
        )

    def _curve(self, name: str, calls: dict[int, Call]) -> Curve:
        found = self._least(name, {("all", size): call for size, call in calls.items()})
        return Curve(sizes=tuple(calls), seconds=tuple(found.values()))

    def _least(self, name: str, calls: dict[Key, Call]) -> dict[Key, float]:
        """Least seconds of each call, those of earlier passes included."""
        found = self.clock.least(calls, ROUNDS, LEAST_S, 10 if self._kind == "cuda" else 50)
        for key, seconds in found.items():
            place = (name, key)
            self._least_so_far[place] = min(self._least_so_far.get(place, float("inf")), max(seconds, 1e-9))
        return {key: self._least_so_far[name, key] for key in calls}

    def _draw(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self._device).to(self._dtype)

    def _leaf(self, *shape: int) -> Tensor:
        return self._draw(*shape).requires_grad_()


def _weight_gradient(gradient: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a projection's weight and bias."""
    return gradient.t().mm(x), gradient.sum(0)


def _gradient(forward: Callable[[], Tensor], leaves: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(), leaves, gradient)


def _gradient_of_sum(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward().sum(), leaves)


def _loss_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(logits.float(), other), logits)


def _table_gradient(ids: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.embedding(ids, table).float().sum(), table)


def _accumulate(flat: FlatStates, parameters: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """A micro-step's end: every parameter has the gradient, which is added to the accumulator."""
    for parameter in parameters:
        parameter.grad = gradient
    flat.accumulate()
