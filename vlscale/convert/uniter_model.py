"""The UNITER that a checkpoint's tensors are for: its configuration, its shapes, and values for what is missing."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.convert.opening import Opened
from vlscale.convert.source import TensorInfo, TensorSource
from vlscale.convert.uniter import config_of_shapes, sizes_of_shapes
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, own_keys, parse_config, read_json
from vlscale.models.registry import load_preset, preset_names
from vlscale.models.uniter import HEADS, UniterConfig, UniterForPretraining, expected_shapes

_SETTINGS = {
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "hidden_dropout_prob": "hidden_dropout",
    "hidden_dropout": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "attention_dropout": "attention_dropout",
    "feature_dim": "feature_dim",
    "num_classes": "num_classes",
}
"""Key of a BERT's, published or own configuration -> ours, for what the tensors may not show."""
_TOLD_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings")
"""Sizes in which tensors and settings must agree; tables of words and types grow in second stages and tasks."""
_HEAD_PARTS = {
    "words": "word_head.",
    "features": "feature_head.",
    "classes": "region_classifier.",
    "matching": "itm_head.",
}


def config_of(opened: Opened, model: str | None) -> UniterConfig:
    """Find the configuration of a checkpoint: what it says itself, else what ``model`` and its shapes say.

    Args:
        opened: a checkpoint under our names.
        model: a preset's name, or the path of a config.json (vlscale's or the published form); None: there may be a
            config.json beside the file.

    Raises:
        VlscaleError: unknown preset, unreadable file, or sizes that are not known.
    """
    where = str(opened.source.path)
    shapes = {name: info.shape for name, info in opened.mapped.tensors.items()}
    if opened.layout == "vlscale" and opened.config is not None and model is None:
        config = parse_config(UniterConfig, own_keys(opened.config), where)
        sizes = sizes_of_shapes(shapes, where)
        _check_sizes(sizes, config.model_dump(), where, CONFIG_FILE, "give the file of these weights")
        return config
    stated = _stated(opened, model)
    heads = tuple(head for head in HEADS if any(name.startswith(_HEAD_PARTS[head]) for name in shapes))
    if opened.layout in ("bert", "roberta"):  # a text encoder: heads and images start anew
        heads = HEADS
    # Told by the tensors, which know of the words and types that second stages and tasks add; the rest by the settings.
    more = {ours: stated[theirs] for theirs, ours in _SETTINGS.items() if theirs in stated} | {"heads": heads}
    vocabulary = opened.provenance.get("vocabulary")
    fingerprint = vocabulary.get("fingerprint") if isinstance(vocabulary, dict) else None
    if fingerprint:
        more["vocab_fingerprint"] = fingerprint
    if stated.get("hidden_act", "gelu") != "gelu":
        raise VlscaleError(f"{where}: hidden_act is {stated['hidden_act']!r}, only 'gelu' (the exact one) is supported")
    sizes = sizes_of_shapes(shapes, where)
    told = {key: sizes[key] for key in _TOLD_SIZES}
    _check_sizes(told, stated, where, model or CONFIG_FILE, "give its own with --model")
    return config_of_shapes(shapes, stated.get("num_attention_heads"), where, more)


def _check_sizes(sizes: Mapping[str, int], said: Mapping[str, Any], where: str, by: str, cure: str) -> None:
    """Compare the tensors' sizes with what ``by`` says of them, if it does, before a model of that size is made."""
    for key, size in sizes.items():
        if said.get(key, size) != size:
            raise VlscaleError(f"{where}: {key} is {size}, {by} says {said[key]}; {cure}")


def _stated(opened: Opened, model: str | None) -> dict[str, Any]:
    """What is said about the model beside its tensors: raw, of any form."""
    if model is not None and model in preset_names():
        return load_preset(model)
    if model is not None:
        path = Path(model)
        if not path.is_file():
            raise VlscaleError(f"--model {model}: no preset ({', '.join(preset_names())}) and no file")
        return read_json(path)
    if opened.config is not None:
        return opened.config
    beside = opened.source.path.parent / CONFIG_FILE
    return read_json(beside) if opened.source.path.is_file() and beside.is_file() else {}


class Filled:
    """A source with a new model's values where it has none, one module's at a time; they follow from its name alone."""

    def __init__(self, source: TensorSource, config: UniterConfig, missing: Collection[str]) -> None:
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
    def _empty(self) -> UniterForPretraining:
        with torch.device("meta"):
            return UniterForPretraining(self._config)

    def __enter__(self) -> Filled:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.__exit__(*exception)
