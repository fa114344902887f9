"""A BERT's or RoBERTa's weights as the beginning of UNITER, ViLBERT, UniT's text encoder and UNIMO: the key maps.

A map is a table of :class:`Rule`. Its left names are BERT's without their prefix, LayerNorms with weight and bias; the
word-prediction head is called ``head`` on the left, because BERT and RoBERTa name it differently. Its right names are
those of the model's published checkpoints, from which every model's own map goes on. What a text encoder has no weights
for (regions, co-attention, image poolers) stays as the model was made.

Three operations are more than a copy or a transposition:

- ``fold`` adds row 0 of the token types to every word, for UNIMO, which has no types. Embeddings are a sum, so the
  encoder's output stays the same. The word-prediction head, whose matrix is the word table, then adds one constant to
  the scores of all words, which no softmax sees.
- ``positions`` moves the position table so that a text's first token finds its row: row 0 in BERT's layout, row 2 in
  RoBERTa's and UNIMO's. Rows for no token are dropped, or filled with zeros.
- ``types`` repeats the one row of RoBERTa's type table for models that tell two segments apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlscale.convert.huggingface import EncoderShape, HuggingFaceSource
from vlscale.convert.source import TensorInfo
from vlscale.convert.steps import modern
from vlscale.errors import VlscaleError
from vlscale.untrusted import shown


class Rule(NamedTuple):
    """One line of a key map.

    Attributes:
        source: BERT's name; ``{i}`` stands for every layer, ``{part}`` for query, key and value, ``{p}`` for weight and
            bias.
        target: the published name of the model, with the same marks.
        operation: ``copy``, ``transpose``, ``fold``, ``positions`` or ``types``.
    """

    source: str
    target: str
    operation: str = "copy"


WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
PARTS = ("query", "key", "value")

LAYOUT: tuple[tuple[str, str], ...] = (
    (WORDS, "VH"),
    (POSITIONS, "PH"),
    (TYPES, "TH"),
    ("embeddings.LayerNorm.{p}", "H"),
    ("encoder.layer.{i}.attention.self.{part}.weight", "HH"),
    ("encoder.layer.{i}.attention.self.{part}.bias", "H"),
    ("encoder.layer.{i}.attention.output.dense.weight", "HH"),
    ("encoder.layer.{i}.attention.output.dense.bias", "H"),
    ("encoder.layer.{i}.attention.output.LayerNorm.{p}", "H"),
    ("encoder.layer.{i}.intermediate.dense.weight", "FH"),
    ("encoder.layer.{i}.intermediate.dense.bias", "F"),
    ("encoder.layer.{i}.output.dense.weight", "HF"),
    ("encoder.layer.{i}.output.dense.bias", "H"),
    ("encoder.layer.{i}.output.LayerNorm.{p}", "H"),
    ("pooler.dense.weight", "HH"),
    ("pooler.dense.bias", "H"),
    ("head.dense.weight", "HH"),
    ("head.dense.bias", "H"),
    ("head.norm.{p}", "H"),
    ("head.bias", "V"),
)
"""What a BERT holds, and its sides: V words, P positions, T types, width H, feed-forward width F."""

_HEADS: dict[str, dict[str, str]] = {
    "bert": {
        "cls.predictions.transform.dense": "head.dense",
        "cls.predictions.transform.LayerNorm": "head.norm",
        "cls.predictions.decoder": "head.decoder",
        "cls.predictions": "head",
    },
    "roberta": {
        "lm_head.dense": "head.dense",
        "lm_head.layer_norm": "head.norm",
        "lm_head.decoder": "head.decoder",
        "lm_head": "head",
    },
}
_TIED = {"head.decoder.weight": WORDS, "head.decoder.bias": "head.bias"}
"""Second names that files may hold beside, or instead of, the first."""


def _bert_names(prefix: str, *more: str) -> tuple[Rule, ...]:
    """BERT's own names behind a prefix: embeddings and encoder, and ``more``."""
    return tuple(
        Rule(source, prefix + source, {POSITIONS: "positions", TYPES: "types"}.get(source, "copy"))
        for source, _ in LAYOUT
        if source.startswith(("embeddings.", "encoder.", *more))
    )


