"""Hugging Face BERT folders, the published starting point of UNITER's pre-training.

Reads ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``, unpickled as weights only). The library
``transformers`` is not needed for that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlscale.convert.uniter import from_official
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, WEIGHTS_FILE, read_json, read_safetensors
from vlscale.models.uniter import UniterConfig

PICKLED_FILE = "pytorch_model.bin"
_IGNORED = re.compile(r"(bert\.)?embeddings\.(position|token_type)_ids|cls\.seq_relationship\..*")
_SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_TABLES = ("max_position_embeddings", "type_vocab_size")
_REQUIRED = re.compile(r"type_embedding\.|text_embedder\.|encoder\.")


@dataclass(frozen=True)
class BertWeights:
    """What a BERT folder holds for a UNITER.

    Attributes:
        state: our names -> tensors in float32.
        ignored: names of the folder that have no place in the model (next-sentence head, index buffers).
    """

    state: dict[str, Tensor]
    ignored: tuple[str, ...]


def is_bert_folder(folder: Path) -> bool:
    """Whether ``config.json`` says that the folder holds a BERT."""
    return read_json(folder / CONFIG_FILE).get("model_type", "bert") == "bert"


def read_bert(folder: Path, config: UniterConfig) -> BertWeights:
    """Read a BERT folder's weights under this library's names.

    Names may carry the prefix ``bert.`` or not, and LayerNorms may be called gamma/beta. The word-prediction head is
    taken if it is there, the next-sentence head is not.

    Args:
        folder: holds ``config.json`` and the weights in one file.
        config: the model that the weights are for.

    Raises:
        VlscaleError: the shapes differ, a file is missing or damaged, weights of the encoder are missing, or names
            are found that a BERT does not have.
    """
    _check_config(read_json(folder / CONFIG_FILE), config, folder / CONFIG_FILE)
    renamed: dict[str, Tensor] = {}
    ignored = []
    for name, tensor in _read_tensors(folder).items():
        if _IGNORED.fullmatch(name):
            ignored.append(name)
            continue
        target = _official(name)
        if target in renamed:
            raise VlscaleError(f"{folder}: {name} stands twice, with and without its prefix; remove one")
        renamed[target] = tensor
    bias = renamed.pop("cls.predictions.decoder.bias", None)  # newer files tie it to cls.predictions.bias
    if bias is not None:
        renamed.setdefault("cls.predictions.bias", bias)
    try:
        state = from_official(renamed, partial=True)
    except VlscaleError as error:
        raise VlscaleError(f"{folder}: {str(error).replace('uniter.', 'bert.')}") from None
    return BertWeights(state, tuple(sorted(ignored)))


def required_names(names: set[str]) -> set[str]:
    """Those of a model's names that every BERT folder must provide: tables, embedding norm, encoder."""
    return {name for name in names if _REQUIRED.match(name)}


def _official(name: str) -> str:
    if name.startswith("bert."):
        return "uniter." + name.removeprefix("bert.")
    return name if name.startswith("cls.") else f"uniter.{name}"


def _check_config(raw: dict[str, Any], config: UniterConfig, path: Path) -> None:
    if raw.get("model_type", "bert") != "bert":
        raise VlscaleError(f"{path}: model_type is {raw['model_type']!r}, expected 'bert'")
    if config.norm != "post":
        raise VlscaleError(f"{path}: BERT's weights are for norm: post, the model has norm: {config.norm}")
    if raw.get("hidden_act", "gelu") != "gelu":
        raise VlscaleError(f"{path}: hidden_act is {raw['hidden_act']!r}, expected 'gelu' (the exact one)")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise VlscaleError(
            f"{path}: position_embedding_type is {raw['position_embedding_type']!r}, expected 'absolute'"
        )
    for key in (*_SAME, *_TABLES):
        if raw.get(key) != getattr(config, key):
            raise VlscaleError(
                f"{path}: {key} is {raw.get(key)}, the model's is {getattr(config, key)}; set model.config.{key}"
                + (" or use this folder's vocabulary for the texts" if key == "vocab_size" else "")
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS_FILE).is_file():
        return read_safetensors(folder / WEIGHTS_FILE)
    path = folder / PICKLED_FILE
    if not path.is_file():
        raise VlscaleError(
            f"{folder}: neither {WEIGHTS_FILE} nor {PICKLED_FILE} found (weights in one file are needed)"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to lead to, often without a message
        reason = (str(error).splitlines() or [""])[0]
        raise VlscaleError(f"{path}: damaged, or holds more than weights ({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise VlscaleError(f"{path}: expected a dictionary of tensors")
    return dict(state)
