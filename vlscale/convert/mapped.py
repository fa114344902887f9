"""A source seen through a key map: other names, other shapes, another dtype, still read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from vlscale.convert.source import TensorInfo, TensorSource
from vlscale.convert.steps import KeyPlan, Step
from vlscale.errors import VlscaleError
from vlscale.untrusted import shown

_PIECE = 1 << 20
"""Elements that are cast and looked at together."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Mapped:
    """A :class:`~vlscale.convert.source.TensorSource` that makes its tensors out of another's.

    Args:
        source: the files, or another view of them.
        plan: how.
        dtype: of floating-point tensors; None keeps theirs.
        counts: look for values that are no numbers; always with a dtype, whose range they may exceed.

    Attributes:
        plan: how.
        not_finite: name -> values that are NaN or infinite, of what has been read so far.
        vanished: name -> values that are zero by the cast and were not before, of what has been read so far.
    """

    def __init__(
        self, source: TensorSource, plan: KeyPlan, dtype: torch.dtype | None = None, counts: bool = False
    ) -> None:
        self._source, self._dtype, self._counts = source, dtype, counts or dtype is not None
        self.plan = plan
        self.path: Path = source.path
        self.format, self.files, self.extra = source.format, source.files, source.extra
        self.aliases: Mapping[str, str] = plan.copies
        self._steps = {step.target: step for step in plan.steps}
        infos = {name: step.info(source.tensors) for name, step in self._steps.items()}
        infos |= {second: infos[first] for second, first in plan.copies.items()}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(self._wanted(info.dtype), info.shape) for name, info in infos.items()
        }
        self.not_finite: Counter[str] = Counter()
        self.vanished: Counter[str] = Counter()

    def read(self, name: str) -> Tensor:
        """Make one tensor, contiguous, on the CPU. With what it is made of, and a piece, it is all that is in memory.

        Raises:
            VlscaleError: the file is damaged, or a value is beyond the dtype that was asked for.
        """
        if name in self.plan.copies:
            return self.read(self.plan.copies[name])
        step = self._steps[name]
        tensor = step.run([self._source.read(each) for each in step.sources])
        if not self._counts or not tensor.dtype.is_floating_point:
            return tensor.contiguous()
        return self._cast(name, tensor)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        """Cast and count, piece by piece; a tensor that keeps its dtype is looked at and not copied."""
        wanted = self._wanted(tensor.dtype)
        casts = wanted != tensor.dtype
        made = torch.empty(tensor.shape, dtype=wanted) if casts else tensor.contiguous()
        loses = casts and _smallest(wanted) > _smallest(tensor.dtype)
        bad = vanished = 0
        for old, new in _pieces(tensor if casts else made, made):
            if casts:
                new.copy_(old)
            found = _not_finite(new)
            if casts and found and found > _not_finite(old):
                raise self._too_large(name, tensor, wanted)
            bad += found
            if loses:
                vanished += int(torch.count_nonzero(old)) - int(torch.count_nonzero(new))
        if bad:
            self.not_finite[name] = bad
        if vanished:
            self.vanished[name] = vanished
        return made

    def _too_large(self, name: str, tensor: Tensor, wanted: torch.dtype) -> VlscaleError:
        """With the dtypes that hold the tensor's largest value; its own always does."""
        largest = max(float(piece.double().nan_to_num(0, 0, 0).abs().max()) for piece, _ in _pieces(tensor, tensor))
        fitting = [key for key, dtype in DTYPES.items() if largest <= torch.finfo(dtype).max]
        take = f"{', '.join(fitting)} or keep" if fitting else "keep"
        return VlscaleError(
            f"{self.path}: {name} has values beyond {wanted}'s range ({torch.finfo(wanted).max:.4g}), up to "
            f"{largest:.4g}; take --dtype {take}"
        )

    def check_tied(self) -> None:
        """Compare the tensors that the source holds twice under a tie; those that share their bytes are equal.

        Raises:
            VlscaleError: two differ.
        """
        for second, first in self.plan.tied.items():
            if self._source.aliases.get(second, second) == self._source.aliases.get(first, first):
                continue
            if self._digest(second) != self._digest(first):  # one after the other: they may be the largest of all
                raise VlscaleError(
                    f"{self.path}: {second} differs from {first}, but the two are tied; drop {second} from the file"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.__exit__(*exception)

    def _digest(self, name: str) -> bytes:
        tensor = self._source.read(name).contiguous()
        digest = hashlib.sha256(repr((tensor.dtype, tensor.shape)).encode())
        if tensor.numel():  # one value may be contiguous and yet have a stride
            flat = tensor.reshape(-1) if tensor.numel() > 1 else tensor.reshape(1).clone()
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.digest()

    def _wanted(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype


def _not_finite(piece: Tensor) -> int:
    """Values that are NaN or infinite. Their sum tells of most pieces that there are none, in a fifth of the time."""
    piece = piece.float() if piece.dtype.itemsize == 1 else piece  # torch has little arithmetic for 8 bits
    if torch.isfinite(piece.sum(dtype=torch.float32 if piece.dtype.itemsize < 4 else None)):
        return 0
    return piece.numel() - int(torch.isfinite(piece).sum())


def _smallest(dtype: torch.dtype) -> float:
    """The positive number nearest to zero."""
    limits = torch.finfo(dtype)
    return limits.tiny * limits.eps


def _pieces(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both that lie at the same place and have at most :data:`_PIECE` elements, whatever the strides."""
    if one.is_contiguous() and other.is_contiguous():
        yield from zip(one.reshape(-1).split(_PIECE), other.reshape(-1).split(_PIECE), strict=True)
    elif one.numel() <= _PIECE:
        yield one, other
    else:
        side = max(range(one.dim()), key=lambda each: one.shape[each])
        rows = max(1, _PIECE * one.shape[side] // one.numel())
        for parts in zip(one.split(rows, side), other.split(rows, side), strict=True):
            yield from _pieces(*parts)


def as_it_is(source: TensorSource, names: Collection[str] | None = None) -> KeyPlan:
    """The plan that changes nothing, or only leaves out what is not in ``names``."""
    kept = source.tensors if names is None else [name for name in source.tensors if name in names]
    copies = {second: first for second, first in source.aliases.items() if second in kept and first in kept}
    return KeyPlan(tuple(Step(name, (name,)) for name in kept if name not in copies), copies=copies)


class Merged:
    """Two sources as one. (A folder's weights and its task head.)

    Raises:
        VlscaleError: both hold a tensor of one name.
    """

    def __init__(self, first: TensorSource, second: TensorSource) -> None:
        both = sorted({*first.tensors, *first.aliases} & {*second.tensors, *second.aliases})
        if both:
            more = f" and {len(both) - 1} more" if len(both) > 1 else ""
            raise VlscaleError(
                f"{second.path}: holds {shown(both[0])}{more}, which {first.path} holds too; remove the one that is "
                "not meant"
            )
        self._parts = (first, second)
        self.path, self.format = first.path, first.format
        self.files = (*first.files, *second.files)
        self.tensors: Mapping[str, TensorInfo] = {**second.tensors, **first.tensors}
        self.aliases: Mapping[str, str] = {**second.aliases, **first.aliases}
        self.extra: Mapping[str, Any] = {**second.extra, **first.extra}

    def read(self, name: str) -> Tensor:
        """See :class:`~vlscale.convert.source.TensorSource`."""
        return self._parts[name not in self._parts[0].tensors].read(name)

    def __enter__(self) -> Merged:
        return self

    def __exit__(self, *exception: object) -> None:
        for part in self._parts:
            part.__exit__(*exception)
