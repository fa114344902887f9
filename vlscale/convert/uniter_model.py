"""The UNITER that a checkpoint's tensors are for: its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlscale.convert.opening import Opened
from vlscale.convert.uniter import config_of_shapes, sizes_of_shapes
from vlscale.errors import VlscaleError
from vlscale.models.uniter import HEADS, UniterConfig

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


def config_of(opened: Opened, stated: Mapping[str, Any], by: str) -> UniterConfig:
    """Find the configuration of a UNITER whose tensors and settings are known.

    Args:
        opened: a checkpoint under our names.
        stated: what is said of the model beside its tensors, in any form; may be empty.
        by: who says so, for errors.

    Raises:
        VlscaleError: sizes that are not known, or settings that are not supported.
    """
    where = str(opened.source.path)
    shapes = {name: info.shape for name, info in opened.mapped.tensors.items()}
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
    check_sizes({key: sizes[key] for key in _TOLD_SIZES}, stated, where, by, "give its own with --model")
    return config_of_shapes(shapes, stated.get("num_attention_heads"), where, more)


def check_sizes(sizes: Mapping[str, int], said: Mapping[str, Any], where: str, by: str, cure: str) -> None:
    """Compare the tensors' sizes with what ``by`` says of them, if it does, before a model of that size is made.

    Raises:
        VlscaleError: one differs; it is named.
    """
    for key, size in sizes.items():
        if said.get(key, size) != size:
            raise VlscaleError(f"{where}: {key} is {size}, {by} says {said[key]}; {cure}")
