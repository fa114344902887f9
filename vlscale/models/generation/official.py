"""The beam search of UNIMO's authors: one list of hypotheses, ended ones among them, ranked by a penalised sum."""

from __future__ import annotations

import torch
from torch import Tensor

from vlscale.models.generation.decoder import Decoder
from vlscale.models.generation.loop import Book, in_order
from vlscale.models.generation.result import Generated
from vlscale.models.generation.rules import BLOCKED, NEVER, Rules
from vlscale.models.generation.settings import GenerationSettings


def gnmt_penalty(tokens: int, exponent: float) -> float:
    """``((5 + n) / 6)^exponent`` of n tokens (Wu et al. 2016, equation 14)."""
    return float(((5 + tokens) / 6) ** exponent)


def official_beams(decoder: Decoder, settings: GenerationSettings, rules: Rules, ends: Tensor) -> Generated:
    """Beam search as ``GenerationSettings.scoring`` describes ``official``."""
    size, beams, device = decoder.size, settings.num_beams, decoder.device
    book = Book.open(size * beams, settings, device)
    logits_LV = decoder.begin()
    # Before the first step an example has one hypothesis: the first of its rows.
    live_L = torch.arange(size, device=device) * beams
    worth_R = torch.zeros(size * beams, device=device)
    for step in range(settings.steps):
        ids_LT = book.so_far.index_select(0, live_L)
        top_LK, token_LK = rules.log_probs(logits_LV, ids_LT, step).topk(beams, 1)
        if settings.no_repeat_ngram_size:
            again_LK = rules.repeating(ids_LT).gather(1, token_LK)
            top_LK = top_LK + BLOCKED * again_LK
        summed_L1 = worth_R.index_select(0, live_L)[:, None] * gnmt_penalty(step, settings.length_penalty)
        worth_LK = (summed_L1 + top_LK) / gnmt_penalty(step + 1, settings.length_penalty)
        book.stop(live_L, worth_LK[:, 0] == NEVER)
        candidates_RK = torch.full((size * beams, beams), NEVER, device=device).index_copy(0, live_L, worth_LK)
        # A hypothesis that does not go on is the only candidate of its own.
        candidates_RK[:, 0] = torch.where(book.alive, candidates_RK[:, 0], worth_R)
        tokens_RK = torch.full_like(candidates_RK, settings.pad_token_id, dtype=torch.int64)
        tokens_RK = tokens_RK.index_copy(0, live_L, token_LK)
        worth_BK, flat_BK = candidates_RK.view(size, beams * beams).topk(beams, 1)
        first_B1 = torch.arange(size, device=device)[:, None] * beams
        parents_R = (first_B1 + torch.div(flat_BK, beams, rounding_mode="floor")).flatten()
        tokens_R = tokens_RK.view(size, beams * beams).gather(1, flat_BK).flatten()
        worth_R = worth_BK.flatten()
        book.reorder(parents_R)
        book.alive &= worth_R != NEVER  # where there are fewer candidates than beams
        book.append(tokens_R, worth_R, ends)
        if step + 1 == settings.steps:
            break
        live, live_L = book.living()
        if not live:
            break
        logits_LV = decoder.step(tokens_R, parents_R, live, live_L)
    return in_order(book, worth_R.view(size, beams), settings.num_return_sequences, decoder.batch.dataset)
