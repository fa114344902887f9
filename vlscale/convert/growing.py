"""Tables that are shorter in the weights a run starts from than in its model: added word pieces, types of segments.

UNITER's second stage on VCR adds 81 word pieces and two types to a pre-trained model. As published, added words start
from random values and added types as type 0. The published code also throws the trained word head away; here it is
kept (``grow``) unless the run is to repeat the published one (``reference``).
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor

from vlscale.config import InitTables
from vlscale.data.schema import grown_fingerprint
from vlscale.errors import VlscaleError
from vlscale.models.registry import ModelConfig
from vlscale.models.uniter import UniterConfig

WORDS, BIAS, HEAD = "text_embedder.word.weight", "word_head.bias", "word_head."
TYPES = ("type_embedding.weight", "text_embedder.types.weight")
"""Of a UNITER and of a UNIMO; a UNIMO may have none."""
_SIZES = {"vocab_size": "word", "type_vocab_size": "type"}
_WHOLE = ("images", "role_vocab_size", "turn_vocab_size")


def check_tables(path: Path, saved: ModelConfig, config: ModelConfig, tables: InitTables) -> None:
    """Compare the tables of a folder with those of the model, before any weight is read.

    Args:
        path: the folder, for errors.
        saved: its configuration.
        config: the model's.
        tables: the recipe's ``model.init_tables``.

    Raises:
        VlscaleError: the model has fewer rows, or more though ``tables`` is ``exact``; or the vocabularies differ by
            more than word pieces added at the end.
    """
    for key, what in _SIZES.items():
        old, new = getattr(saved, key), getattr(config, key)
        if old > new:
            raise VlscaleError(
                f"{path}: {key} is {old}, the model's is {new}; tables cannot shrink: set model.config.{key}={old}"
            )
        if old < new and tables == "exact":
            raise VlscaleError(
                f"{path}: {key} is {old}, the model's is {new}; if its first {old} {what}s mean the same, set "
                f"model.init_tables=grow, else model.config.{key}={old}"
            )
    added = config.vocab_size - saved.vocab_size
    known, expected = config.vocab_fingerprint, saved.vocab_fingerprint
    if known is None or expected is None or known == grown_fingerprint(expected, added):
        return
    raise VlscaleError(
        f"{path}: the weights were trained with the vocabulary {expected[:12]}, the texts have {known[:12]}"
        + (f", which is not the same with {added} added tokens" if added else "")
        + "; import the texts with the tokenizer that the weights were trained with"
        + (f" and --added-tokens {added}" if added else "")
    )


def old_sizes(saved: ModelConfig, config: ModelConfig) -> ModelConfig:
    """Return the model's configuration with the heads and the table sizes of the folder, which its weights must fit.

    A folder of a UNIMO may also lack images, roles and turns.
    """
    keys = ("heads", *_SIZES) if isinstance(config, UniterConfig) else ("heads", *_SIZES, *_WHOLE)
    return config.model_copy(update={key: getattr(saved, key) for key in keys})


def grow_tables(
    state: dict[str, Tensor], saved: ModelConfig, config: ModelConfig, tables: InitTables
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state with tables as long as the model's, and what was done, in words.

    Values of new rows follow from the table's name alone, so that all processes of a run draw the same.
    """
    words, types = config.vocab_size - saved.vocab_size, config.type_vocab_size - saved.type_vocab_size
    done: list[str] = []
    table = next((name for name in TYPES if name in state), None)
    if types and table is not None:
        state = state | {table: torch.cat([state[table], state[table][:1].expand(types, -1)])}
        done.append(f"{types} types added, as type 0")
    if not words:
        return state, tuple(done)
    new = torch.empty(words, config.hidden_size)
    new.normal_(std=config.weights.of(config.hidden_size), generator=_generator(WORDS))
    state = state | {WORDS: torch.cat([state[WORDS], new.to(state[WORDS].dtype)])}
    done.append(f"{words} words added, random")
    if BIAS in state and tables == "reference":
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
        done.append("word head left out, as published")
    elif BIAS in state:
        state = state | {BIAS: torch.cat([state[BIAS], state[BIAS].new_zeros(words)])}
        done.append("word head kept (model.init_tables=reference would leave it out, as published)")
    return state, tuple(done)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
