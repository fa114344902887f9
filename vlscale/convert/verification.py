"""``vlscale convert --verify DST --against SRC``: both are read again and compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlscale.convert.layouts import STATE_DICT
from vlscale.convert.opening import Opened, open_checkpoint
from vlscale.convert.source import TensorSource
from vlscale.convert.steps import matching
from vlscale.convert.targets import TARGETS
from vlscale.errors import VlscaleError, nearest

_SHOWN = 8
_PIECE = 1 << 20
"""Elements that are compared together."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common, under one set of names.

    Attributes:
        equal: tensors that are equal bit for bit, after the source's floating-point values were cast to the target's
            dtype; where both are NaN, its bits do not matter.
        different: name -> what differs.
        only_target, only_source: names that the other lacks.
        allowed: those of the source that the target may lack, and does.
    """

    equal: tuple[str, ...]
    different: dict[str, str]
    only_target: tuple[str, ...]
    only_source: tuple[str, ...]
    allowed: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing differs and the target has all of the source; it may hold more (a new model's parts)."""
        return not self.different and not self.only_source

    def text(self) -> str:
        """Some lines for people."""
        lines = [f"{len(self.equal)} tensors are equal"]
        for label, names in (
            ("DIFFER", [f"{name} ({what})" for name, what in self.different.items()]),
            ("only in the source", self.only_source),
            ("only in the source, as is allowed", self.allowed),
            ("only in the target", self.only_target),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {', '.join([*names][:_SHOWN])}{', ...' * (len(names) > _SHOWN)}")
        return "\n".join(lines)


def verify(
    target: Path, source: Path, layout: str | None = None, to: str | None = None, allowed: Sequence[str] = ()
) -> Comparison:
    """Compare a conversion's result with where it came from, two tensors in memory at a time.

    Args:
        target: what :func:`vlscale.convert.conversion.convert` wrote.
        source: what it was made of.
        layout: of the source, where it is ambiguous.
        to: what the target was made as; needed where the source only began it (a BERT for ViLBERT, a ResNet for UniT).
        allowed: patterns of names that may be in the source alone.

    Raises:
        VlscaleError: one cannot be read, they are of different families, or ``to`` is unknown.
    """
    if to is not None and to not in TARGETS:
        raise VlscaleError(f"--to {to!r} is unknown{nearest(to, TARGETS)} (known: {', '.join(TARGETS)})")
    with open_checkpoint(source, layout, to=to) as theirs, _opened_as(target, theirs) as ours:
        _check_families(ours, theirs, to)
        ours.check_tied()
        theirs.check_tied()
        left, right = ours.mapped, theirs.mapped
        common = [name for name in right.tensors if name in left.tensors]
        different = {name: what for name in common if (what := _difference(left.read(name), right.read(name)))}
        lacking = _without(right, left.tensors)
        may = matching(lacking, allowed)
        return Comparison(
            tuple(name for name in common if name not in different),
            different,
            _without(left, right.tensors),
            tuple(name for name in lacking if name not in may),
            tuple(name for name in lacking if name in may),
        )


def _opened_as(target: Path, source: Opened) -> Opened:
    """Open the target; under published names where the source could only begin it, so that both have the same."""
    return open_checkpoint(target, published=source.model is None)


def _check_families(ours: Opened, theirs: Opened, to: str | None) -> None:
    """Names of one family; or what a source began, which has too few of them to be recognised."""
    if ours.layout == theirs.layout or (ours.model is not None and ours.model == theirs.model):
        return
    begun = to is not None and ours.layout in (to, STATE_DICT)
    if not begun or ours.mapped.tensors.keys().isdisjoint(theirs.mapped.tensors):
        raise VlscaleError(
            f"{ours.source.path} is {ours.layout}, {theirs.source.path} is {theirs.layout}: no names in common; give "
            "what the target was made of, and as what with --to"
        )


def _without(source: TensorSource, others: Iterable[str]) -> tuple[str, ...]:
    """Names that the others lack, but for second names of a tensor that is there."""
    known = {*others}
    return tuple(name for name in source.tensors if name not in known and source.aliases.get(name) not in known)


def _difference(ours: Tensor, theirs: Tensor) -> str:
    """What differs, empty where nothing does. Floating-point values alone may have been cast."""
    if ours.shape != theirs.shape:
        return f"{list(ours.shape)} instead of {list(theirs.shape)}"
    if ours.dtype != theirs.dtype and not (ours.is_floating_point() and theirs.is_floating_point()):
        return f"{ours.dtype} instead of {theirs.dtype}"
    if ours.is_complex():
        ours, theirs = torch.view_as_real(ours.resolve_conj()), torch.view_as_real(theirs.resolve_conj())
    told = [
        each
        for our, their in zip(ours.reshape(-1).split(_PIECE), theirs.reshape(-1).split(_PIECE), strict=True)
        if (each := _apart(our, their)).values
    ]
    if not told:
        return ""
    values, gaps, special, signs = zip(*told, strict=True)
    return (
        f"{sum(values)} of {ours.numel()} values"
        + (f", by up to {max(gaps):.3g}" if max(gaps) else "")
        + (f", {sum(special)} with NaN or infinity" if sum(special) else "")
        + (f", {sum(signs)} in the sign of zero" if sum(signs) else "")
    )


class _Apart(NamedTuple):
    """Values of a piece that differ: how many, by how much, beside NaN and infinity, between 0 and -0."""

    values: int = 0
    most: float = 0.0
    special: int = 0
    signs: int = 0


def _apart(ours: Tensor, theirs: Tensor) -> _Apart:
    cast = theirs.to(ours.dtype)
    bits = _BITS[ours.dtype.itemsize]
    apart = ours.view(bits) != cast.view(bits)
    casts, floats = theirs.dtype != ours.dtype, ours.is_floating_point()
    if not casts and not apart.any():
        return _Apart()
    left, right = ours.double(), cast.double()  # 8-bit floats can little else
    if floats:
        apart &= ~(left.isnan() & right.isnan())
    if casts:  # a finite value that the dtype does not hold is another, though both casts agree
        apart |= ~right.isfinite() & theirs.double().isfinite()
    count = int(apart.sum())
    if not count:
        return _Apart()
    left, right = left[apart], right[apart]
    finite = left.isfinite() & right.isfinite()
    gaps = (left - right)[finite].abs()
    most = float(gaps.max()) if gaps.numel() else 0.0
    return _Apart(count, most, count - int(finite.sum()), int((gaps == 0).sum()) if floats else 0)
