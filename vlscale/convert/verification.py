"""``vlscale convert --verify DST --against SRC``: both are read again and compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlscale.convert.opening import Opened, open_checkpoint
from vlscale.convert.source import TensorSource
from vlscale.convert.targets import OURS
from vlscale.errors import VlscaleError

_SHOWN = 8


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common, under one set of names.

    Attributes:
        equal: tensors that are equal bit for bit, after the source's values were cast to the target's dtype.
        different: name -> what differs.
        only_target, only_source: names that the other lacks.
    """

    equal: tuple[str, ...]
    different: dict[str, str]
    only_target: tuple[str, ...]
    only_source: tuple[str, ...]

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
            ("only in the target", self.only_target),
        ):
            if names:
                lines.append(f"{len(names)} {label}: {', '.join([*names][:_SHOWN])}{', ...' * (len(names) > _SHOWN)}")
        return "\n".join(lines)


def verify(target: Path, source: Path, layout: str | None = None) -> Comparison:
    """Compare a conversion's result with where it came from, two tensors in memory at a time.

    Args:
        target: what :func:`vlscale.convert.conversion.convert` wrote.
        source: what it was made of.
        layout: of the source, where it is ambiguous.

    Raises:
        VlscaleError: one cannot be read, or they are of different families.
    """
    with open_checkpoint(target) as ours, open_checkpoint(source, layout) as theirs:
        _check_families(ours, theirs)
        ours.mapped.check_tied()
        theirs.mapped.check_tied()
        left, right = ours.mapped, theirs.mapped
        common = [name for name in right.tensors if name in left.tensors]
        different = {name: what for name in common if (what := _difference(left.read(name), right.read(name)))}
        return Comparison(
            tuple(name for name in common if name not in different),
            different,
            _without(left, right.tensors),
            _without(right, left.tensors),
        )


def _check_families(ours: Opened, theirs: Opened) -> None:
    both = {ours.layout, theirs.layout}
    if len(both) > 1 and not both <= {*OURS}:
        raise VlscaleError(
            f"{ours.source.path} is {ours.layout}, {theirs.source.path} is {theirs.layout}: no names in common"
        )


def _without(source: TensorSource, others: Iterable[str]) -> tuple[str, ...]:
    """Names that the others lack, but for second names of a tensor that is there."""
    known = {*others}
    return tuple(name for name in source.tensors if name not in known and source.aliases.get(name) not in known)


def _difference(ours: Tensor, theirs: Tensor) -> str:
    if ours.shape != theirs.shape:
        return f"{list(ours.shape)} instead of {list(theirs.shape)}"
    cast = theirs.to(ours.dtype)
    if torch.equal(ours, cast) or torch.equal(ours.nan_to_num(), cast.nan_to_num()):
        return ""
    apart = (ours.double() - cast.double()).abs()
    return f"{int((apart != 0).sum())} of {apart.numel()} values, by up to {apart.max().item():.3g}"
