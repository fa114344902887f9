"""The UNIMO that a checkpoint's tensors are for: its configuration.

Sizes are told by the tensors. What no tensor shows (attention heads, dropout, activation) is told by settings: the
published JSON of an English model, PaddleNLP's, vlscale's own, or a preset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlscale.convert.opening import Opened
from vlscale.convert.unimo_model import heads_of
from vlscale.convert.uniter import PUBLISHED_WIDTHS
from vlscale.convert.uniter_model import check_sizes
from vlscale.errors import VlscaleError
from vlscale.models.folder import parse_config
from vlscale.models.unimo_config import UnimoConfig

_SETTINGS = {
    "hidden_act": "activation",
    "activation": "activation",
    "fusion_method": "match_fusion",
    "match_fusion": "match_fusion",
    "hidden_dropout_prob": "hidden_dropout",
    "hidden_dropout": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
    "image_class_size": "num_classes",
    "num_classes": "num_classes",
    "first_position": "first_position",
    "num_attention_heads": "num_attention_heads",
}
"""Key of a published or own configuration -> ours, for what the tensors may not show."""
_TABLES = {
    "vocab_size": "text_embedder.word.weight",
    "max_position_embeddings": "text_embedder.position.weight",
    "type_vocab_size": "text_embedder.types.weight",
    "role_vocab_size": "text_embedder.roles.weight",
    "turn_vocab_size": "text_embedder.turns.weight",
    "intermediate_size": "encoder.layers.0.ffn.up.weight",
    "num_classes": "region_classifier.weight",
}
"""Size -> the matrix that has so many rows."""
_OPTIONAL = ("type_vocab_size", "role_vocab_size", "turn_vocab_size", "num_classes")
_TOLD_SIZES = ("hidden_size", "num_hidden_layers", "max_position_embeddings")
_OF_TEXTS = {"first_position": 0, "activation": "relu"}
"""What the published text models have, where nothing else is said."""


def config_of(opened: Opened, stated: Mapping[str, Any], by: str) -> UnimoConfig:
    """Find the configuration of a UNIMO whose tensors and settings are known.

    Args:
        opened: a checkpoint under our names.
        stated: what is said of the model beside its tensors, in any form; may be empty.
        by: who says so, for errors.

    Raises:
        VlscaleError: sizes that are not known, or settings that are not supported.
    """
    where = str(opened.source.path)
    if stated.get("normalize_before"):
        raise VlscaleError(f"{where}: {by} says normalize_before: true, only false is supported")
    shapes = {name: info.shape for name, info in opened.mapped.tensors.items()}
    sizes = sizes_of_shapes(shapes, where)
    check_sizes({key: sizes[key] for key in _TOLD_SIZES}, stated, where, by, "give its own with --model")
    hidden = sizes["hidden_size"]
    if "num_attention_heads" not in stated and hidden not in PUBLISHED_WIDTHS:
        raise VlscaleError(f"{where}: attention heads of a model {hidden} wide are not known; give --model CONFIG.json")
    settings = {
        "num_attention_heads": hidden // 64,
        **(_OF_TEXTS if opened.layout == "unimo-text" else {}),
        **{ours: stated[theirs] for theirs, ours in _SETTINGS.items() if theirs in stated},
        **{key: 0 for key in _OPTIONAL if key.endswith("vocab_size")},
        **sizes,
        "images": "feature_dim" in sizes,
        "heads": heads_of(shapes),
    }
    return parse_config(UnimoConfig, settings, where)


def sizes_of_shapes(shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, int]:
    """Return the sizes, of our configuration, that a checkpoint's tensors show.

    Args:
        shapes: our name -> shape.
        origin: named in errors.

    Raises:
        VlscaleError: the text embeddings or the first layer are missing.
    """
    absent = [name for key, name in _TABLES.items() if name not in shapes and key not in _OPTIONAL]
    if absent:
        raise VlscaleError(f"{origin}: {absent[0]} is missing, so the model's size is not known")
    if any(len(shapes[name]) != 2 for name in _TABLES.values() if name in shapes):
        raise VlscaleError(f"{origin}: its tables are no tables, so the model's size is not known")
    layers = {match[1] for name in shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    sizes = {key: shapes[name][0] for key, name in _TABLES.items() if name in shapes}
    sizes |= {"hidden_size": shapes[_TABLES["vocab_size"]][1], "num_hidden_layers": len(layers)}
    features = shapes.get("image_embedder.projection.weight")
    return sizes if not features else sizes | {"feature_dim": features[-1]}
