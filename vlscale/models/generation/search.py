"""The entry point of generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlscale.errors import VlscaleError
from vlscale.models.folder import parse_config
from vlscale.models.generation.decoder import Decoder
from vlscale.models.generation.loop import search_or_sample
from vlscale.models.generation.official import official_beams
from vlscale.models.generation.pooled import pooled_beams
from vlscale.models.generation.result import Generated
from vlscale.models.generation.rules import Rules
from vlscale.models.generation.settings import GenerationSettings
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.models.unimo import UnimoForPretraining


@torch.no_grad()
def generate(model: UnimoForPretraining, batch: RaggedBatch, **arguments: Any) -> Generated:
    """Generate a text for every example: a caption of an image, the target of a text, or of both.

    The sources are read once, and each step runs one new token per live hypothesis against the keys and values that
    were kept. Examples may be of different kinds and lengths; nothing is padded. Log-probabilities are float32 whatever
    the model is. A GPU is waited for once at the beginning, to learn the sizes of the sources (``Sources.read``), once
    per token, to learn which hypotheses live (``Book.living``), and once at the end, to learn the longest text and
    whether all scores are numbers (``in_order``); rules and lengths are copied to it before the first token.

    Args:
        model: in evaluation mode, with its word head.
        batch: the sources, on the device of the model. A text is [CLS] ... [SEP] as in training; of a text with a
            target (``prefix_len``) the source is taken. Positions, types, roles and turns are those of the source.
        **arguments: fields of :class:`~vlscale.models.generation.settings.GenerationSettings`, of which
            ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` must be given.

    Raises:
        VlscaleError: an argument is unknown, out of range or at odds with another; the model is in training mode or has
            no word head; the batch or a source is empty; a text might grow beyond the position table; the rules leave
            fewer texts than are asked for; scores are not numbers, as NaN among features or weights makes them.
    """
    settings = parse_config(GenerationSettings, arguments, "generate")
    if model.training:
        raise VlscaleError("generate: the model is in training mode, with dropout; call model.eval() first")
    model._require("words")
    settings.check_vocabulary(model.config.vocab_size)
    device = model.text_embedder.word.weight.device
    if batch.input_ids.device != device:
        raise VlscaleError(f"generate: the batch is on {batch.input_ids.device}, the model on {device}; move the batch")
    hypotheses = settings.num_beams if settings.num_beams > 1 else settings.num_return_sequences
    decoder = Decoder(model, batch, settings, hypotheses)
    rules = Rules(settings, model.config.vocab_size, device)
    ends = torch.tensor(settings.ends, dtype=torch.int64, device=device)
    if settings.num_beams == 1:
        return search_or_sample(decoder, settings, rules, ends)
    search = official_beams if settings.scoring == "official" else pooled_beams
    return search(decoder, settings, rules, ends)
