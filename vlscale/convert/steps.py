"""A conversion as a list of steps: each makes one tensor of the result from tensors of the source.

Key maps produce steps from names alone; readers and writers run them tensor by tensor. An operation is a function of
tensors, so that the shape of its result is found by running it on tensors without content.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from vlscale.convert.source import TensorInfo
from vlscale.errors import VlscaleError

_SHOWN = 6
_OLD_NORMS = {"gamma": "weight", "beta": "bias"}


def _second_row(*tensors: Tensor) -> Tensor:
    (table,) = tensors
    if table.dim() != 2 or table.shape[0] != 2:
        raise ValueError(f"is {list(table.shape)}, expected [2, width]")
    return table[1]


def _below_zeros(*tensors: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(tensors[0]), tensors[0]])


def _third(number: int) -> Callable[..., Tensor]:
    def part(*tensors: Tensor) -> Tensor:
        if tensors[0].shape[0] % 3:
            raise ValueError(f"is {list(tensors[0].shape)}, expected three parts of equal height")
        return tensors[0].chunk(3)[number]

    return part


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "copy": lambda *tensors: tensors[0],
    "transpose": lambda *tensors: tensors[0].t(),
    "concatenate": lambda *tensors: torch.cat(tensors),
    "second row": _second_row,
    "below zeros": _below_zeros,
    "first third": _third(0),
    "second third": _third(1),
    "last third": _third(2),
}
"""Each with its inverse; what they do is what their names say, along the first side."""
THIRDS = ("first third", "second third", "last third")


@dataclass(frozen=True)
class Step:
    """One tensor of the result.

    Attributes:
        target: its name.
        sources: names in the source, in the order in which the operation takes them.
        operation: in :data:`OPERATIONS`.
    """

    target: str
    sources: tuple[str, ...]
    operation: str = "copy"

    def info(self, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
        """What the result is, without reading anything.

        Raises:
            VlscaleError: the operation does not take tensors of these shapes.
        """
        made = self.run(
            [torch.empty(tensors[name].shape, dtype=tensors[name].dtype, device="meta") for name in self.sources]
        )
        return TensorInfo(made.dtype, tuple(made.shape))

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Make the tensor.

        Raises:
            VlscaleError: the operation does not take tensors of these shapes.
        """
        try:
            return OPERATIONS[self.operation](*tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise VlscaleError(
                f"{', '.join(self.sources)}: cannot become {self.target} ({self.operation}): {reason}"
            ) from None


@dataclass(frozen=True)
class KeyPlan:
    """What a key map makes of the names of a source.

    Attributes:
        steps: the tensors of the result, in its order.
        tied: second name in the source -> the name that must hold the same tensor; left out of the result.
        copies: second name in the result -> the name that it shares its tensor with; written as such.
        ignored: name in the source -> why it is left out.
        missing: names that the source should have and has not.
        unexpected: names of the source that the map does not know.

    Raises:
        VlscaleError: two steps, or a step and a copy, make a tensor of one name.
    """

    steps: tuple[Step, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        made: dict[str, str] = {}
        for target, sources in chain(
            ((step.target, ", ".join(step.sources)) for step in self.steps), self.copies.items()
        ):
            if target in made:
                raise VlscaleError(f"{target}: would be made twice, of {made[target]} and of {sources}; remove one")
            made[target] = sources

    def check(self, origin: str) -> None:
        """Refuse a plan with missing or unexpected names.

        Raises:
            VlscaleError: counts and names them.
        """
        problems = list(problems_of(self.missing, self.unexpected))
        if problems:
            raise VlscaleError(f"{origin}: {'; '.join(problems)}")

    def run(self, state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
        """Make all tensors of the result out of a state dict in memory, without the copies.

        Raises:
            VlscaleError: tied tensors differ, or shapes do not fit.
        """
        for second, first in self.tied.items():
            if not torch.equal(state[second], state[first]):
                raise VlscaleError(f"{origin}: {second} differs from {first}, but the two are tied; drop {second}")
        return {step.target: step.run([state[name] for name in step.sources]) for step in self.steps}


def problems_of(missing: Iterable[str], unexpected: Iterable[str]) -> Iterable[str]:
    """``3 missing: a, b, c`` and the same for unexpected, where there are any."""
    for label, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            yield f"{len(names)} {label}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"


def modern(name: str) -> str:
    """A name as PyTorch has it today: LayerNorms once held ``gamma`` and ``beta`` for ``weight`` and ``bias``."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_OLD_NORMS[last]}" if last in _OLD_NORMS else name


def matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Those of ``names`` that a shell-like pattern (``*``, ``?``) of ``patterns`` matches."""
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
