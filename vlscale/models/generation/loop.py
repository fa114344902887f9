"""Greedy search and sampling, and what all searches keep of their hypotheses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.generation.decoder import Decoder
from vlscale.models.generation.result import Generated
from vlscale.models.generation.rules import NEVER, Rules
from vlscale.models.generation.settings import GenerationSettings


@dataclass
class Book:
    """The hypotheses of a search, R = B * K of them, as they grow.

    Attributes:
        ids: int64 [R, S + 1 or S], padded; ``bos_token_id`` first where there is one.
        running: float32, likewise, the score after each token.
        lengths: int64 [R], tokens so far; ended hypotheses do not grow.
        alive: bool [R], which ones go on.
        ended: bool [R], which ones have an end token.
        column: where the next tokens go, the same for all.
    """

    ids: Tensor
    running: Tensor
    lengths: Tensor
    alive: Tensor
    ended: Tensor
    column: int

    @classmethod
    def open(cls, rows: int, settings: GenerationSettings, device: torch.device) -> Book:
        """Begin so many hypotheses."""
        width = settings.start + settings.steps
        ids = torch.full((rows, width), settings.pad_token_id, dtype=torch.int64, device=device)
        if settings.bos_token_id is not None:
            ids[:, 0] = settings.bos_token_id
        running = torch.zeros(rows, width, dtype=torch.float32, device=device)
        lengths = torch.full((rows,), settings.start, dtype=torch.int64, device=device)
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        return cls(ids, running, lengths, alive, ~alive, settings.start)

    @property
    def so_far(self) -> Tensor:
        """int64 [R, T], all tokens."""
        return self.ids[:, : self.column]

    def reorder(self, parents_R: Tensor) -> None:
        """Let hypothesis r be what ``parents_R[r]`` was."""
        self.ids, self.running = self.ids.index_select(0, parents_R), self.running.index_select(0, parents_R)
        self.lengths, self.alive = self.lengths.index_select(0, parents_R), self.alive.index_select(0, parents_R)
        self.ended = self.ended.index_select(0, parents_R)

    def stop(self, rows_L: Tensor, which_L: Tensor) -> None:
        """Let those of the live hypotheses ``rows_L`` go on no more that have no next token: bool [L] ``which_L``."""
        self.alive = self.alive.index_copy(0, rows_L, ~which_L)

    def append(self, tokens_R: Tensor, scores_R: Tensor, ends: Tensor) -> None:
        """Give live hypotheses a token, all a score; those whose token is among ``ends`` (int64 [E]) end."""
        column, alive = self.column, self.alive
        self.ids[:, column] = torch.where(alive, tokens_R, self.ids[:, column])
        self.running[:, column] = scores_R
        self.lengths = self.lengths + alive
        ends_R = alive & among(tokens_R, ends)
        self.alive, self.ended = alive & ~ends_R, self.ended | ends_R
        self.column = column + 1

    def living(self) -> tuple[list[int], Tensor]:
        """Which hypotheses live: on the host, and int64 [L] on the device. Here the device is waited for."""
        rows = [row for row, lives in enumerate(self.alive.tolist()) if lives]
        return rows, self.alive.to(torch.uint8).argsort(descending=True, stable=True)[: len(rows)]


def among(tokens: Tensor, few: Tensor) -> Tensor:
    """bool, of the shape of ``tokens``: which of them are among ``few`` [E]. ``torch.isin`` may wait for a GPU."""
    return (tokens[..., None] == few).any(-1)


def in_order(book: Book, scores_BK: Tensor, kept: int, dataset: str) -> Generated:
    """The ``kept`` best hypotheses of every example by float [B, K], the best first. Here the device is waited for.

    Raises:
        VlscaleError: one of them has a score that is not finite; ``dataset`` is named.
    """
    size, beams = scores_BK.shape
    scores_BR, order_BR = (each[:, :kept] for each in scores_BK.sort(dim=1, descending=True, stable=True))
    rows = (order_BR + torch.arange(size, device=order_BR.device)[:, None] * beams).flatten()
    lengths = book.lengths.index_select(0, rows)
    longest, finite = torch.stack([lengths.max(), scores_BR.isfinite().all().long()]).tolist()
    if not finite:
        raise _not_finite(scores_BR.tolist(), dataset)
    return Generated(
        sequences=book.ids[:, :longest].index_select(0, rows).view(size, kept, longest),
        lengths=lengths.view(size, kept),
        finished=book.ended.index_select(0, rows).view(size, kept),
        scores=scores_BR,
        running_scores=book.running[:, :longest].index_select(0, rows).view(size, kept, longest),
    )


def _not_finite(scores: list[list[float]], dataset: str) -> VlscaleError:
    example = next(number for number, row in enumerate(scores) if not all(map(math.isfinite, row)))
    row, where = scores[example], f"generate, dataset {dataset!r}: example {example}"
    if any(score != NEVER and not math.isfinite(score) for score in row):
        return VlscaleError(
            f"{where} has a score that is no finite number; look for NaN and infinities in its features, its boxes and "
            "the model's weights"
        )
    return VlscaleError(
        f"{where} has {sum(score != NEVER for score in row)} texts that the rules allow, {len(row)} are asked for; "
        "lower num_return_sequences, or forbid less"
    )


def search_or_sample(decoder: Decoder, settings: GenerationSettings, rules: Rules, ends: Tensor) -> Generated:
    """One hypothesis after the other: the best token each time, or a drawn one."""
    copies, device = settings.num_return_sequences, decoder.device
    book = Book.open(decoder.size * copies, settings, device)
    scores_R = torch.zeros(decoder.size * copies, device=device)
    draws = settings.generator
    if settings.do_sample and draws is None and settings.seed is not None:
        draws = torch.Generator(device).manual_seed(settings.seed)
    logits_LV = decoder.begin().repeat_interleave(copies, 0)
    live, live_L = list(range(book.alive.numel())), torch.arange(book.alive.numel(), device=device)
    for step in range(settings.steps):
        ids_LT = book.so_far.index_select(0, live_L)
        log_probs_LV = rules.log_probs(logits_LV, ids_LT, step)
        if settings.do_sample:
            # Of all hypotheses, living or not: what one draws does not depend on when the others end.
            shape = (book.alive.numel(), logits_LV.shape[1])
            noise_RV = torch.empty(shape, device=device).exponential_(generator=draws)
            tokens_L = rules.draw(log_probs_LV, noise_RV.index_select(0, live_L))
        else:
            tokens_L = log_probs_LV.argmax(1)
        stuck_L = log_probs_LV.amax(1) == NEVER
        book.stop(live_L, stuck_L)
        gained_L = log_probs_LV.gather(1, tokens_L[:, None]).squeeze(1).masked_fill(stuck_L, 0.0)
        scores_R = scores_R.index_add(0, live_L, gained_L)
        tokens_R = torch.full_like(book.lengths, settings.pad_token_id).index_copy(0, live_L, tokens_L)
        book.append(tokens_R, scores_R, ends)
        if step + 1 == settings.steps:
            break
        live, live_L = book.living()
        if not live:
            break
        logits_LV = decoder.step(tokens_R, None, live, live_L)
    return in_order(book, scores_R.view(decoder.size, copies), copies, decoder.batch.dataset)
