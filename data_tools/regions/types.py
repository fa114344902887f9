"""What every extractor returns, and what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Regions:
    """R regions of one image, best first.

    Attributes:
        features: float32 [R, D].
        boxes: float32 [R, 4], (x1, y1, x2, y2) in pixels of the image.
        conf: float32 [R], confidence that there is something.
        class_probs: float32 [R, C], the background among them where the detector has one, or None.
        objects: likeliest class other than the background of each region, or None.
        attributes: likeliest attribute other than "none" (0) of each region and its probability, or None.
    """

    features: NDArray[np.float32]
    boxes: NDArray[np.float32]
    conf: NDArray[np.float32]
    class_probs: NDArray[np.float32] | None = None
    objects: NDArray[np.int64] | None = None
    attributes: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None


@dataclass(frozen=True)
class Choice:
    """Which regions of an image are kept.

    Attributes:
        minimum, maximum: bounds of the number of regions (UNITER: 10 and 100; equal for a fixed number).
        confidence: regions at or above it are kept, within the bounds (UNITER: 0.2).
        overlap: per-class non-maximum suppression: IoU above which the weaker region gives way (bottom-up: 0.3).
    """

    minimum: int = 10
    maximum: int = 100
    confidence: float = 0.2
    overlap: float = 0.3


class Extractor(Protocol):
    """A network behind :mod:`data_tools.extract_regions`."""

    description: str
    feature_dim: int
    num_classes: int | None

    def extract(
        self, pictures: list[NDArray[np.uint8]], given: list[NDArray[np.float32] | None], choice: Choice
    ) -> list[Regions]:
        """Regions of each picture (uint8 [H, W, 3], RGB); ``given`` boxes in pixels are taken as they are."""
        ...
