"""The CUDA sources, the sizes that they are compiled for, and which of them a call takes.

A kernel is ``ipot_prelude.cuh`` with ``ipot_tile.cu``, ``ipot_large.cu`` or ``ipot_backward.cu``, compiled for one
dtype and one size class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vlscale.kernels.ipot import nvrtc
from vlscale.kernels.ipot.numerics import COSINE_RANGE, needs_log_form

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDTH = 128
"""Columns of a block of the backward pass."""
MOST_WORDS, MOST_REGIONS = 1024, 512
"""Of an example in ``ipot_large.cu``."""


@dataclass(frozen=True)
class Source:
    """One kernel and what it is compiled with.

    Attributes:
        file: beside this module; the prelude goes in front.
        name: of the kernel in it.
        defines: ``NAME=VALUE``.
    """

    file: str
    name: str
    defines: tuple[str, ...]

    @property
    def text(self) -> str:
        """CUDA C++ without includes."""
        folder = Path(__file__).parent
        return "".join((folder / name).read_text(encoding="utf-8") for name in ("ipot_prelude.cuh", self.file))

    def compiled(self, architecture: str) -> nvrtc.Compiled:
        """See :func:`vlscale.kernels.ipot.nvrtc.compile_kernel`."""
        return nvrtc.compile_kernel(self.text, self.file, architecture, self.defines)

    def prebuild(self, architecture: str, folder: Path) -> nvrtc.Compiled:
        """See :func:`vlscale.kernels.ipot.nvrtc.prebuild`."""
        return nvrtc.prebuild(self.text, self.file, architecture, self.defines, folder)


@dataclass(frozen=True)
class SizeClass:
    """A compiled tile: an example of at most ``words`` and ``regions`` is one block of ``warps`` warps.

    ``large`` examples take more than one tile; ``words`` and ``regions`` are then the tile's, not the example's.
    """

    words: int
    regions: int
    warps: int
    large: bool = False

    def forward_kernel(self, dtype: torch.dtype, log_form: bool) -> Source:
        """What computes examples of this size."""
        common = (*self.defines(dtype), f"LOG={log_form:d}")
        if self.large:
            most = (f"MOST_WORDS={MOST_WORDS}", f"MOST_REGIONS={MOST_REGIONS}")
            return Source("ipot_large.cu", "ipot_forward", (*common, *most))
        return Source("ipot_tile.cu", "ipot_forward", common)

    def defines(self, dtype: torch.dtype) -> tuple[str, ...]:
        """What the prelude is compiled with."""
        return f"TYPE={TYPES[dtype]}", f"TM={self.words}", f"TN={self.regions}", f"WARPS={self.warps}"

    def needs_log_form(self, beta: float) -> bool:
        """Whether cosine costs may be too wide for the plan form in float32; large examples have no other."""
        return self.large or needs_log_form(COSINE_RANGE, beta, self.words * self.regions)


TILES = (SizeClass(32, 64, 4), SizeClass(64, 64, 8), SizeClass(64, 128, 8), SizeClass(128, 128, 16))
LARGE = SizeClass(64, 64, 16, large=True)


def backward_kernel(dtype: torch.dtype) -> Source:
    """What computes gradients, of examples of any size; the prelude wants a tile, any will do."""
    return Source("ipot_backward.cu", "ipot_backward", (*LARGE.defines(dtype), f"WIDTH={WIDTH}"))


def all_kernels() -> Iterator[Source]:
    """Every kernel that a call can ask for."""
    for dtype in TYPES:
        yield backward_kernel(dtype)
        yield LARGE.forward_kernel(dtype, log_form=True)
        for tile in TILES:
            for log_form in (False, True):
                yield tile.forward_kernel(dtype, log_form)


def is_prebuilt(architecture: str) -> bool:
    """Whether every kernel came compiled from these very sources, so that NVRTC is not needed on ``architecture``."""
    return all(nvrtc.is_prebuilt(kernel.text, architecture, kernel.defines) for kernel in all_kernels())


def size_class(max_words: int, max_regions: int) -> SizeClass:
    """The smallest tile that holds every example.

    Raises:
        ValueError: an example may be larger than any kernel takes.
    """
    if max_words > MOST_WORDS or max_regions > MOST_REGIONS:
        raise ValueError(
            f"IPOT backend 'cuda' takes at most {MOST_WORDS} words and {MOST_REGIONS} regions of an example, "
            f"got {max_words} and {max_regions}; take backend 'reference'"
        )
    return next((tile for tile in TILES if max_words <= tile.words and max_regions <= tile.regions), LARGE)
