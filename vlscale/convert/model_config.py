"""The model that a checkpoint's tensors are for, from what the checkpoint says itself, ``--model``, and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlscale.convert import unimo_settings, uniter_model
from vlscale.convert.opening import Opened
from vlscale.convert.uniter import sizes_of_shapes
from vlscale.convert.uniter_model import check_sizes
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, own_keys, parse_config, read_json
from vlscale.models.registry import ModelConfig, load_preset, preset_names
from vlscale.models.unimo_config import UnimoConfig
from vlscale.models.uniter import UniterConfig


def config_of(opened: Opened, model: str | None) -> ModelConfig:
    """Find the configuration of a checkpoint: what it says itself, else what ``model`` and its shapes say.

    Args:
        opened: a checkpoint of a model of vlscale, under our names.
        model: a preset's name, or the path of a config.json (vlscale's or the published form); None: there may be a
            config.json beside the file.

    Raises:
        VlscaleError: unknown preset, unreadable file, a preset of another model, or sizes that are not known.
    """
    where, unimo = str(opened.source.path), opened.model == "unimo"
    if opened.layout == "vlscale" and opened.config is not None and model is None:
        shapes = {name: info.shape for name, info in opened.mapped.tensors.items()}
        sizes = (unimo_settings.sizes_of_shapes if unimo else sizes_of_shapes)(shapes, where)
        raw = own_keys(opened.config)
        config = parse_config(UnimoConfig, raw, where) if unimo else parse_config(UniterConfig, raw, where)
        check_sizes(sizes, config.model_dump(), where, CONFIG_FILE, "give the file of these weights")
        return config
    if model in preset_names() and not model.startswith(f"{opened.model}-"):
        raise VlscaleError(f"--model {model}: {where} holds a model of another kind, {opened.model}; give its preset")
    stated, by = _stated(opened, model), model or CONFIG_FILE
    return unimo_settings.config_of(opened, stated, by) if unimo else uniter_model.config_of(opened, stated, by)


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
