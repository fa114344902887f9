"""Small BERTs and RoBERTas of the library ``transformers``, every weight of them random, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "attn_implementation": "eager",
}


def filled(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model for evaluation, without a weight that is 0 or 1 as it was made: a mistaken one would not show."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=draw) * scale)
    return model.eval()


def bert(seed: int = 0, kind: type[PreTrainedModel] = BertForPreTraining, **sizes: Any) -> PreTrainedModel:
    return filled(kind(BertConfig(**{**SIZES, **sizes})), seed)


def roberta(seed: int = 0, kind: type[PreTrainedModel] = RobertaForMaskedLM, **sizes: Any) -> PreTrainedModel:
    own = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
    return filled(kind(RobertaConfig(**{**SIZES, **own, **sizes})), seed)


def saved(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def texts(config: PretrainedConfig, length: int, seed: int = 0) -> Tensor:
    """int64 [3, length], no padding."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (3, length), generator=draw)


def hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """float [B, L, H]: what the encoder of a model with or without heads makes of texts."""
    with torch.no_grad():
        return model.base_model(input_ids=input_ids).last_hidden_state


def bert_of(state: dict[str, Tensor], config: PretrainedConfig) -> BertModel:
    """A BERT with exactly these weights of embeddings and encoder."""
    own = {
        "vocab_size": len(state["embeddings.word_embeddings.weight"]),
        "max_position_embeddings": len(state["embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(state["embeddings.token_type_embeddings.weight"]),
        "model_type": "bert",
        "attn_implementation": "eager",
    }
    model = BertModel(BertConfig(**{**config.to_dict(), **own}), add_pooling_layer=False)
    model.to(state["embeddings.LayerNorm.weight"].dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not missing
    return model.eval()
