"""Beam search with a pool of ended hypotheses, as Hugging Face and PaddleNLP have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.models.generation.decoder import Decoder
from vlscale.models.generation.loop import Book, among, in_order
from vlscale.models.generation.official import gnmt_penalty
from vlscale.models.generation.result import Generated
from vlscale.models.generation.rules import NEVER, Rules
from vlscale.models.generation.settings import GenerationSettings


@dataclass(frozen=True)
class _Convention:
    """What the two libraries do differently."""

    settings: GenerationSettings

    @property
    def paddle(self) -> bool:
        return self.settings.scoring == "paddlenlp"

    def worth_of(self, summed: Tensor, tokens: int) -> Tensor:
        """Summed log-probabilities of hypotheses of so many new tokens, penalised."""
        exponent = self.settings.length_penalty
        return summed / (gnmt_penalty(tokens, exponent) if self.paddle else float(tokens) ** exponent)

    def ended(self, summed: Tensor, tokens: int) -> Tensor:
        """The same of hypotheses whose last token is the end token, which PaddleNLP does not count."""
        return self.worth_of(summed, tokens - self.paddle)

    def prospect(self, candidates_BC: Tensor, running_BK: Tensor, tokens: int) -> Tensor:
        """float [B], what live hypotheses of so many tokens might still be worth at best."""
        if self.settings.early_stopping == "never" and self.settings.length_penalty > 0:
            return self.worth_of(running_BK[:, 0], self.settings.steps)
        if self.paddle:
            return self.worth_of(candidates_BC[:, 0], tokens - 1)
        return self.worth_of(running_BK[:, 0], tokens)


class _Pool:
    """The K best ended hypotheses of every example, and which examples are settled."""

    def __init__(self, size: int, beams: int, book: Book) -> None:
        device, width = book.ids.device, book.ids.shape[1]
        self.size, self.beams = size, beams
        self.ids = torch.zeros(size, beams, width, dtype=torch.int64, device=device)
        self.running = torch.zeros(size, beams, width, device=device)
        self.lengths = torch.zeros(size, beams, dtype=torch.int64, device=device)
        self.ended = torch.zeros(size, beams, dtype=torch.bool, device=device)
        self.worth = torch.full((size, beams), NEVER, device=device)
        self.settled = torch.zeros(size, dtype=torch.bool, device=device)

    def add(self, ids_BCT: Tensor, running_BCT: Tensor, length: int, ended_BC: Tensor, worth_BC: Tensor) -> None:
        """Take those of C hypotheses per example, of one length, that are better than what there is; -inf: none.

        ``ended_BC`` tells those whose last token is an end token."""
        worth_BC = worth_BC.masked_fill(self.settled[:, None], NEVER)
        worth = torch.cat([self.worth, worth_BC], 1)
        self.worth, best_BK = worth.topk(self.beams, 1)
        fresh = torch.full_like(worth_BC, length, dtype=torch.int64)

        def chosen(old: Tensor, new: Tensor) -> Tensor:
            both = torch.cat([old, new], 1)
            index = best_BK if both.dim() == 2 else best_BK[:, :, None].expand(-1, -1, both.shape[2])
            return both.gather(1, index)

        self.ids, self.running = chosen(self.ids, ids_BCT), chosen(self.running, running_BCT)
        self.lengths = chosen(self.lengths, fresh)
        self.ended = chosen(self.ended, ended_BC)

    @property
    def full(self) -> Tensor:
        """bool [B]."""
        return (self.worth > NEVER).all(1)

    def result(self, pad: int, kept: int, dataset: str) -> Generated:
        """The best ones; see :func:`~vlscale.models.generation.loop.in_order`."""
        width = self.ids.shape[2]
        within = torch.arange(width, device=self.ids.device) < self.lengths[:, :, None]
        last = self.running.gather(2, (self.lengths - 1).clamp(min=0)[:, :, None])
        book = Book(
            self.ids.masked_fill(~within, pad).view(-1, width),
            torch.where(within, self.running, last).view(-1, width),
            self.lengths.view(-1),
            torch.zeros_like(self.ended).view(-1),
            self.ended.view(-1),
            width,
        )
        return in_order(book, self.worth, kept, dataset)


def pooled_beams(decoder: Decoder, settings: GenerationSettings, rules: Rules, ends: Tensor) -> Generated:
    """Beam search as ``GenerationSettings.scoring`` describes ``huggingface`` and ``paddlenlp``."""
    size, beams, device = decoder.size, settings.num_beams, decoder.device
    told, book = _Convention(settings), Book.open(size * beams, settings, device)
    pool, wanted = _Pool(size, beams, book), max(2, 1 + len(ends)) * beams
    logits_LV = decoder.begin()
    live_L = torch.arange(size, device=device) * beams
    summed_R = torch.zeros(size * beams, device=device)
    first_B1 = torch.arange(size, device=device)[:, None] * beams
    for step in range(settings.steps):
        last = step + 1 == settings.steps
        top_LE, token_LE = _best_tokens(book, rules, logits_LV, live_L, step, wanted)
        if rules.may_leave_nothing:
            _keep_stuck(pool, book, live_L, top_LE[:, 0] == NEVER, told.worth_of(summed_R, max(step, 1)))
        summed_BC, parent_BC, token_BC = _candidates(top_LE, token_LE, live_L, summed_R, beams, wanted)
        # Only the first `beams` candidates may end; those behind are there so that enough go on.
        found_BC = among(token_BC, ends)
        ends_BC = torch.ones_like(found_BC) if last and not told.paddle else found_BC
        may_end_BC = ends_BC & (torch.arange(ends_BC.shape[1], device=device) < beams)
        worth_BC = told.ended(summed_BC, step + 1).masked_fill(~may_end_BC, NEVER)
        ids_BCT, running_BCT = _continued(book, first_B1 + parent_BC, token_BC, summed_BC)
        pool.add(ids_BCT, running_BCT, book.column + 1, found_BC, worth_BC)
        summed_BK, chosen_BK = summed_BC.masked_fill(ends_BC, NEVER).topk(beams, 1)
        summed_R, tokens_R = summed_BK.flatten(), token_BC.gather(1, chosen_BK).flatten()
        parents_R = (first_B1 + parent_BC.gather(1, chosen_BK)).flatten()
        book.reorder(parents_R)
        book.append(tokens_R, summed_R, ends)
        prospect_B = told.prospect(summed_BC, summed_BK, step + 1)
        settles_B = prospect_B <= pool.worth[:, -1] if settings.early_stopping is not True else pool.full
        pool.settled = pool.settled | (pool.full & settles_B)
        if last:
            break
        # Beams that have no candidate are not run, nor are those of settled examples.
        book.alive = ~pool.settled.repeat_interleave(beams) & (summed_R != NEVER)
        live, live_L = book.living()
        if not live:
            break
        logits_LV = decoder.step(tokens_R, parents_R, live, live_L)
    if told.paddle:
        open_BK = told.worth_of(summed_R, settings.steps).view(size, beams)
        shape = (size, beams, book.ids.shape[1])
        pool.add(book.ids.view(shape), book.running.view(shape), book.column, torch.zeros_like(pool.ended), open_BK)
    return pool.result(settings.pad_token_id, settings.num_return_sequences, decoder.batch.dataset)


def _best_tokens(
    book: Book, rules: Rules, logits_LV: Tensor, live_L: Tensor, step: int, wanted: int
) -> tuple[Tensor, Tensor]:
    """The ``wanted`` best next tokens of each live hypothesis, best first: log-probability and token, [L, E]."""
    log_probs_LV = rules.log_probs(logits_LV, book.so_far.index_select(0, live_L), step)
    top = log_probs_LV.topk(min(wanted, logits_LV.shape[1]), 1)
    return top.values, top.indices


def _keep_stuck(pool: _Pool, book: Book, live_L: Tensor, stuck_L: Tensor, worth_R: Tensor) -> None:
    """Pool the live hypotheses that have no next token, as they are."""
    worth_L = worth_R.index_select(0, live_L).masked_fill(~stuck_L, NEVER)
    worth_BK = torch.full_like(worth_R, NEVER).index_copy(0, live_L, worth_L).view(pool.size, pool.beams)
    shape = (pool.size, pool.beams, book.ids.shape[1])
    none = torch.zeros_like(pool.ended)
    pool.add(book.ids.view(shape), book.running.view(shape), book.column, none, worth_BK)


def _candidates(
    top_LE: Tensor, token_LE: Tensor, live_L: Tensor, summed_R: Tensor, beams: int, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of each example, best first: summed log-probability, parent beam, token, all [B, C]."""
    rows, each = summed_R.numel(), top_LE.shape[1]
    summed_RE = torch.full((rows, each), NEVER, device=top_LE.device)
    summed_RE = summed_RE.index_copy(0, live_L, top_LE + summed_R.index_select(0, live_L)[:, None])
    token_RE = torch.zeros_like(summed_RE, dtype=torch.int64).index_copy(0, live_L, token_LE)
    flat = (rows // beams, beams * each)
    summed_BC, index_BC = summed_RE.view(flat).topk(min(wanted, flat[1]), 1)
    return summed_BC, torch.div(index_BC, each, rounding_mode="floor"), token_RE.view(flat).gather(1, index_BC)


def _continued(book: Book, rows_BC: Tensor, token_BC: Tensor, summed_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates written out: ids and running sums, [B, C, width]."""
    ids_BCT, running_BCT = book.ids[rows_BC], book.running[rows_BC]
    ids_BCT[:, :, book.column], running_BCT[:, :, book.column] = token_BC, summed_BC
    return ids_BCT, running_BCT
