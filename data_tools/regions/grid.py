"""Grid features: the cells of a classification backbone's last map are the regions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torchvision import models

from data_tools.regions.types import Choice, Regions
from vlscale.errors import VlscaleError, nearest

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = tuple(sorted(name for name in models.list_models(module=models) if name.startswith(("resn", "wide_resn"))))
MOST_CELLS = 100


class GridBackbone(nn.Module):
    """A torchvision ResNet or ResNeXt as an extractor: one region per cell of its last map, row by row.

    Pictures are resized to a square, so that all give the same grid. Given boxes are refused.

    Args:
        name: one of :data:`NAMES`.
        size: side of the square in pixels; a cell is 32 pixels wide.
        num_classes: classes of the weights' classifier, which is loaded and not used.

    Raises:
        VlscaleError: there is no such backbone, or the grid has more than 100 cells.
    """

    num_classes = None

    def __init__(self, name: str, size: int = 224, num_classes: int = 1000) -> None:
        super().__init__()
        if name not in NAMES:
            raise VlscaleError(f"--backbone {name}: not one of {', '.join(NAMES)}{nearest(name, NAMES)}")
        if size % 32 or not 1 <= (size // 32) ** 2 <= MOST_CELLS:
            raise VlscaleError(f"--size {size}: expected a multiple of 32 from 32 to 320")
        self.network: Any = models.get_model(name, weights=None, num_classes=num_classes)
        self.description = f"torchvision {name}, grid of {size // 32} x {size // 32}"
        self.feature_dim = int(self.network.fc.in_features)
        self._size = size
        self.eval()

    @torch.inference_mode()
    def extract(
        self, pictures: list[NDArray[np.uint8]], given: list[NDArray[np.float32] | None], choice: Choice
    ) -> list[Regions]:
        """See :class:`data_tools.regions.types.Extractor`; ``choice`` has no effect."""
        if any(boxes is not None for boxes in given):
            raise VlscaleError("--boxes: grid features have the grid's boxes; choose a detector for given boxes")
        net = self.network
        x = torch.cat([self._prepare(picture, net.fc.weight.device) for picture in pictures])
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        maps = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        cells = maps.flatten(2).transpose(1, 2).cpu().numpy()
        side = maps.shape[-1]
        y, x_ = np.divmod(np.arange(side * side), side)
        corners = np.stack([x_, y, x_ + 1, y + 1], 1).astype(np.float32) / side
        return [
            Regions(
                features=features,
                boxes=corners * np.array([*picture.shape[1::-1]] * 2, np.float32),
                conf=np.ones(len(corners), np.float32),
            )
            for features, picture in zip(cells, pictures, strict=True)
        ]

    def _prepare(self, picture: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
        pixels = torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1).float()[None] / 255
        pixels = F.interpolate(pixels, (self._size, self._size), mode="bilinear", antialias=True)
        mean, deviation = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        return (pixels - mean) / deviation