_BERT_HEAD = (
    Rule("head.dense.{p}", "cls.predictions.transform.dense.{p}"),
    Rule("head.norm.{p}", "cls.predictions.transform.LayerNorm.{p}"),
    Rule("head.bias", "cls.predictions.bias"),
)
_UNIMO = (
    Rule(WORDS, "word_embedding", "fold"),
    Rule(POSITIONS, "pos_embedding", "positions"),
    Rule("embeddings.LayerNorm.weight", "pre_encoder_layer_norm_scale"),
    Rule("embeddings.LayerNorm.bias", "pre_encoder_layer_norm_bias"),
    *(
        rule
        for source, target in (
            ("encoder.layer.{i}.attention.self.{part}", "encoder_layer_{i}_multi_head_att_{part}_fc"),
            ("encoder.layer.{i}.attention.output.dense", "encoder_layer_{i}_multi_head_att_output_fc"),
            ("encoder.layer.{i}.intermediate.dense", "encoder_layer_{i}_ffn_fc_0"),
            ("encoder.layer.{i}.output.dense", "encoder_layer_{i}_ffn_fc_1"),
            ("head.dense", "mask_lm_trans_fc"),
        )
        for rule in (
            Rule(f"{source}.weight", f"{target}.w_0", "transpose"),  # Paddle keeps [in, out]
            Rule(f"{source}.bias", f"{target}.b_0"),
        )
    ),
    *(
        rule
        for source, target in (
            ("encoder.layer.{i}.attention.output.LayerNorm", "encoder_layer_{i}_post_att_layer_norm"),
            ("encoder.layer.{i}.output.LayerNorm", "encoder_layer_{i}_post_ffn_layer_norm"),
            ("head.norm", "mask_lm_trans_layer_norm"),
        )
        for rule in (Rule(f"{source}.weight", f"{target}_scale"), Rule(f"{source}.bias", f"{target}_bias"))
    ),
    Rule("head.bias", "mask_lm_out_fc.b_0"),
)


@dataclass(frozen=True)
class TextEncoder:
    """Where a model takes a BERT.

    Attributes:
        rules: the key map.
        first_position: row of the position table for a text's first token.
        no_place: why parts of a BERT that the map leaves out are not taken: prefix of their names -> reason.
    """

    rules: tuple[Rule, ...]
    first_position: int
    no_place: Mapping[str, str]


MODELS: dict[str, TextEncoder] = {
    "uniter": TextEncoder((*_bert_names("uniter.", "pooler."), *_BERT_HEAD), 0, {}),
    "vilbert": TextEncoder(
        (*_bert_names("bert."), *_BERT_HEAD), 0, {"pooler.": "ViLBERT's text pooler has another width and activation"}
    ),
    "unit": TextEncoder(
        _bert_names("bert_model.module.", "pooler."), 0, {"head.": "UniT's text encoder predicts no words"}
    ),
    "unimo": TextEncoder(
        _UNIMO,
        2,
        {"pooler.": "UNIMO's poolers have another activation", TYPES: "its row 0 is folded into the word table"},
    ),
}
"""Model -> its map. Targets are the names of the published checkpoints."""

_BUFFERS = re.compile(r"embeddings\.(position|token_type)_ids")
_OTHER_HEADS = re.compile(r"(cls\.seq_relationship|classifier|qa_outputs)\..*")
_OPTIONAL = ("pooler.", "head.")


class Entry(NamedTuple):
    """How one tensor of the result comes about.

    Attributes:
        sources: stored names; for ``fold`` the word table and the types.
        operation: see :class:`Rule`.
        info: dtype and shape of the result.
    """

    sources: tuple[str, ...]
    operation: str
    info: TensorInfo


