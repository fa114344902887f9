"""Hugging Face BERT folders, the published starting point of UNITER's pre-training.

Files are read by :mod:`vlscale.convert.huggingface`. The library ``transformers`` is not needed for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlscale.convert.huggingface import EncoderShape, kind_of, open_source
from vlscale.convert.text_encoders import TextWeights, text_weights
from vlscale.convert.uniter import from_official
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, read_json
from vlscale.models.uniter import UniterConfig

_SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size"),
)
_REQUIRED = re.compile(r"type_embedding\.|text_embedder\.|encoder\.")
_SHOWN = 6


@dataclass(frozen=True)
class BertWeights:
    """What a BERT folder holds for a UNITER.

    Attributes:
        state: our names -> tensors in float32.
        ignored: names of the folder that have no place in the model (next-sentence head, index buffers).
        vocabulary: where the word table's numbering comes from, see
            :attr:`~vlscale.convert.huggingface.HuggingFaceSource.vocabulary`.
    """

    state: dict[str, Tensor]
    ignored: tuple[str, ...]
    vocabulary: Mapping[str, Any]


def is_bert_folder(folder: Path) -> bool:
    """Whether ``config.json`` says that the folder holds a BERT."""
    return kind_of(read_json(folder / CONFIG_FILE)) == "bert"


def read_bert(folder: Path, config: UniterConfig) -> BertWeights:
    """Read a BERT folder's weights under this library's names.

    Names may carry the prefix ``bert.`` or not, and LayerNorms may be called gamma/beta. The word-prediction head is
    taken if it is there, the heads of other tasks are not.

    Args:
        folder: holds ``config.json`` and the weights, whole or in shards.
        config: the model that the weights are for.

    Raises:
        VlscaleError: the shapes differ, a file is missing or damaged, weights of the encoder are missing, or names
            are found that a BERT does not have.
    """
    path = folder / CONFIG_FILE
    _check_sizes(read_json(path), config, path)  # what the model's own setting mends is told first
    with open_source(folder) as source:
        _check_arithmetic(source.shape, config, path)
        weights = text_weights(source, "uniter")
        _check_names(weights, folder)
        try:
            state = from_official({name: weights.read(name) for name in weights.entries}, partial=True)
        except VlscaleError as error:
            raise VlscaleError(f"{folder}: {str(error).replace('uniter.', 'bert.')}") from None
        return BertWeights(state, tuple(sorted(weights.ignored)), source.vocabulary)


def required_names(names: set[str]) -> set[str]:
    """Those of a model's names that every BERT folder must provide: tables, embedding norm, encoder."""
    return {name for name in names if _REQUIRED.match(name)}


def _check_names(weights: TextWeights, folder: Path) -> None:
    """What is missing, the caller tells under the model's names."""
    names = weights.unexpected
    if names:
        more = ", ..." if len(names) > _SHOWN else ""
        raise VlscaleError(
            f"{folder}: {len(names)} unexpected: {', '.join(names[:_SHOWN])}{more}; give the folder of a plain BERT"
        )


def _check_sizes(raw: Mapping[str, Any], config: UniterConfig, path: Path) -> None:
    for key in _SAME:
        if raw.get(key) != getattr(config, key):
            raise VlscaleError(
                f"{path}: {key} is {str(raw.get(key))[:40]}, the model's is {getattr(config, key)}; set "
                f"model.config.{key}"
                + (" or use this folder's vocabulary for the texts" if key == "vocab_size" else "")
            )


def _check_arithmetic(shape: EncoderShape, config: UniterConfig, path: Path) -> None:
    if shape.kind != "bert":
        raise VlscaleError(f"{path}: model_type is {shape.kind!r}, expected 'bert'")
    if config.norm != "post":
        raise VlscaleError(f"{path}: BERT's weights are for norm: post, the model has norm: {config.norm}")
    if shape.layer_norm_eps != config.layer_norm_eps:
        raise VlscaleError(
            f"{path}: layer_norm_eps is {shape.layer_norm_eps}, the model's is {config.layer_norm_eps}; set "
            f"model.config.layer_norm_eps"
        )
