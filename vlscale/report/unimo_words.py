"""Masked word pieces of held-out texts without images: what a UNIMO has learnt of language."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vlscale.data.dataset import Dataset
from vlscale.data.random import Draws
from vlscale.models.unimo import UnimoForPretraining
from vlscale.report.heldout import answering
from vlscale.report.outcome import Outcome, UnmeasurableError
from vlscale.report.unimo_batches import cut, device_of, make_batch, with_specials

SHARE = 0.15
"""Of word pieces, that are masked."""

MOST_TEXTS = 2000


def masked_pieces(
    model: UnimoForPretraining, dataset: Dataset, seed: int, max_text_tokens: int, most: int = MOST_TEXTS
) -> dict[str, Outcome]:
    """Mask word pieces of texts and ask for them.

    Each word piece is masked with probability :data:`SHARE`, by a draw of its own; a text without any is left out.
    Nothing is masked as a span here, and nothing is replaced by other words: an accuracy then means something to a
    person.

    Args:
        model: the model.
        dataset: texts; longer ones than ``max_text_tokens`` do not take part.
        seed: of the draws.
        max_text_tokens: word pieces without [CLS] and [SEP].
        most: the first so many texts.

    Returns:
        ``text_accuracy``: share of masked pieces that are the most probable one. Chance is the share of the most
        frequent one, which someone would get who always says that.

    Raises:
        UnmeasurableError: no text takes part.
    """
    rows = np.flatnonzero(np.asarray(dataset.texts.lengths) <= max_text_tokens)[:most]
    texts = with_specials(dataset, rows) if len(rows) else []
    chosen = [_choose(len(text), int(row), seed, dataset.name) for text, row in zip(texts, rows, strict=True)]
    kept = [number for number, places in enumerate(chosen) if len(places)]
    if not kept:
        raise UnmeasurableError(f"no text of at most {max_text_tokens} word pieces has one that is masked")
    texts, chosen = [texts[i] for i in kept], [chosen[i] for i in kept]
    labels = np.concatenate([text[places] for text, places in zip(texts, chosen, strict=True)])
    right = np.concatenate(_answer(model, dataset, texts, chosen)) == labels
    owner = np.repeat(rows[kept], [len(places) for places in chosen])
    return {"text_accuracy": Outcome(right.astype(np.float64), owner, float(np.bincount(labels).max() / len(labels)))}


def _choose(length: int, row: int, seed: int, name: str) -> NDArray[np.int64]:
    """Places of the masked pieces of a text with its special tokens."""
    drawn = Draws(seed, name).uniform("report_text_mask", 0, row, np.arange(length - 2))[..., 0]
    return np.flatnonzero(drawn < SHARE) + 1


def _answer(
    model: UnimoForPretraining, dataset: Dataset, texts: list[NDArray[np.int64]], chosen: list[NDArray[np.int64]]
) -> list[NDArray[np.int64]]:
    """The most probable pieces at the masked places, batch after batch."""
    answers, device, mask = [], device_of(model), dataset.texts.meta.vocabulary.mask
    with answering(model):
        for part in cut(np.array([len(text) for text in texts])):
            masked = [text.copy() for text in texts[part]]
            for text, places in zip(masked, chosen[part], strict=True):
                text[places] = mask
            batch = make_batch(dataset, masked, np.full(len(masked), -1, np.int64), 1).to(device)
            begins = batch.cu_text[:-1].tolist()
            at = np.concatenate([begin + places for begin, places in zip(begins, chosen[part], strict=True)])
            positions = torch.from_numpy(at).to(device)
            answers.append(model.mlm_logits(model.encode(batch), positions).argmax(1).cpu().numpy())
    return answers