@dataclass(frozen=True)
class TextWeights:
    """The tensors that a folder provides for a model, made one at a time.

    Attributes:
        source: the folder.
        model: key of :data:`MODELS`.
        entries: published name of the model -> how it comes about.
        ignored: stored name -> why it is not taken.
        tied: stored name -> stored name of the same tensor, which is taken.
        missing: BERT's names that embeddings and encoder need and the folder lacks.
        absent: BERT's names of pooler and word head that the folder lacks; many have none.
        unexpected: stored names that no BERT has.
    """

    source: HuggingFaceSource
    model: str
    entries: Mapping[str, Entry]
    ignored: Mapping[str, str]
    tied: Mapping[str, str]
    missing: tuple[str, ...]
    absent: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Published name -> dtype and shape."""
        return {name: entry.info for name, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """Make one tensor, on the CPU; at most two of the folder's are in memory with it.

        Raises:
            VlscaleError: the folder's file is damaged, or has been changed.
        """
        entry = self.entries[name]
        tensors = [self.source.read(each) for each in entry.sources]
        return _make(entry.operation, tensors, self.source.shape.first_position, MODELS[self.model].first_position)


def text_weights(source: HuggingFaceSource, model: str) -> TextWeights:
    """Lay out what a folder provides for a model. Only tensors that must equal each other are read.

    Args:
        source: an open folder.
        model: key of :data:`MODELS`.

    Raises:
        VlscaleError: an unknown model, a tensor that stands twice, is of another shape than ``config.json`` says or is
            not of floating point, or tied tensors that differ.
    """
    if model not in MODELS:
        raise VlscaleError(f"{source.path}: no text encoder {model!r}; known: {', '.join(MODELS)}")
    encoder, shape = MODELS[model], source.shape
    expected = _expected(shape)
    found, ignored, unexpected = _sort(source, expected)
    rules = {rule.source: rule for pattern in encoder.rules for rule in _expand(pattern, shape.num_hidden_layers)}
    tied = _merge_tied(source, found, rules)
    _check_shapes(source, found, expected)
    used = {TYPES} if any(rule.operation == "fold" for rule in rules.values()) else set()
    for name, stored in found.items():
        if name not in rules:
            reason = next((why for part, why in encoder.no_place.items() if name.startswith(part)), None)
            ignored[stored] = reason or f"{model} has no place for it"
    lacking = [name for name in expected if name not in found and (name in rules or name in used)]
    entries = {}
    for name, rule in rules.items():
        sources = (name, TYPES) if rule.operation == "fold" else (name,)
        if all(each in found for each in sources):
            stored_names = tuple(found[each] for each in sources)
            infos = [source.tensors[each] for each in stored_names]
            empty = [torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos]
            made = _make(rule.operation, empty, shape.first_position, encoder.first_position)
            entries[rule.target] = Entry(stored_names, rule.operation, TensorInfo(made.dtype, tuple(made.shape)))
    return TextWeights(
        source,
        model,
        entries,
        ignored,
        tied,
        tuple(name for name in lacking if not name.startswith(_OPTIONAL)),
        tuple(name for name in lacking if name.startswith(_OPTIONAL)),
        tuple(unexpected),
    )


def _expected(shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    """BERT's names -> the shapes that ``config.json`` promises."""
    sides = {
        "V": shape.vocab_size,
        "P": shape.max_position_embeddings,
        "T": shape.type_vocab_size,
        "H": shape.hidden_size,
        "F": shape.intermediate_size,
    }
    return {
        rule.source: tuple(sides[side] for side in letters)
        for pattern, letters in LAYOUT
        for rule in _expand(Rule(pattern, pattern), shape.num_hidden_layers)
    }


