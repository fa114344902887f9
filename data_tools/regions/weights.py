"""Weights of extractors: tensors only, by name, all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vlscale.errors import VlscaleError

MAX_BYTES = 8 << 30


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a PyTorch file of tensors, bare or under ``model`` or ``state_dict``.

    Raises:
        VlscaleError: the file is missing, too large, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise VlscaleError(f"{path}: no such file; give the detector's weights with --weights")
    if path.stat().st_size > MAX_BYTES:
        raise VlscaleError(f"{path}: {path.stat().st_size} bytes, more than {MAX_BYTES}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of protocols and of damage in lines of its own
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the readers fail in any way: KeyError, AssertionError, struct.error
        detail = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        raise VlscaleError(
            f"{path}: cannot be read as tensors alone ({detail}); convert it to safetensors where you trust it"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise VlscaleError(f"{path}: not a mapping of names to tensors, bare or under 'model' or 'state_dict'")
    if any(value.layout != torch.strided or value.is_quantized or value.is_meta for value in found.values()):
        raise VlscaleError(f"{path}: holds sparse, quantized or empty tensors; save the plain weights")
    return {str(name): value for name, value in found.items()}


def load(network: nn.Module, path: Path) -> None:
    """Load weights into ``network``; every parameter and statistic must be there, in its shape.

    Names that begin with ``module.`` lose it. Counters of batches seen, and the detector's own constants
    (``pixel_mean``, ``pixel_std``, anchors), may be absent or superfluous.

    Raises:
        VlscaleError: see :func:`read`; or names or shapes differ, the first of which is named.
    """
    state = {name.removeprefix("module."): value for name, value in read(path).items()}
    wanted = {name: value for name, value in network.state_dict().items() if not _idle(name)}
    state = {name: value for name, value in state.items() if not _idle(name)}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        problem = f"{missing[0]!r} is missing ({len(missing)} are)" if missing else f"{extra[0]!r} is not part of it"
        raise VlscaleError(f"{path}: not the weights of this network: {problem}; choose another extractor or file")
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise VlscaleError(
                f"{path}: {name} has shape {list(state[name].shape)}, expected {list(value.shape)}; choose another file"
            )
        if not torch.isfinite(state[name].float()).all():
            raise VlscaleError(f"{path}: {name} holds NaN or infinity; the file is damaged")
    network.load_state_dict({**network.state_dict(), **state})


def _idle(name: str) -> bool:
    return name.endswith(("num_batches_tracked", "pixel_mean", "pixel_std")) or ".anchor_generator." in name
