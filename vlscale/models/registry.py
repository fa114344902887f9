"""From the recipe's model section to a model: preset, overrides, and what the data say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import yaml

from vlscale.config import ModelSection
from vlscale.errors import VlscaleError, nearest
from vlscale.models.base import PretrainingModel
from vlscale.models.encoder import EncoderConfig
from vlscale.models.folder import model_type_of, parse_config
from vlscale.models.unimo import UnimoConfig, UnimoForPretraining
from vlscale.models.uniter import REGION_TYPE, UniterConfig, UniterForPretraining

MODELS: dict[str, type[PretrainingModel]] = {"uniter": UniterForPretraining, "unimo": UnimoForPretraining}
"""The models that recipes train; :data:`vlscale.config.MODEL_TASKS` says on what."""
ModelConfig: TypeAlias = UniterConfig | UnimoConfig
Config = TypeVar("Config", bound=EncoderConfig)
PRESETS = Path(__file__).parent / "presets"
_CURES = {
    "vocab_size": "the texts' vocabulary has",
    "feature_dim": "the images store's features are this wide:",
    "num_classes": "the classes store has",
    "vocab_fingerprint": "the texts' vocabulary has",
}


def preset_names() -> list[str]:
    """Names of the presets that come with the library."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset.

    Raises:
        VlscaleError: no such preset; the nearest is named.
    """
    known = preset_names()
    if name not in known:
        raise VlscaleError(f"model.preset {name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})")
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def resolve_config(
    section: ModelSection,
    *,
    vocab_size: int | None = None,
    feature_dim: int | None = None,
    num_classes: int | None = None,
    vocab_fingerprint: str | None = None,
    max_text_tokens: int | None = None,
    num_types: int | None = None,
) -> ModelConfig:
    """Lay the recipe's overrides over the preset, and fill in what only the data know.

    ``vocab_size``, ``feature_dim``, ``num_classes`` and ``vocab_fingerprint`` come from the stores (None: not known,
    for example without a classes store). Where the preset or the recipe states them too, both must agree.

    Args:
        section: the recipe's ``model``.
        vocab_size: word pieces of the texts' vocabulary.
        feature_dim: width of a region feature.
        num_classes: classes of the detector.
        vocab_fingerprint: of the texts' vocabulary; the model's folder keeps it.
        max_text_tokens: longest text of the data, without [CLS] and [SEP]; the model must have positions for it.
        num_types: types of the texts' segments are below it; the model must have a row for each.

    Returns:
        The configuration of the model that ``section`` names.

    Raises:
        VlscaleError: unknown model, preset or key (the nearest is named), a bad value, or a clash with the data.
    """
    if section.name not in MODELS:
        raise VlscaleError(
            f"model.name {section.name!r} is unknown{nearest(section.name, MODELS)} (known: {[*MODELS]})"
        )
    facts = {
        "vocab_size": vocab_size,
        "feature_dim": feature_dim,
        "num_classes": num_classes,
        "vocab_fingerprint": vocab_fingerprint,
    }
    if section.name == "unimo":
        unimo = _lay_over(UnimoConfig, section, facts, {})
        _check_unimo(unimo, max_text_tokens, num_types or 1)
        return unimo
    types = max(REGION_TYPE + 1, num_types or 1)
    uniter = _lay_over(UniterConfig, section, facts, {"type_vocab_size": types})
    _check_uniter(uniter, max_text_tokens, types)
    return uniter


def _lay_over(
    kind: type[Config], section: ModelSection, facts: Mapping[str, int | str | None], defaults: dict[str, Any]
) -> Config:
    """The recipe over the preset over what the data say over ``defaults``; all must agree with the data.

    Raises:
        VlscaleError: see :func:`resolve_config`.
    """
    known = {key: value for key, value in facts.items() if value is not None}
    config = parse_config(kind, {**defaults, **known, **_stated(section)}, "model.config")
    for key, value in known.items():
        if getattr(config, key) != value:
            source = "model.config" if key in section.config else f"preset {section.preset}"
            raise VlscaleError(
                f"{source}: {key} is {getattr(config, key)}, but {_CURES[key]} {value}; set model.config.{key}={value}"
            )
    return config


def _stated(section: ModelSection) -> dict[str, Any]:
    """What preset and recipe say, the recipe last."""
    if section.preset is None:
        return dict(section.config)
    preset = load_preset(section.preset)
    of = section.preset.partition("-")[0]
    if of != section.name:
        raise VlscaleError(
            f"model.preset {section.preset!r} is of {of!r}, model.name is {section.name!r}; set one of them"
        )
    return preset | section.config


def _check_uniter(config: UniterConfig, max_text_tokens: int | None, types: int) -> None:
    """Look whether there is a row for every position and type of the texts."""
    if max_text_tokens is not None and max_text_tokens + 2 > config.max_position_embeddings:
        raise VlscaleError(
            f"model.config: max_position_embeddings is {config.max_position_embeddings}, but data.max_text_tokens "
            f"{max_text_tokens} with [CLS] and [SEP] needs {max_text_tokens + 2}; raise the one or lower the other"
        )
    _check_types(config.type_vocab_size, types)


def _check_unimo(config: UnimoConfig, max_text_tokens: int | None, types: int) -> None:
    """The same for a UNIMO, whose positions begin at a row of their own, and which may do without types."""
    if max_text_tokens is not None and max_text_tokens + 2 > config.longest_text:
        raise VlscaleError(
            f"model.config: max_position_embeddings {config.max_position_embeddings} leaves {config.longest_text} "
            f"positions for a text, but data.max_text_tokens {max_text_tokens} with [CLS] and [SEP] needs "
            f"{max_text_tokens + 2}; raise the one or lower the other"
        )
    if config.type_vocab_size:
        _check_types(config.type_vocab_size, types)


def _check_types(rows: int, types: int) -> None:
    if rows < types:
        raise VlscaleError(
            f"model.config: type_vocab_size is {rows}, but the texts have segments of the types 0 to {types - 1}; set "
            f"model.config.type_vocab_size={types}"
        )


def build_model(section: ModelSection, **data_facts: Any) -> PretrainingModel:
    """Build the model that the recipe describes, with fresh weights (draws from torch's default generator).

    Args:
        section: the recipe's ``model``; ``init_from`` is not read here (see ``vlscale.convert.initial``).
        **data_facts: see :func:`resolve_config`.

    Raises:
        VlscaleError: see :func:`resolve_config`.
    """
    return model_of(resolve_config(section, **data_facts))


def model_of(config: ModelConfig) -> PretrainingModel:
    """Build the model that a configuration is of, with fresh weights (draws from torch's default generator)."""
    return UnimoForPretraining(config) if isinstance(config, UnimoConfig) else UniterForPretraining(config)


@lru_cache(maxsize=16)
def expected_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """Name -> shape of every tensor of the model that a configuration is of; nothing is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in model_of(config).state_dict().items()}


def config_type_of(model_type: str | None) -> type[ModelConfig] | None:
    """The configuration that ``config.json`` of a model's folder names; None: it is not one of vlscale's."""
    return next((kind for kind in (UniterConfig, UnimoConfig) if model_type_of(kind) == model_type), None)
