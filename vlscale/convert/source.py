"""What a checkpoint file is to the conversion tool: names and shapes first, then one tensor at a time.

A reader module has ``recognise(path) -> bool``, which looks at content and never at a name alone, and
``open_source(path) -> TensorSource``. Readers know files; what the names mean, the key maps know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from vlscale.errors import VlscaleError

MOST_ELEMENTS = 1 << 40
MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """The tensors of one checkpoint, read lazily; a context manager that closes its files."""

    @property
    def path(self) -> Path:
        """What the user named."""
        ...

    @property
    def format(self) -> str:
        """A short name, e.g. ``"torch"``."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that belongs to it, in the order in which their hashes are told."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> what it is, in the file's order."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Name -> earlier name that is exactly the same view of the same storage."""
        ...

    @property
    def extra(self) -> Mapping[str, Any]:
        """Whatever else the files hold, as plain values (str, int, float, bool, None, lists, dicts)."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, of the stored dtype; only its own bytes are read.

        Raises:
            VlscaleError: the file is damaged, or has been changed since it was opened.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def check_tensor(where: str, dtype: torch.dtype, shape: tuple[int, ...], room: int | None = None) -> TensorInfo:
    """Return what a file claims of a tensor, or refuse what cannot be true.

    Args:
        where: file and tensor, for the message.
        dtype: of the elements.
        shape: claimed.
        room: bytes that the file has for it; None where that is checked elsewhere.

    Raises:
        VlscaleError: negative or absurd sizes, or more bytes than there is room for.
    """
    # An empty tensor may not have absurd other sides either: torch cannot build it.
    most = math.prod(max(side, 1) for side in shape)
    if len(shape) > MOST_DIMENSIONS or any(side < 0 for side in shape) or most > MOST_ELEMENTS:
        raise VlscaleError(
            f"{where}: its shape is {str(list(shape))[:80]}, expected at most {MOST_DIMENSIONS} sides and "
            f"{MOST_ELEMENTS} elements; the file is damaged or hostile"
        )
    info = TensorInfo(dtype, shape)
    if room is not None and info.nbytes > room:
        raise VlscaleError(f"{where}: needs {info.nbytes} bytes, the file has {room} for it; it is truncated or lies")
    return info
