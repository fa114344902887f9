"""Short measurements of the operations that a training step is made of, on the machine at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlscale.config import Recipe, WraSection
from vlscale.kernels.attention import attention
from vlscale.kernels.ipot import ipot_distance
from vlscale.models.uniter import UniterConfig
from vlscale.plan.calibration import Attention, Passes
from vlscale.plan.clock import Clock
from vlscale.plan.curves import Curve, Surface
from vlscale.plan.memory import Zero
from vlscale.plan.trial import DTYPES, FlatStates

Call = Callable[[], object]
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

    def __init__(self, config: UniterConfig, precision: str, device: torch.device) -> None:
        self._config, self._device, self._dtype = config, device, DTYPES[precision]
        self.clock = Clock(device)
        self._kind = device.type
        self._least_so_far: dict[tuple[str, str], float] = {}

    def products(self) -> tuple[Surface, Surface, Surface]:
        """Seconds of a projection, of the gradient of its input, and of that of its weight."""
        calls: dict[str, Call] = {}
        for width in WIDTHS[self._kind]:
            weight, bias = self._draw(width, width), self._draw(width)
            for rows in ROWS[self._kind]:
                x, g = self._draw(rows, width), self._draw(rows, width)
                calls[f"0 {width} {rows}"] = lambda x=x, w=weight, b=bias: F.linear(x, w, b)  # type: ignore[misc]
                calls[f"1 {width} {rows}"] = lambda g=g, w=weight: g.mm(w)  # type: ignore[misc]
                calls[f"2 {width} {rows}"] = lambda g=g, x=x: (g.t().mm(x), g.sum(0))  # type: ignore[misc]
        found = self._least("products", calls)
        rows_of = ROWS[self._kind]
        made = []
        for kind in range(3):
            curves = [
                Curve(sizes=rows_of, seconds=[found[f"{kind} {width} {rows}"] for rows in rows_of])
                for width in WIDTHS[self._kind]
            ]
            made.append(Surface(widths=WIDTHS[self._kind], curves=curves))
        return made[0], made[1], made[2]

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
        calls: dict[str, Call] = {}
        for size in ELEMENTS[self._kind]:
            x, y = self._draw(size), self._draw(size)
            calls[str(size)] = lambda x=x, y=y: x + y  # type: ignore[misc]
        return self._curve("copy", ELEMENTS[self._kind], calls)

    def attention(self) -> Attention:
        """Attention over examples of three lengths, packed and padded, at the model's width and at others."""
        config = self._config
        each = config.hidden_size // config.num_attention_heads
        widths = sorted({each * heads for heads in (2, 4, 12, 16, config.num_attention_heads)})
        calls: dict[str, Call] = {}
        for backend, lengths in self._backends().items():
            for width in widths:
                for length in lengths:
                    forward, both = self._attend(width, each, length, backend)
                    calls[f"{backend} 0 {width} {length}"], calls[f"{backend} 1 {width} {length}"] = forward, both
        found = self._least("attention", calls)
        fits = []
        for backend, lengths in self._backends().items():
            for kind in range(2):
                of_width = [[found[f"{backend} {kind} {width} {length}"] for length in lengths] for width in widths]
                fits.append([self._quadratic(times, lengths) for times in of_width])
        return Attention(widths=widths, forward=fits[0], both=fits[1], padded_forward=fits[2], padded_both=fits[3])

    def _backends(self) -> dict[str, tuple[int, ...]]:
        packed = "packed" if self._kind == "cpu" else "auto"
        return {packed: LENGTHS, "padded": SHORT_LENGTHS}

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

        return forward, lambda: torch.autograd.grad(forward(), qkv, gradient)

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
        calls: dict[str, Call] = {}
        for name, (loss, width) in kinds.items():
            for size in sizes:
                logits = self._leaf(max(1, size // width), width)
                other = torch.rand(logits.shape, device=self._device)
                calls[f"{name} {size}"] = lambda loss=loss, x=logits, y=other: torch.autograd.grad(  # type: ignore[misc]
                    loss(x.float(), y), x
                )
        found = self._least("losses", calls)
        return {name: Curve(sizes=sizes, seconds=[found[f"{name} {size}"] for size in sizes]) for name in kinds}

    def table(self) -> Curve:
        """Gradient of a table of vectors, of which a few rows are looked up."""
        width = self._config.hidden_size
        ids = torch.arange(8, device=self._device)
        calls: dict[str, Call] = {}
        for size in STATES[self._kind]:
            rows = self._leaf(max(8, size // width), width)
            calls[str(size)] = lambda rows=rows: torch.autograd.grad(  # type: ignore[misc]
                F.embedding(ids, rows).float().sum(), rows
            )
        return self._curve("table", STATES[self._kind], calls)

    def states(self, recipe: Recipe, zero: Zero) -> tuple[Curve, Curve, float]:
        """Accumulating gradients and updating weights over their number, and seconds per tensor of accumulating."""
        zero = Zero(max(1, zero.stage), zero.precision, zero.accumulation_bytes, zero.communication_bytes)
        calls: dict[str, Call] = {}
        sizes = STATES[self._kind]
        for size in sizes:
            flat, parameter = self._flat(recipe, zero, [size])
            gradient = torch.zeros_like(parameter[0])
            calls[f"0 {size}"] = _accumulation(flat, parameter, gradient)
            calls[f"1 {size}"] = flat.step
        many, parameters = self._flat(recipe, zero, [64] * 100)
        calls["many"] = _accumulation(many, parameters, torch.zeros_like(parameters[0]))
        found = self._least("states", calls)
        accumulate, update = (Curve(sizes=sizes, seconds=[found[f"{k} {size}"] for size in sizes]) for k in (0, 1))
        return accumulate, update, found["many"] / 100

    def _flat(self, recipe: Recipe, zero: Zero, sizes: Sequence[int]) -> tuple[FlatStates, list[nn.Parameter]]:
        holder = nn.Module()
        holder.list = nn.ParameterList([nn.Parameter(self._draw(size)) for size in sizes])
        return FlatStates(holder, recipe, zero, 1), list(holder.list)

    def transport(self, section: WraSection) -> tuple[float, float, float]:
        """Seconds per example, per cell and iteration, and per cell and unit of width; forward and backward."""
        calls: dict[str, Call] = {}
        rows = []
        for number, (words, regions, iterations, wider) in enumerate(CELLS):
            width = self._config.hidden_size * wider
            x, y = (self._leaf(_EXAMPLES * length, width) for length in (words, regions))
            cu_x, cu_y = (
                torch.arange(0, _EXAMPLES * length + 1, length, dtype=torch.int32, device=self._device)
                for length in (words, regions)
            )
            settings: dict[str, Any] = {
                "beta": section.beta, "iterations": iterations, "backend": section.backend,
                "max_words": words, "max_regions": regions,
            }  # fmt: skip
            calls[str(number)] = lambda x=x, y=y, cu_x=cu_x, cu_y=cu_y, s=settings: torch.autograd.grad(  # type: ignore[misc]
                ipot_distance(x, y, cu_x, cu_y, **s).sum(), (x, y)
            )
            cells = _EXAMPLES * words * regions
            rows.append([_EXAMPLES, cells * iterations, cells * width])
        times = self._least("transport", calls)
        seconds = np.array([times[name] for name in calls])
        scaled = np.array(rows, np.float64) / seconds[:, None]  # relative errors count alike
        fit = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0].clip(min=0.0)
        return float(fit[0]), float(fit[1]), float(fit[2])

    def _passes(self, name: str, call: Callable[[int], tuple[list[Tensor], Callable[[], Tensor]]]) -> Passes:
        calls: dict[str, Call] = {}
        sizes = ELEMENTS[self._kind]
        for size in sizes:
            leaves, forward = call(size)
            gradient = torch.ones_like(forward())
            calls[f"0 {size}"] = forward
            calls[f"1 {size}"] = lambda f=forward, x=leaves, g=gradient: torch.autograd.grad(f(), x, g)  # type: ignore[misc]
        found = self._least(name, calls)
        forward_curve, both = (Curve(sizes=sizes, seconds=[found[f"{k} {size}"] for size in sizes]) for k in (0, 1))
        return Passes(forward=forward_curve, both=both)

    def _curve(self, name: str, sizes: Sequence[int], calls: dict[str, Call]) -> Curve:
        found = self._least(name, calls)
        return Curve(sizes=sizes, seconds=[found[str(size)] for size in sizes])

    def _least(self, name: str, calls: dict[str, Call]) -> dict[str, float]:
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


def _accumulation(flat: FlatStates, parameters: Sequence[nn.Parameter], gradient: Tensor) -> Call:
    """A micro-step's end: every parameter has the gradient, which is added to the accumulator."""

    def call() -> None:
        for parameter in parameters:
            parameter.grad = gradient
        flat.accumulate()

    return call
