"""UNIMO's published variables, and those of PaddleNLP's text models, as this library's names, and back.

Paddle keeps linear weights [in, out]; query, key and value are separate there and one projection here. Both are undone
exactly. A conversion runs in two plans, one after the other: the first renames and transposes tensor by tensor, the
second joins query, key and value (or, on the way back, the first cuts and the second transposes).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from vlscale.convert.layer_names import layer_count
from vlscale.convert.steps import THIRDS, KeyPlan, Step
from vlscale.convert.task_heads import TASK_HEAD, TASK_NAMES, is_task_name
from vlscale.errors import VlscaleError
from vlscale.models.folder import parse_config
from vlscale.models.unimo_config import UNIMO_HEADS, UnimoConfig, UnimoHead

UnimoLayout = Literal["unimo", "unimo-text"]


class _Rule(NamedTuple):
    """Published name, ours, and whether it is a linear weight; ``{i}`` is the layer, ``{part}`` query, key or value."""

    theirs: str
    ours: str
    transposed: bool = False


def _linear(theirs: str, ours: str, weight: str, bias: str) -> tuple[_Rule, _Rule]:
    return _Rule(f"{theirs}{weight}", f"{ours}.weight", True), _Rule(f"{theirs}{bias}", f"{ours}.bias")


def _fluid(theirs: str, ours: str) -> tuple[_Rule, _Rule]:
    return _linear(theirs, ours, ".w_0", ".b_0")


def _fluid_norm(theirs: str, ours: str) -> tuple[_Rule, _Rule]:
    return _Rule(f"{theirs}_layer_norm_scale", f"{ours}.weight"), _Rule(f"{theirs}_layer_norm_bias", f"{ours}.bias")


def _paddle(theirs: str, ours: str) -> tuple[_Rule, _Rule]:
    return _linear(theirs, ours, ".weight", ".bias")


def _paddle_norm(theirs: str, ours: str) -> tuple[_Rule, _Rule]:
    return _Rule(f"{theirs}.weight", f"{ours}.weight"), _Rule(f"{theirs}.bias", f"{ours}.bias")


_OFFICIAL = (
    _Rule("word_embedding", "text_embedder.word.weight"),
    _Rule("pos_embedding", "text_embedder.position.weight"),
    _Rule("role_embedding", "text_embedder.roles.weight"),
    _Rule("turn_embedding", "text_embedder.turns.weight"),
    *_fluid_norm("pre_encoder", "text_embedder.norm"),
    *_fluid("image_emb", "image_embedder.projection"),
    *_fluid("image_loc", "image_embedder.location"),
    *_fluid_norm("v_pre_encoder", "image_embedder.norm"),
    *_fluid("encoder_layer_{i}_multi_head_att_{part}_fc", "encoder.layers.{i}.attention.{part}"),
    *_fluid("encoder_layer_{i}_multi_head_att_output_fc", "encoder.layers.{i}.attention.out"),
    *_fluid_norm("encoder_layer_{i}_post_att", "encoder.layers.{i}.attention_norm"),
    *_fluid("encoder_layer_{i}_ffn_fc_0", "encoder.layers.{i}.ffn.up"),
    *_fluid("encoder_layer_{i}_ffn_fc_1", "encoder.layers.{i}.ffn.down"),
    *_fluid_norm("encoder_layer_{i}_post_ffn", "encoder.layers.{i}.ffn_norm"),
    *_fluid("pooled_fc_text", "text_pooler.dense"),
    *_fluid("pooled_fc_image", "image_pooler.dense"),
    *_fluid("mask_lm_trans_fc", "word_head.transform.dense"),
    *_fluid_norm("mask_lm_trans", "word_head.transform.norm"),
    _Rule("mask_lm_out_fc.b_0", "word_head.bias"),
    *_fluid("match_fc", "match_head"),
)
_PADDLENLP = (
    _Rule("embeddings.word_embeddings.weight", "text_embedder.word.weight"),
    _Rule("embeddings.position_embeddings.weight", "text_embedder.position.weight"),
    _Rule("embeddings.token_type_embeddings.weight", "text_embedder.types.weight"),
    *_paddle_norm("encoder_norm", "text_embedder.norm"),  # the norm of the embeddings, in spite of its name
    *_paddle("encoder.layers.{i}.self_attn.{part}_proj", "encoder.layers.{i}.attention.{part}"),
    *_paddle("encoder.layers.{i}.self_attn.out_proj", "encoder.layers.{i}.attention.out"),
    *_paddle_norm("encoder.layers.{i}.norm1", "encoder.layers.{i}.attention_norm"),
    *_paddle("encoder.layers.{i}.linear1", "encoder.layers.{i}.ffn.up"),
    *_paddle("encoder.layers.{i}.linear2", "encoder.layers.{i}.ffn.down"),
    *_paddle_norm("encoder.layers.{i}.norm2", "encoder.layers.{i}.ffn_norm"),
    *_paddle("lm_head.transform", "word_head.transform.dense"),
    *_paddle_norm("lm_head.layer_norm", "word_head.transform.norm"),
    _Rule("lm_head.decoder_bias", "word_head.bias"),
)
_PARTS = ("query", "key", "value")
_OUR_LAYER = r"encoder\.layers\.(\d+)\."


@dataclass(frozen=True)
class _Names:
    """A layout's rules and what else stands in its names.

    Attributes:
        rules: the key map.
        parts: what query, key and value are called.
        layer: finds the number of a layer.
        prefix: may stand before a name; not before ``lm_head``.
        tied: second name -> the name whose tensor it holds.
    """

    rules: tuple[_Rule, ...]
    parts: tuple[str, str, str]
    layer: str
    prefix: str = ""
    tied: tuple[tuple[str, str], ...] = ()


_LAYOUTS: dict[UnimoLayout, _Names] = {
    "unimo": _Names(_OFFICIAL, _PARTS, r"encoder_layer_(\d+)_"),
    "unimo-text": _Names(
        _PADDLENLP, ("q", "k", "v"), r"encoder\.layers\.(\d+)\.", "unimo.",
        (("lm_head.decoder_weight", "embeddings.word_embeddings.weight"),),
    ),
}  # fmt: skip
_OPTIONAL = ("text_embedder.roles.", "text_embedder.turns.", "image_embedder.")
UNIMO_LAYOUTS: dict[str, UnimoLayout] = {layout: layout for layout in get_args(UnimoLayout)}
"""The layouts whose names this module knows."""
_HEAD_PARTS: dict[str, UnimoHead] = {
    "word_head.": "words",
    "match_head.": "matching",
    "text_pooler.": "text_pooler",
    "image_pooler.": "image_pooler",
    "feature_head.": "features",
    "region_classifier.": "classes",
}


def import_plans(
    names: Iterable[str], layout: UnimoLayout = "unimo", partial: bool = False, tasks: bool = False
) -> tuple[KeyPlan, KeyPlan]:
    """Map a published checkpoint's names to ours, in two plans that run one after the other.

    Heads, the image side, roles and turns may be absent as a whole.

    Args:
        names: of the checkpoint.
        layout: whose names they are.
        partial: nothing is reported missing (gradients). A fused projection still needs query, key and value.
        tasks: heads that fine-tuning added are kept, after :data:`~vlscale.convert.task_heads.TASK_HEAD`; else they
            are ignored.

    Raises:
        VlscaleError: part of a fused projection or a whole layer between others is missing, or a parameter stands
            there with the layout's prefix and without.
    """
    known = _LAYOUTS[layout]
    given: dict[str, str] = {}  # name without the prefix -> as it is called here
    for name in names:
        other = given.setdefault(name.removeprefix(known.prefix), name)
        if other != name:
            raise VlscaleError(f"{layout} checkpoint: {other} and {name} are one parameter under two names; remove one")
    of_tasks = [name for name in given.values() if name.startswith(TASK_NAMES["unimo"])]
    ignored = {} if tasks else {name: "a task's head" for name in of_tasks}
    tied = {given[second]: given[first] for second, first in known.tied if second in given and first in given}
    rules = _rules(known, layer_count(given, known.layer, f"{layout} checkpoint"))
    steps = [
        Step(rule.ours, (given[rule.theirs],), "transpose" if rule.transposed else "copy")
        for rule in rules
        if rule.theirs in given
    ]
    made = [step.target for step in steps]
    steps += [Step(TASK_HEAD + name, (name,)) for name in of_tasks if tasks]
    missing = [rule.theirs for rule in rules if rule.theirs not in given and _expected(rule.ours, made)]
    read = {rule.theirs for rule in rules} | {second for second, _ in known.tied}
    unexpected = [name for short, name in given.items() if short not in read and name not in of_tasks]
    first = KeyPlan(
        tuple(steps), tied, ignored=ignored, missing=() if partial else tuple(missing), unexpected=tuple(unexpected)
    )
    return first, _joining([step.target for step in steps])


def export_plans(names: Iterable[str], layout: UnimoLayout = "unimo") -> tuple[KeyPlan, KeyPlan]:
    """Map our names to the published ones: undoes :func:`import_plans`.

    The heads for regions have no published names: they are ``unexpected`` in the first plan, and so are the parameters
    that the layout does not know.
    """
    known, given = _LAYOUTS[layout], [*names]
    cut: list[Step] = []
    for name in given:
        fused = re.fullmatch(r"(encoder\.layers\.\d+\.attention\.)qkv(\..*)", name)
        if fused is None:
            cut.append(Step(name, (name,)))
        else:
            thirds = zip(_PARTS, THIRDS, strict=True)
            cut += [Step(f"{fused[1]}{part}{fused[2]}", (name,), third) for part, third in thirds]
    theirs = {rule.ours: rule for rule in _rules(known, layer_count(given, _OUR_LAYER, "UNIMO export"))}
    known_names = {*theirs, *(name for name in given if is_task_name(name))}
    kept = [step for step in cut if step.target in known_names]
    unexpected = tuple(step.sources[0] for step in cut if step.target not in known_names)
    with_words = any(name.startswith("word_head.") for name in given)
    inner = known.prefix if with_words else ""  # PaddleNLP's bare models have no prefix
    steps = []
    for step in kept:
        rule = theirs.get(step.target, _Rule(step.target.removeprefix(TASK_HEAD), step.target))
        prefix = "" if rule.theirs.startswith("lm_head.") else inner
        steps.append(Step(prefix + rule.theirs, (step.target,), "transpose" if rule.transposed else "copy"))
    made = {step.target for step in steps}
    tied = {second: inner + first for second, first in known.tied}
    copies = {second: first for second, first in tied.items() if with_words and first in made}
    return KeyPlan(tuple(kept), unexpected=unexpected), KeyPlan(tuple(steps), copies=copies)


def check_exportable(config: UnimoConfig, layout: UnimoLayout) -> None:
    """Look whether the published model of a layout computes what ours does.

    Raises:
        VlscaleError: it does not; what differs is named.
    """
    first = {"unimo": 2, "unimo-text": 0}[layout]
    differs = {
        f"norm: {config.norm}": config.norm != "post",
        f"first_position: {config.first_position}": config.first_position != first,
        "images: true": layout == "unimo-text" and config.images,
    }
    for what, found in differs.items():
        if found:
            raise VlscaleError(f"the model has {what}, which {layout} has not; --to state-dict keeps its names")


def from_official(
    state: Mapping[str, Tensor], layout: UnimoLayout = "unimo", partial: bool = False
) -> dict[str, Tensor]:
    """Turn a published state dict (or a dict of gradients) into this library's names and shapes.

    Raises:
        VlscaleError: names are missing or unexpected, or tied tensors differ.
    """
    first, second = import_plans(state, layout, partial)
    first.check(f"{layout} checkpoint")
    return second.run(first.run(state, f"{layout} checkpoint"), f"{layout} checkpoint")


def to_official(state: Mapping[str, Tensor], layout: UnimoLayout = "unimo") -> dict[str, Tensor]:
    """Turn our state dict (or gradients) into published names and shapes, as far as there are any; undoes the above."""
    first, second = export_plans(state, layout)
    made = second.run(first.run(state, "UNIMO export"), "UNIMO export")
    return made | {name: made[tied] for name, tied in second.copies.items()}


def config_from_official(raw: Mapping[str, Any], names: Iterable[str], **more: Any) -> UnimoConfig:
    """Read the published JSON configuration of an English model.

    Args:
        raw: the JSON object.
        names: of the checkpoint's variables; they tell which heads and tables there are.
        **more: fields of :class:`UnimoConfig` to lay over it.

    Raises:
        VlscaleError: a key is missing, or a value is not supported.
    """
    names = {*names}
    made = {step.target for step in import_plans(names)[0].steps}
    sizes = _settings(raw, _OFFICIAL_KEYS, "UNIMO configuration")
    for table in ("role", "turn"):
        if f"{table}_embedding" in names:
            sizes[f"{table}_vocab_size"] = raw[f"{table}_type_size"]
    settings = {
        "intermediate_size": 4 * sizes["hidden_size"],  # hard-wired there
        "images": any(name.startswith("image_embedder.") for name in made),
        "heads": heads_of(made),
        **sizes,
        **more,
    }
    return parse_config(UnimoConfig, settings, "UNIMO configuration")


def config_from_paddlenlp(raw: Mapping[str, Any], names: Iterable[str], **more: Any) -> UnimoConfig:
    """Read PaddleNLP's JSON configuration of a text model; see :func:`config_from_official`."""
    if raw.get("normalize_before"):
        raise VlscaleError("PaddleNLP configuration: normalize_before is true, only false is supported")
    made = {step.target for step in import_plans(names, "unimo-text")[0].steps}
    settings = {"first_position": 0, "images": False, "heads": heads_of(made)}
    sizes = _settings(raw, _PADDLENLP_KEYS, "PaddleNLP configuration")
    return parse_config(UnimoConfig, {**settings, **sizes, **more}, "PaddleNLP configuration")


_SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_act": "activation",
}
_OPTIONAL_KEYS = {
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
}
_OFFICIAL_KEYS = {
    **_SHARED_KEYS,
    "image_embedding_size": "feature_dim",
    "image_class_size": "num_classes",
    "fusion_method": "match_fusion",
}
_PADDLENLP_KEYS = {**_SHARED_KEYS, "intermediate_size": "intermediate_size", "type_vocab_size": "type_vocab_size"}


def _settings(raw: Mapping[str, Any], keys: Mapping[str, str], origin: str) -> dict[str, Any]:
    absent = [key for key in keys if key not in raw and key != "fusion_method"]
    if absent:
        raise VlscaleError(f"{origin}: {', '.join(absent)} missing; give the configuration of these weights")
    return {ours: raw[theirs] for theirs, ours in {**keys, **_OPTIONAL_KEYS}.items() if theirs in raw}


def heads_of(names: Iterable[str]) -> list[UnimoHead]:
    """Return the heads that our names are of."""
    names = [*names]
    found = {head for prefix, head in _HEAD_PARTS.items() if any(name.startswith(prefix) for name in names)}
    return [head for head in UNIMO_HEADS if head in found]


def _rules(known: _Names, layers: int) -> list[_Rule]:
    """The rules, those of layers for every layer and those of query, key and value for each."""
    rules = []
    for rule in known.rules:
        for index in range(layers) if "{i}" in rule.ours else (0,):
            for part, ours in zip(known.parts, _PARTS, strict=True) if "{part}" in rule.ours else (("", ""),):
                rules.append(
                    _Rule(rule.theirs.format(i=index, part=part), rule.ours.format(i=index, part=ours), rule.transposed)
                )
    return rules


def _expected(ours: str, made: Iterable[str]) -> bool:
    """Whether one of our names should be there: what may be absent is expected once a part of it is there."""
    for prefix in (*_OPTIONAL, *_HEAD_PARTS):
        if ours.startswith(prefix):
            return any(name.startswith(prefix) for name in made)
    return True


def _joining(made: Iterable[str]) -> KeyPlan:
    """Join query, key and value; all else is kept.

    Raises:
        VlscaleError: one of the three is missing.
    """
    given, steps = [*made], []
    for name in given:
        part = re.fullmatch(r"(encoder\.layers\.\d+\.attention\.)(query|key|value)(\..*)", name)
        if part is None:
            steps.append(Step(name, (name,)))
            continue
        three = tuple(f"{part[1]}{each}{part[3]}" for each in _PARTS)
        absent = [each for each in three if each not in given]
        if absent:
            raise VlscaleError(f"UNIMO checkpoint: {part[1]}qkv{part[3]} needs {', '.join(absent)} too")
        if part[2] == "query":
            steps.append(Step(f"{part[1]}qkv{part[3]}", three, "concatenate"))
    return KeyPlan(tuple(steps))
