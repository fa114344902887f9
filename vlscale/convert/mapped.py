"""A source seen through a key map: other names, other shapes, another dtype, still read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from vlscale.convert.source import TensorInfo, TensorSource
from vlscale.convert.steps import KeyPlan, Step
from vlscale.errors import VlscaleError

_PIECE = 1 << 20
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

    def read(self, name: str) -> Tensor:
        """Make one tensor, contiguous, on the CPU.

        Raises:
            VlscaleError: the file is damaged, or a value is beyond the dtype that was asked for.
        """
        if name in self.plan.copies:
            return self.read(self.plan.copies[name])
        step = self._steps[name]
        tensor = step.run([self._source.read(each) for each in step.sources])
        if not self._counts or not tensor.dtype.is_floating_point:
            return tensor.contiguous()
        bad = _not_finite(tensor)
        made = tensor.to(self._wanted(tensor.dtype)).contiguous()
        if made.dtype != tensor.dtype and _not_finite(made) > bad:
            raise VlscaleError(
                f"{self.path}: {name} has values beyond {made.dtype}'s range ({torch.finfo(made.dtype).max:.4g}); "
                "take --dtype bf16 or fp32"
            )
        if bad:
            self.not_finite[name] = bad
        return made

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


def _not_finite(tensor: Tensor) -> int:
    """Values that are NaN or infinite. Their sum tells of most tensors that there are none, in a fifth of the time.

    Counted in pieces, because the masks of a large tensor are large too.
    """
    if torch.isfinite(tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize < 4 else None)):
        return 0
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in tensor.reshape(-1).split(_PIECE))


def as_it_is(source: TensorSource, names: Collection[str] | None = None) -> KeyPlan:
    """The plan that changes nothing, or only leaves out what is not in ``names``."""
    kept = source.tensors if names is None else [name for name in source.tensors if name in names]
    copies = {second: first for second, first in source.aliases.items() if second in kept and first in kept}
    return KeyPlan(tuple(Step(name, (name,)) for name in kept if name not in copies), copies=copies)


class Merged:
    """Two sources as one; names do not overlap. (A folder's weights and its task head.)"""

    def __init__(self, first: TensorSource, second: TensorSource) -> None:
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