def _expand(rule: Rule, layers: int) -> list[Rule]:
    """Fill in layers, parts, weight and bias."""
    return [
        Rule(rule.source.format(i=i, part=part, p=p), rule.target.format(i=i, part=part, p=p), rule.operation)
        for i in range(layers if "{i}" in rule.source else 1)
        for part in (PARTS if "{part}" in rule.source else ("",))
        for p in (("weight", "bias") if "{p}" in rule.source else ("",))
    ]


def _sort(
    source: HuggingFaceSource, expected: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return BERT's name -> stored name, stored name -> why it is ignored, and names that no BERT has."""
    found: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unexpected = []
    for stored in source.tensors:
        name = _plain(stored, source.shape.kind)
        if _BUFFERS.fullmatch(name):
            ignored[stored] = "an index table, not a weight"
        elif name in expected or name in _TIED:
            if name in found:
                raise VlscaleError(
                    f"{source.path}: {shown(stored)} stands twice, also as {shown(found[name])} (with and without its "
                    f"prefix, or as gamma/beta and weight/bias); remove one"
                )
            found[name] = stored
        elif _OTHER_HEADS.fullmatch(stored):
            ignored[stored] = "the head of another task"
        else:
            unexpected.append(stored)
    return found, ignored, unexpected


def _plain(stored: str, kind: str) -> str:
    """The name without prefix, LayerNorms as today, the word head as ``head``."""
    stem, _, last = modern(stored.removeprefix(f"{kind}.")).rpartition(".")
    if stem.split(".")[0] == "head":  # our word for it, no name of a file
        return f".{stored}"
    return f"{_HEADS[kind].get(stem, stem)}.{last}"


def _merge_tied(source: HuggingFaceSource, found: dict[str, str], rules: Mapping[str, Rule]) -> dict[str, str]:
    """Let a second name stand for a first that is missing; where both are there and needed, they must be equal."""
    tied = {}
    for second, first in _TIED.items():
        stored = found.pop(second, None)
        kept = found.setdefault(first, stored) if stored is not None else None
        if stored is None or kept is None or kept == stored:
            continue
        if "head.bias" in rules and source.aliases.get(stored) != kept and not _equal(source, stored, kept):
            raise VlscaleError(
                f"{source.path}: {shown(stored)} differs from {shown(kept)}, but a model of this kind has one for "
                f"both; remove {shown(stored)}"
            )
        tied[stored] = kept
    return tied


def _equal(source: HuggingFaceSource, one: str, other: str) -> bool:
    """Whether two tensors have the same bits; the largest of a file, so never both in memory."""
    if source.tensors[one] != source.tensors[other]:
        return False
    flat = (source.read(name).reshape(-1).view(torch.uint8) for name in (one, other))
    return len({hashlib.sha256(each.numpy().data).digest() for each in flat}) == 1


def _check_shapes(source: HuggingFaceSource, found: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, stored in found.items():
        info = source.tensors[stored]
        if info.shape != expected[name]:
            raise VlscaleError(
                f"{source.path}: {shown(stored)[1:-1]} is {list(info.shape)}, expected {list(expected[name])} by "
                f"config.json; fetch both of one release"
            )
        if not info.dtype.is_floating_point:
            raise VlscaleError(
                f"{source.path}: {shown(stored)} is {info.dtype}, expected floating point; use the unquantised weights"
            )


def _make(operation: str, tensors: Sequence[Tensor], first: int, wanted: int) -> Tensor:
    """Run an operation; ``positions`` puts row ``first`` at row ``wanted``. Tensors without content tell the shape."""
    tensor = tensors[0]
    if operation == "transpose":
        return tensor.t().contiguous()
    if operation == "fold":
        dtype = torch.promote_types(tensor.dtype, torch.float32)  # half precision would round the sum
        return tensor.to(dtype).add_(tensors[1][0].to(dtype))
    if operation == "types" and len(tensor) == 1:
        return tensor.expand(2, -1).contiguous()
    if operation == "positions" and first != wanted:
        rows_PH = tensor[first:]
        return torch.cat([rows_PH.new_zeros(wanted, rows_PH.shape[1]), rows_PH])
    return tensor
