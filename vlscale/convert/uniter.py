"""The published UNITER checkpoints: a flat ``name -> tensor`` dict with BERT-like names.

Differences from this library's state dict, all undone exactly on the way back: query, key and value are separate
matrices; the two tied weights stand twice; the mask table has a first row of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.folder import parse_config
from vlscale.models.uniter import UniterConfig

# (published, ours); {i} is the layer, {p} is weight or bias.
_BOTH = (
    ("uniter.embeddings.LayerNorm.{p}", "text_embedder.norm.{p}"),
    ("uniter.img_embeddings.img_linear.{p}", "image_embedder.projection.{p}"),
    ("uniter.img_embeddings.img_layer_norm.{p}", "image_embedder.projection_norm.{p}"),
    ("uniter.img_embeddings.pos_linear.{p}", "image_embedder.box.{p}"),
    ("uniter.img_embeddings.pos_layer_norm.{p}", "image_embedder.box_norm.{p}"),
    ("uniter.img_embeddings.LayerNorm.{p}", "image_embedder.norm.{p}"),
    ("uniter.encoder.layer.{i}.attention.output.dense.{p}", "encoder.layers.{i}.attention.out.{p}"),
    ("uniter.encoder.layer.{i}.attention.output.LayerNorm.{p}", "encoder.layers.{i}.attention_norm.{p}"),
    ("uniter.encoder.layer.{i}.intermediate.dense.{p}", "encoder.layers.{i}.ffn.up.{p}"),
    ("uniter.encoder.layer.{i}.output.dense.{p}", "encoder.layers.{i}.ffn.down.{p}"),
    ("uniter.encoder.layer.{i}.output.LayerNorm.{p}", "encoder.layers.{i}.ffn_norm.{p}"),
    ("uniter.pooler.dense.{p}", "pooler.dense.{p}"),
    ("cls.predictions.transform.dense.{p}", "word_head.transform.dense.{p}"),
    ("cls.predictions.transform.LayerNorm.{p}", "word_head.transform.norm.{p}"),
    ("feat_regress.net.0.{p}", "feature_head.transform.dense.{p}"),
    ("feat_regress.net.2.{p}", "feature_head.transform.norm.{p}"),
    ("region_classifier.net.0.{p}", "region_classifier.transform.dense.{p}"),
    ("region_classifier.net.2.{p}", "region_classifier.transform.norm.{p}"),
    ("region_classifier.net.3.{p}", "region_classifier.out.{p}"),
    ("itm_output.{p}", "itm_head.{p}"),
)
_SINGLE = (
    ("uniter.embeddings.word_embeddings.weight", "text_embedder.word.weight"),
    ("uniter.embeddings.position_embeddings.weight", "text_embedder.position.weight"),
    ("uniter.embeddings.token_type_embeddings.weight", "type_embedding.weight"),
    ("cls.predictions.bias", "word_head.bias"),
    ("feat_regress.bias", "feature_head.bias"),
)
_MASK = ("uniter.img_embeddings.mask_embedding.weight", "image_embedder.mask_embedding")
_QKV = ("uniter.encoder.layer.{i}.attention.self.{part}.{p}", "encoder.layers.{i}.attention.qkv.{p}")
_PARTS = ("query", "key", "value")
# second name -> the name that it shares its tensor with
TIED = {
    "cls.predictions.decoder.weight": "uniter.embeddings.word_embeddings.weight",
    "feat_regress.weight": "uniter.img_embeddings.img_linear.weight",
}
_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_OPTIONAL_KEYS = {
    "initializer_range": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
_OLD_NORMS = {"gamma": "weight", "beta": "bias"}
_SHOWN = 6


def _key_map(layers: int) -> dict[str, str]:
    """Published name -> our name, for the tensors that are the same on both sides."""
    names = dict(_SINGLE)
    for theirs, ours in _BOTH:
        for i in range(layers if "{i}" in theirs else 1):
            for p in ("weight", "bias"):
                names[theirs.format(i=i, p=p)] = ours.format(i=i, p=p)
    return names


def _fused(layers: int) -> dict[str, tuple[str, ...]]:
    """Our fused name -> the published names of its query, key and value."""
    theirs, ours = _QKV
    return {
        ours.format(i=i, p=p): tuple(theirs.format(i=i, p=p, part=part) for part in _PARTS)
        for i in range(layers)
        for p in ("weight", "bias")
    }


def from_official(state: Mapping[str, Tensor], partial: bool = False) -> dict[str, Tensor]:
    """Turn a published state dict (or a dict of gradients) into this library's names and shapes.

    Args:
        state: published names; LayerNorm entries may be called gamma and beta. Half precision becomes float32.
        partial: names may be missing (gradients of one task, weights of a text-only model). A fused projection still
            needs its query, key and value.

    Returns:
        Our names; tensors that need no change share storage with ``state``.

    Raises:
        VlscaleError: names are missing or unexpected, tied tensors differ, or the mask table is not [2, D].
    """
    given = {_modern(name): _widen(tensor) for name, tensor in state.items()}
    if len(given) != len(state):
        raise VlscaleError("UNITER checkpoint: a LayerNorm stands both as gamma/beta and as weight/bias; remove one")
    for second, first in TIED.items():
        if second in given and not torch.equal(given.setdefault(first, given[second]), given[second]):
            raise VlscaleError(f"UNITER checkpoint: {second} differs from {first}, but the two are tied; drop {second}")
    layers = _layer_count(given, r"uniter\.encoder\.layer\.(\d+)\.")
    same, fused = _key_map(layers), _fused(layers)
    parts = [name for names in fused.values() for name in names]
    expected = {*same, *parts, _MASK[0]}
    _compare(given, expected, TIED, partial, "UNITER checkpoint")
    result = {ours: given[theirs] for theirs, ours in same.items() if theirs in given}
    for ours, names in fused.items():
        found = [given[name] for name in names if name in given]
        if found and len(found) < len(names):
            raise VlscaleError(f"UNITER checkpoint: {ours} needs all of {', '.join(names)}")
        if found:
            result[ours] = torch.cat(found)
    if _MASK[0] in given:
        table = given[_MASK[0]]
        if table.dim() != 2 or table.shape[0] != 2:
            raise VlscaleError(f"UNITER checkpoint: {_MASK[0]} is {list(table.shape)}, expected [2, feature width]")
        result[_MASK[1]] = table[1]
    return result


def to_official(state: Mapping[str, Tensor], partial: bool = False, tied: bool = True) -> dict[str, Tensor]:
    """Turn this library's state dict (or a dict of gradients) into the published names: undoes :func:`from_official`.

    Args:
        state: our names. The dtype is kept.
        partial: names may be missing.
        tied: also write the second names of tied tensors (leave them out for gradients).

    Raises:
        VlscaleError: names are missing or unexpected (a pre-norm model has no published counterpart).
    """
    layers = _layer_count(state, r"encoder\.layers\.(\d+)\.")
    same, fused = _key_map(layers), _fused(layers)
    if any(name.startswith("encoder.final_norm.") for name in state):
        raise VlscaleError("UNITER export: the model is pre-norm (it has encoder.final_norm), UNITER is post-norm")
    _compare(state, {*same.values(), *fused, _MASK[1]}, {}, partial, "UNITER export")
    result = {theirs: state[ours] for theirs, ours in same.items() if ours in state}
    for ours, names in fused.items():
        if ours in state:
            result.update(zip(names, state[ours].chunk(len(names)), strict=True))
    if _MASK[1] in state:
        result[_MASK[0]] = torch.stack([torch.zeros_like(state[_MASK[1]]), state[_MASK[1]]])
    if tied:
        result.update({second: result[first] for second, first in TIED.items() if first in result})
    return result


def config_from_official(
    raw: Mapping[str, Any], feature_dim: int, num_classes: int, origin: str = "UNITER config.json", **more: Any
) -> UniterConfig:
    """Turn a published (BERT-like) ``config.json`` into a :class:`UniterConfig`.

    Args:
        raw: the parsed file.
        feature_dim: width of the region features, which the file does not hold.
        num_classes: classes of the region classifier, which the file does not hold.
        origin: named in errors.
        **more: further fields of the configuration, e.g. ``attention_backend``.

    Raises:
        VlscaleError: a key is missing or out of range, or the activation is not the exact gelu.
    """
    if raw.get("hidden_act", "gelu") != "gelu":
        raise VlscaleError(f"{origin}: hidden_act is {raw['hidden_act']!r}, only 'gelu' (the exact one) is supported")
    missing = [key for key in _SHAPE_KEYS if key not in raw]
    if missing:
        raise VlscaleError(f"{origin}: {', '.join(missing)} missing; give the config.json of the checkpoint")
    names = {**{key: key for key in _SHAPE_KEYS}, **_OPTIONAL_KEYS}
    fields = {ours: raw[theirs] for theirs, ours in names.items() if theirs in raw}
    return parse_config(
        UniterConfig, {**fields, "feature_dim": feature_dim, "num_classes": num_classes, **more}, origin
    )


def _modern(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_OLD_NORMS[last]}" if last in _OLD_NORMS else name


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _layer_count(names: Iterable[str], pattern: str) -> int:
    numbers = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(numbers) + 1 if numbers and max(numbers) < len(numbers) else 0


def _compare(
    given: Mapping[str, Tensor], expected: set[str], optional: Iterable[str], partial: bool, origin: str
) -> None:
    missing = [] if partial else sorted(expected - set(given))
    unexpected = sorted(set(given) - expected - set(optional))
    problems = [
        f"{len(names)} {label}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise VlscaleError(f"{origin}: {'; '.join(problems)}")
