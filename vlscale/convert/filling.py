"""A checkpoint with a new model's values where it has none."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from functools import cached_property

import torch
from torch import Tensor

from vlscale.convert.source import TensorInfo, TensorSource
from vlscale.models.base import PretrainingModel
from vlscale.models.registry import ModelConfig, expected_shapes, model_of


class Filled:
    """A source with a new model's values where it has none, one module's at a time; they follow from its name alone."""

    def __init__(self, source: TensorSource, config: ModelConfig, missing: Collection[str]) -> None:
        self._source, self._config, self._missing = source, config, {*missing}
        self.path, self.format, self.files = source.path, source.format, source.files
        self.aliases, self.extra = source.aliases, source.extra
        shapes = {name: TensorInfo(torch.float32, tuple(shape)) for name, shape in expected_shapes(config).items()}
        self.tensors: Mapping[str, TensorInfo] = {
            **{name: source.tensors.get(name) or info for name, info in shapes.items()},
            **{name: info for name, info in source.tensors.items() if name not in shapes},
        }

    def read(self, name: str) -> Tensor:
        """See :class:`~vlscale.convert.source.TensorSource`."""
        return self._new(name) if name in self._missing else self._source.read(name)

    def _new(self, name: str) -> Tensor:
        """Draw as the model's constructor does: layers reset themselves; what stands alone is a bias or a vector."""
        place, _, leaf = name.rpartition(".")
        owner = self._empty.get_submodule(place)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(place.encode()))
            reset = getattr(owner, "reset_parameters", None)
            if not callable(reset):
                tensor = torch.zeros(self.tensors[name].shape)
                return tensor if leaf == "bias" else tensor.normal_(std=self._config.initializer_range)
            owner.to_empty(device="cpu")
            reset()
        made: Tensor = getattr(owner, leaf).detach().clone()
        owner.to("meta")
        return made

    @cached_property
    def _empty(self) -> PretrainingModel:
        with torch.device("meta"):
            return model_of(self._config)

    def __enter__(self) -> Filled:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.__exit__(*exception)
