"""The published UNITER checkpoints: a flat ``name -> tensor`` dict with BERT-like names.

Differences from this library's state dict, all undone exactly on the way back: query, key and value are separate
matrices; the two tied weights stand twice; the mask table has a first row of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vlscale.convert.layer_names import layer_count
from vlscale.convert.steps import THIRDS, KeyPlan, Step, modern
from vlscale.convert.task_heads import TASK_HEAD, TASK_NAMES, is_task_name
from vlscale.errors import VlscaleError
from vlscale.models.folder import parse_config
from vlscale.models.uniter import HEADS, UniterConfig

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
ORIGIN = "UNITER checkpoint"
_OUR_LAYER = r"encoder\.layers\.(\d+)\."
_HEAD_PREFIXES = dict(
    zip(HEADS, ("cls.predictions.", "feat_regress.", "region_classifier.", "itm_output."), strict=True)
)
PUBLISHED_WIDTHS = (768, 1024)
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


def import_plan(names: Iterable[str], heads: Iterable[str] | None = HEADS, partial: bool = False) -> KeyPlan:
    """Map the names of a published checkpoint to ours.

    LayerNorm entries may be called gamma and beta.

    Args:
        names: of the checkpoint.
        heads: pre-training heads that must be there, of :data:`HEADS`. None for those that are; what fine-tuning added
            is then kept too, under its own names after :data:`~vlscale.convert.task_heads.TASK_HEAD`.
        partial: nothing is reported missing (gradients of one task, a text encoder). A fused projection still needs
            its query, key and value.

    Raises:
        VlscaleError: a LayerNorm stands both as gamma/beta and as weight/bias, or part of a fused projection is
            missing from a partial checkpoint.
    """
    given: dict[str, str] = {}  # published name -> as it is called here
    for name in names:
        if given.setdefault(modern(name), name) != name:
            raise VlscaleError(f"{ORIGIN}: a LayerNorm stands both as gamma/beta and as weight/bias; remove one")
    tied = {second: first for second, first in TIED.items() if second in given and first in given}
    for second, first in TIED.items():
        if second in given and first not in given:
            given[first] = given[second]
    layers = layer_count(given, r"uniter\.encoder\.layer\.(\d+)\.", ORIGIN)
    same, fused = _key_map(layers), _fused(layers)
    wanted = {*(heads_of(given) if heads is None else heads)}
    expected = {name for name in (*same, *chain(*fused.values()), _MASK[0]) if head_of(name) in (None, *wanted)}
    steps = [Step(ours, (given[theirs],)) for theirs, ours in same.items() if theirs in given]
    for ours, theirs in fused.items():
        found = tuple(given[name] for name in theirs if name in given)
        if len(found) == len(theirs):
            steps.append(Step(ours, found, "concatenate"))
        elif found and partial:
            raise VlscaleError(f"{ORIGIN}: {ours} needs all of {', '.join(theirs)}")
    if _MASK[0] in given:
        steps.append(Step(_MASK[1], (given[_MASK[0]],), "second row"))
    task = [name for name in given if name.startswith(TASK_NAMES["uniter"])] if heads is None else []
    steps += [Step(TASK_HEAD + name, (given[name],)) for name in task]
    known = {*same, *chain(*fused.values()), _MASK[0], *TIED, *task}
    return KeyPlan(
        tuple(steps),
        tied={given[second]: given[first] for second, first in tied.items()},
        missing=() if partial else tuple(sorted(expected - set(given))),
        unexpected=tuple(sorted(given[name] for name in set(given) - known)),
    )


def export_plan(names: Iterable[str], heads: Iterable[str] | None = HEADS, partial: bool = False) -> KeyPlan:
    """Map our names to the published ones: undoes :func:`import_plan`.

    Args:
        names: of our state dict; task heads after :data:`~vlscale.convert.task_heads.TASK_HEAD`.
        heads, partial: as there.

    Raises:
        VlscaleError: the model is pre-norm, which has no published counterpart.
    """
    given = set(names)
    if any(name.startswith("encoder.final_norm.") for name in given):
        raise VlscaleError("UNITER export: the model is pre-norm (it has encoder.final_norm), UNITER is post-norm")
    layers = layer_count(given, _OUR_LAYER, "UNITER export")
    same, fused = _key_map(layers), _fused(layers)
    steps = [Step(theirs, (ours,)) for theirs, ours in same.items() if ours in given]
    for ours, theirs in fused.items():
        if ours in given:
            steps += [Step(name, (ours,), third) for name, third in zip(theirs, THIRDS, strict=True)]
    if _MASK[1] in given:
        steps.append(Step(_MASK[0], (_MASK[1],), "below zeros"))
    task = [name for name in given if is_task_name(name)]
    steps += [Step(name.removeprefix(TASK_HEAD), (name,)) for name in sorted(task)]
    made = {step.target for step in steps}
    wanted = {*(heads_of(made) if heads is None else heads)}
    expected = {ours for theirs, ours in same.items() if head_of(theirs) in (None, *wanted)} | {*fused, _MASK[1]}
    known = {*same.values(), *fused, _MASK[1], *task}
    copies = {second: first for second, first in TIED.items() if first in made and head_of(second) in wanted}
    return KeyPlan(
        tuple(steps),
        copies=copies,
        missing=() if partial else tuple(sorted(expected - given)),
        unexpected=tuple(sorted(given - known)),
    )


def head_of(name: str) -> str | None:
    """The pre-training head that a published name belongs to, of :data:`HEADS`, or None."""
    return next((head for head, prefix in _HEAD_PREFIXES.items() if name.startswith(prefix)), None)


def heads_of(names: Iterable[str]) -> tuple[str, ...]:
    """The heads that a published checkpoint has, in the order of :data:`HEADS`."""
    found = {head_of(name) for name in names}
    return tuple(head for head in HEADS if head in found)


def from_official(state: Mapping[str, Tensor], partial: bool = False) -> dict[str, Tensor]:
    """Turn a published state dict (or a dict of gradients) into this library's names and shapes.

    Args:
        state: published names; LayerNorm entries may be called gamma and beta. Half precision becomes float32.
        partial: see :func:`import_plan`.

    Returns:
        Our names; tensors that need no change share storage with ``state``.

    Raises:
        VlscaleError: names are missing or unexpected, tied tensors differ, or the mask table is not [2, D].
    """
    plan = import_plan(state, partial=partial)
    plan.check(ORIGIN)
    return plan.run({name: _widen(tensor) for name, tensor in state.items()}, ORIGIN)


def to_official(state: Mapping[str, Tensor], partial: bool = False, tied: bool = True) -> dict[str, Tensor]:
    """Turn this library's state dict (or a dict of gradients) into the published names: undoes :func:`from_official`.

    Args:
        state: our names. The dtype is kept.
        partial: names may be missing.
        tied: also write the second names of tied tensors (leave them out for gradients).

    Raises:
        VlscaleError: names are missing or unexpected (a pre-norm model has no published counterpart).
    """
    plan = export_plan(state, partial=partial)
    plan.check("UNITER export")
    result = plan.run(state, "UNITER export")
    return result | ({second: result[first] for second, first in plan.copies.items()} if tied else {})


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


def config_to_official(config: UniterConfig) -> dict[str, Any]:
    """Return the published (BERT-like) ``config.json`` of a configuration."""
    raw = config.model_dump()
    names = {**{key: key for key in _SHAPE_KEYS}, **_OPTIONAL_KEYS}
    return {theirs: raw[ours] for theirs, ours in names.items()} | {"hidden_act": "gelu"}


def sizes_of_shapes(shapes: Mapping[str, tuple[int, ...]], origin: str) -> dict[str, int]:
    """Return the sizes, of our configuration, that a checkpoint's tensors show.

    Args:
        shapes: our name -> shape.
        origin: named in errors.

    Raises:
        VlscaleError: the text embeddings or the first layer are missing.
    """
    try:
        vocabulary, hidden = shapes["text_embedder.word.weight"]
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layer_count(shapes, _OUR_LAYER, origin),
            "intermediate_size": shapes["encoder.layers.0.ffn.up.weight"][0],
            "max_position_embeddings": shapes["text_embedder.position.weight"][0],
            "type_vocab_size": shapes["type_embedding.weight"][0],
        }
    except KeyError as error:
        raise VlscaleError(f"{origin}: {error.args[0]} is missing, so the model's size is not known") from None
    except (ValueError, IndexError):
        raise VlscaleError(f"{origin}: its tables are no tables, so the model's size is not known") from None
    if "image_embedder.projection.weight" in shapes:
        sizes["feature_dim"] = shapes["image_embedder.projection.weight"][-1]
    if "region_classifier.out.weight" in shapes:
        sizes["num_classes"] = shapes["region_classifier.out.weight"][0]
    return sizes


def config_of_shapes(
    shapes: Mapping[str, tuple[int, ...]], heads: int | None, origin: str, more: Mapping[str, Any]
) -> UniterConfig:
    """Find the configuration that a checkpoint's tensors belong to.

    Args:
        shapes: our name -> shape.
        heads: attention heads, the one size that no tensor shows; None for a published width (64 a head).
        origin: named in errors.
        more: further fields; sizes that tensors show win over them.

    Raises:
        VlscaleError: tensors are missing that show a size, or the heads are not known.
    """
    sizes = sizes_of_shapes(shapes, origin)
    hidden = sizes["hidden_size"]
    if heads is None and hidden not in PUBLISHED_WIDTHS:
        raise VlscaleError(
            f"{origin}: attention heads of a model {hidden} wide are not known; give --model CONFIG.json"
        )
    return parse_config(UniterConfig, {**more, **sizes, "num_attention_heads": heads or hidden // 64}, origin)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
